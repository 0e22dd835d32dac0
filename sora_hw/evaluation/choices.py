"""Scoring multiple-choice records by likelihood: the candidate answer the model finds most probable is its choice."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sora_hw.data.prompts import prompt
from sora_hw.data.records import Record

ANSWER = "the correct answer is {candidate}"


@dataclass(frozen=True)
class Choice:
    """What the model chose for one record; log-likelihoods in nats, summed over the tokens of the answer."""

    record: Record
    chosen: str
    log_likelihoods: dict[str, float]

    @property
    def correct(self) -> bool:
        return self.chosen == self.record.answer


@dataclass(frozen=True)
class ChoiceScore:
    """`accuracy` = `correct` / `total`, between 0 and 1; `by_record` stands in the order of the records."""

    correct: int
    total: int
    accuracy: float
    by_record: tuple[Choice, ...]


@dataclass(frozen=True)
class _Question:
    """One candidate after its prompt: token ids, and where the answer's tokens begin."""

    record: int
    candidate: str
    ids: list[int]
    answer_start: int


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    candidates: Callable[[Record], Sequence[str]],
    device: torch.device | str,
    batch_size: int = 16,
) -> ChoiceScore:
    """Score `records` by the log-likelihood of "the correct answer is {candidate}" after the training prompt.

    model: a causal language model on `device`, bare or wrapped by PEFT; its training mode is restored afterwards.
    candidates: gives the answers to choose from; equal likelihoods go to the first of them.
    batch_size: texts per forward pass (every record brings one text per candidate); it does not change the result.
    Raises ValueError when there are no records.
    """
    if not records:
        raise ValueError("there are no records to score")
    questions = [
        _question(tokenizer, index, record, candidate)
        for index, record in enumerate(records)
        for candidate in candidates(record)
    ]
    # Texts of like length share a batch, so that little is spent on padding.
    questions.sort(key=lambda question: len(question.ids))
    found: list[dict[str, float]] = [{} for _ in records]
    with _evaluating(model):
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            for question, value in zip(batch, _log_likelihoods(model, batch, device), strict=True):
                found[question.record][question.candidate] = value
    choices = tuple(_choose(record, candidates(record), values) for record, values in zip(records, found, strict=True))
    correct = sum(choice.correct for choice in choices)
    return ChoiceScore(correct, len(choices), correct / len(choices), choices)


def _choose(record: Record, candidates: Sequence[str], log_likelihoods: dict[str, float]) -> Choice:
    ordered = {candidate: log_likelihoods[candidate] for candidate in candidates}
    return Choice(record, max(ordered, key=ordered.__getitem__), ordered)


def _question(tokenizer: PreTrainedTokenizerBase, index: int, record: Record, candidate: str) -> _Question:
    context = prompt(record, for_training=True)
    context_ids = tokenizer(context)["input_ids"]
    ids = tokenizer(context + ANSWER.format(candidate=candidate))["input_ids"]
    # The last token of the prompt may join the first word of the answer, so the answer begins where the ids part.
    shared = 0
    while shared < min(len(context_ids), len(ids)) and context_ids[shared] == ids[shared]:
        shared += 1
    return _Question(index, candidate, ids, shared)


@torch.no_grad()
def _log_likelihoods(model: PreTrainedModel, batch: Sequence[_Question], device: torch.device | str) -> list[float]:
    rows = [torch.tensor(question.ids) for question in batch]
    # Padding stands on the right and is masked: which token fills it makes no difference.
    ids_BT = pad_sequence(rows, batch_first=True).to(device)
    mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    values = []
    for question, ids_T, logits_TV in zip(batch, ids_BT, logits_BTV, strict=True):
        answer = slice(question.answer_start, len(question.ids))
        log_probabilities = logits_TV[answer.start - 1 : answer.stop - 1].float().log_softmax(dim=-1)
        values.append(log_probabilities.gather(1, ids_T[answer, None]).sum())
    return torch.stack(values).tolist()


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
