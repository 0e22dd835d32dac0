"""Questions with their answers, to train on and to be scored with: LLM-Adapters' records, or MetaMathQA's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sora_hw.data.files import Row, iterate_rows, read_rows, shown
from sora_hw.data.spool import keep

METAMATH_ANSWER = "The answer is:"


@dataclass(frozen=True)
class Record:
    """One question with its answer: `output` is the text to learn, `answer` alone is what counts as correct."""

    instruction: str
    input: str
    output: str
    answer: str
    id: str = ""


def read_records(sources: Sequence[str | Path], split: str = "train") -> Sequence[Record]:
    """All records of `sources`: data files, or data sets of the Hugging Face hub, whose `split` is read.

    Rows need LLM-Adapters' `instruction`, `output` and `answer`, or MetaMathQA's `query` and `response`, whose answer
    is what follows its last "The answer is:". `input` and `id` are optional and further columns are ignored. A record
    without an id gets "<file name or data set>:<line or position>".

    Raises DataError, naming file and line, for what `read_rows` cannot read and for a row that lacks a field or has one
    of the wrong type.
    """
    return keep(map(_record, iterate_rows(sources, split)))


@dataclass(frozen=True)
class ChoiceRecord:
    """One question with the texts to choose from; `label` is the number of the right one, from 0."""

    question: str
    choices: tuple[str, ...]
    label: int
    id: str = ""


def read_questions(source: str | Path, check: Callable[[str], None]) -> list[Record]:
    """The records of a test file, as questions: `output` may be missing and is left empty, `answer` may be a number.

    check: raises ValueError, saying what an answer must be, for one that it cannot be.
    Raises DataError as `read_records`, and for such an answer.
    """
    return [_question(row, check) for row in read_rows([source])]


def _question(row: Row, check: Callable[[str], None]) -> Record:
    number = row.values.get("answer")
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    answer = str(number) if is_number else row.text("answer").strip()
    try:
        check(answer)
    except ValueError as error:
        raise row.error(f'"answer" must be {error}, not {shown(answer)}') from None
    return Record(_filled(row, "instruction"), _input(row), "", answer, row.id)


def read_choices(source: str | Path) -> list[ChoiceRecord]:
    """The records of a test file, as questions with texts to choose from: `question`, `choices` and `label`.

    Raises DataError, naming file and line, for what `read_rows` cannot read and for a row that lacks one of them, or
    whose label is no number of a choice.
    """
    return [_choice(row) for row in read_rows([source])]


def _choice(row: Row) -> ChoiceRecord:
    for column in ("question", "choices", "label"):
        if column not in row.values:
            raise row.error(
                f'the record lacks the field "{column}": likelihoods need question, choices and label; LLM-Adapters\' '
                "own files have none, and are scored with --protocol generation"
            )
    choices, label = row.values["choices"], row.values["label"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(each, str) and each for each in choices):
        raise row.error('"choices" must be a list of at least two texts')
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise row.error(f'"label" must be a number from 0 to {len(choices) - 1}, not {shown(label)}')
    return ChoiceRecord(_filled(row, "question"), tuple(choices), label, row.id)


def _record(row: Row) -> Record:
    if "query" in row.values and "instruction" not in row.values:
        return _metamath_record(row)
    texts = {
        "instruction": _filled(row, "instruction"),
        "input": _input(row),
        "output": _filled(row, "output"),
        "answer": row.text("answer"),
    }
    return Record(**texts, id=row.id)


def _metamath_record(row: Row) -> Record:
    query, response = _filled(row, "query"), _filled(row, "response")
    _, _, answer = response.rpartition(METAMATH_ANSWER)
    if METAMATH_ANSWER not in response or not answer.strip():
        raise row.error(f'"response" must end with "{METAMATH_ANSWER}" and the answer')
    return Record(query, "", response, answer.strip(), row.id)


def _input(row: Row) -> str:
    return row.text("input") if row.values.get("input") is not None else ""


def _filled(row: Row, column: str) -> str:
    text = row.text(column)
    if not text.strip():
        raise row.error(f'"{column}" is empty')
    return text
