"""The label of a sentence or a pair of sentences, predicted by a head on an encoder, as GLUE asks for it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from sora_hw.data.dataset import Samples, tokenise_sentences
from sora_hw.data.glue import TASKS, SentenceRecord, read_sentences
from sora_hw.evaluation.glue import score
from sora_hw.recipes.recipe import Classification
from sora_hw.training.objectives.objective import Objective

HUB_TEST_SPLIT = "validation"  # the labels of GLUE's own test splits are secret; the paper scores the dev sets


class ClassifyingSentences(Objective):
    """Every sample of the global batch weighs the same, whichever rank has it. See `Objective`."""

    auto_class = AutoModelForSequenceClassification
    task_type = "SEQ_CLS"
    ends_texts = False

    def __init__(self, recipe: Classification):
        super().__init__(recipe)
        self.task = TASKS[recipe.task]
        regression = self.task.labels == 1
        self.loss_unit = "squared error" if regression else "nats per sample"
        kind = "regression" if regression else "single_label_classification"
        self.model_options = {"num_labels": self.task.labels, "problem_type": kind}

    def training_records(self) -> list[SentenceRecord]:
        return read_sentences(self.recipe.train_data, self.task, "train")

    def test_records(self) -> list[SentenceRecord]:
        return read_sentences(self.recipe.test_data, self.task, HUB_TEST_SPLIT)

    def tokenise(self, records: Sequence[SentenceRecord], tokenizer: PreTrainedTokenizerBase) -> Samples:
        return tokenise_sentences(records, tokenizer, self.recipe.max_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable:
        return DataCollatorWithPadding(tokenizer)

    def loss(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        losses = self._losses(outputs.logits, labels)
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    def _losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(samples,): squared errors of a regression, otherwise cross-entropies in nats; in float32 at least."""
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if self.task.labels == 1:
            return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
        return functional.cross_entropy(logits, labels, reduction="none")

    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(samples, labels): all of them, in float32."""
        return logits.float()

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = torch.from_numpy(np.asarray(prediction.predictions)), torch.tensor(prediction.label_ids)
        loss = self._losses(logits, labels).double().mean().item()
        return {"loss": loss, **score(self.task, prediction.predictions, prediction.label_ids)}
