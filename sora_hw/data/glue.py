"""Sentences and pairs of sentences with a label: the seven GLUE tasks that the paper reports."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sora_hw.data.files import Row, iterate_rows, shown
from sora_hw.data.spool import keep

HIGHEST_SCORE = 5.0  # STS-B rates the similarity of two sentences from 0 to this
PAIR = ("sentence1", "sentence2")


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: as the subset of nyu-mll/glue is called.
        columns: where that subset keeps the one sentence, or the two of a pair.
        labels: how many labels there are, 0 to labels - 1; 1 where the label is a score from 0 to 5 (regression).
        metric: what GLUE reports: "accuracy", "matthews" or "pearson".
        training_records: how many there are on the hub (Wang et al., 2019), so that a run can be planned without them.
    """

    name: str
    columns: tuple[str, ...]
    labels: int
    metric: str
    training_records: int


TASKS: Mapping[str, GlueTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            GlueTask("rte", PAIR, 2, "accuracy", 2_490),
            GlueTask("mrpc", PAIR, 2, "accuracy", 3_668),
            GlueTask("stsb", PAIR, 1, "pearson", 5_749),
            GlueTask("cola", ("sentence",), 2, "matthews", 8_551),
            GlueTask("sst2", ("sentence",), 2, "accuracy", 67_349),
            GlueTask("qnli", ("question", "sentence"), 2, "accuracy", 104_743),
            GlueTask("qqp", ("question1", "question2"), 2, "accuracy", 363_846),
        )
    }
)


@dataclass(frozen=True)
class SentenceRecord:
    """One sentence (`second` is None) or a pair, with its label: a class, or a score where the task is a regression."""

    first: str
    second: str | None
    label: int | float
    id: str = ""


def read_sentences(sources: Sequence[str | Path], task: GlueTask, split: str = "train") -> Sequence[SentenceRecord]:
    """All records of `sources`: data files, or "nyu-mll/glue" on the Hugging Face hub, whose `split` is read.

    Rows have the task's columns (any pair may also be in `sentence1` and `sentence2`) and `label`, a number or its
    text. `id` is optional and further columns are ignored.

    Raises DataError, naming file and line, for what `iterate_rows` cannot read and for a row that lacks a sentence or
    whose label is not one of the task's.
    """
    return keep(_record(row, task) for row in iterate_rows(sources, split, subset=task.name))


def _record(row: Row, task: GlueTask) -> SentenceRecord:
    in_pair = len(task.columns) == 2 and task.columns[0] not in row.values and PAIR[0] in row.values
    columns = PAIR if in_pair else task.columns
    texts = [row.text(column) for column in columns]
    if not any(text.strip() for text in texts):  # one of a pair may be empty: that is still a pair
        raise row.error(f'"{columns[0]}" is empty')
    first, second = texts if len(texts) == 2 else (*texts, None)
    return SentenceRecord(first, second, _label(row, task), row.id)


def _label(row: Row, task: GlueTask) -> int | float:
    if "label" not in row.values:
        raise row.lacks("label")
    value = row.values["label"]
    number = _number(value)
    if number == -1:
        raise row.error('"label" is -1: the row has no label, as in the test split on the hub; use another split')
    if task.labels == 1:
        if number is None or not 0 <= number <= HIGHEST_SCORE:
            raise row.error(f'"label" must be a number from 0 to {HIGHEST_SCORE:g}, not {shown(value)}')
        return float(number)
    if not isinstance(number, int) or not 0 <= number < task.labels:
        allowed = " or ".join(map(str, range(task.labels)))
        raise row.error(f'"label" must be {allowed}, not {shown(value)}')
    return number


def _number(value: object) -> int | float | None:
    """The finite number that `value` is or spells, None where it is none; true and false are none."""
    if isinstance(value, str):
        value = _spelled(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _spelled(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
