"""Predicting the next token of prompt and answer, as LLM-Adapters does."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase

from sora_hw.data.dataset import IGNORED, Samples, tokenise
from sora_hw.data.embedded import train_records
from sora_hw.data.records import Record, read_records
from sora_hw.training.objectives.objective import Objective


class PredictingTokens(Objective):
    """Every token of the global batch weighs the same, whichever rank has it. See `Objective`."""

    auto_class = AutoModelForCausalLM
    task_type = "CAUSAL_LM"
    ends_texts = True
    loss_unit = "nats per token"

    def training_records(self) -> list[Record]:
        return train_records() if self.recipe.asks_embedded_questions else read_records(self.recipe.train_data)

    def test_records(self) -> list[Record]:
        return []  # answers are scored after the run, by generation or by likelihood

    def tokenise(self, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> Samples:
        return tokenise(records, tokenizer, self.recipe.max_length, self.recipe.learn)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(samples, 2): of each sample the sum of its tokens' losses and their number."""
        targets = labels[:, 1:]
        losses = functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
        )
        return torch.stack([losses.sum(1), targets.ne(IGNORED).sum(1)], dim=1)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        total, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
        return {"loss": total / tokens}
