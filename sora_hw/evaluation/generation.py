"""Answers as text: LLM-Adapters' protocol, which generates, extracts and compares.

Decoding is greedy, so that a score can be repeated; LLM-Adapters' scripts search with four beams.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sora_hw.data.prompts import prompt
from sora_hw.data.records import Record
from sora_hw.evaluation.answers import judge
from sora_hw.evaluation.scorer import Scorer
from sora_hw.evaluation.tasks import COMMONSENSE, MATH, Task

NEW_TOKENS = {COMMONSENSE: 32, MATH: 256}  # LLM-Adapters


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, and whether it had to be cut to fit the model."""

    ids: list[int]
    cut: bool = False


class Generator:
    """A causal language model on `device`, bare or wrapped by PEFT, in evaluation mode, and its tokenizer.

    It writes at most `max_new_tokens` tokens, and stops at the end of text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str,
        max_new_tokens: int,
    ):
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.ends = _ends(model, tokenizer)
        self.config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        positions = getattr(model.config, "max_position_embeddings", None)
        self.room = None if positions is None else max(1, positions - max_new_tokens)

    def encode(self, text: str) -> Prompt:
        """The tokens of a prompt. One that leaves no room for an answer loses its beginning: the question ends it."""
        ids = self.tokenizer(text)["input_ids"]
        if ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        return Prompt(ids) if self.room is None or len(ids) <= self.room else Prompt(ids[-self.room :], cut=True)

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """What follows each prompt, as one batch; a prompt's answer does not depend on the others."""
        width = max(len(each.ids) for each in prompts)
        # Padding stands on the left and is masked, so that every answer begins in the same column.
        ids = [[self.tokenizer.pad_token_id] * (width - len(each.ids)) + each.ids for each in prompts]
        mask = [[0] * (width - len(each.ids)) + [1] * len(each.ids) for each in prompts]
        ids_BT, mask_BT = torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)
        written_BT = self.model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=self.config)
        return [self._text(row) for row in written_BT[:, width:].tolist()]

    def _text(self, ids: list[int]) -> str:
        """Up to the end of text, behind which an answer is filled up to the length of its batch."""
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the tokenizer's own, and those that the model's generation_config names."""
    named = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


class GeneratedAnswers(Scorer):
    """Questions of one task answered in the prompt format of LLM-Adapters' scoring. See `Scorer`."""

    def __init__(self, task: Task, records: Sequence[Record], generator: Generator):
        self.task, self.records, self.generator = task, records, generator
        self.prompts = [generator.encode(prompt(record, for_training=False)) for record in records]
        self.lengths = [len(each.ids) for each in self.prompts]
        self.metrics = ("correct", "strict_correct") if task.kind == MATH and task.answers else ("correct",)
        asked = [(each.ids, record.answer) for each, record in zip(self.prompts, records, strict=True)]
        everything = json.dumps([asked, generator.config.max_new_tokens])
        self.fingerprint = hashlib.sha256(everything.encode()).hexdigest()

    def predict(self, batch: Sequence[int]) -> list[dict[str, object]]:
        texts = self.generator.answer([self.prompts[index] for index in batch])
        return [self._judged(index, text) for index, text in zip(batch, texts, strict=True)]

    def _judged(self, index: int, text: str) -> dict[str, object]:
        record = self.records[index]
        judged = judge(self.task, text, record.answer)
        found = {"text": text, "extracted": judged.extracted, "gold": record.answer, "correct": judged.correct}
        if judged.strict:
            found |= {"strict_extracted": judged.strict.extracted, "strict_correct": judged.strict.correct}
        return {"id": record.id, **found, "cut": self.prompts[index].cut}
