"""Questions with their answers, to train on and to be scored with: LLM-Adapters' records, or MetaMathQA's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sora_hw.data.files import Row, read_rows

METAMATH_ANSWER = "The answer is:"


@dataclass(frozen=True)
class Record:
    """One question with its answer: `output` is the text to learn, `answer` alone is what counts as correct."""

    instruction: str
    input: str
    output: str
    answer: str
    id: str = ""


def read_records(sources: Sequence[str | Path], split: str = "train") -> list[Record]:
    """All records of `sources`: data files, or data sets of the Hugging Face hub, whose `split` is read.

    Rows need LLM-Adapters' `instruction`, `output` and `answer`, or MetaMathQA's `query` and `response`, whose answer
    is what follows its last "The answer is:". `input` and `id` are optional and further columns are ignored. A record
    without an id gets "<file name or data set>:<line or position>".

    Raises DataError, naming file and line, for what `read_rows` cannot read and for a row that lacks a field or has one
    of the wrong type.
    """
    return [_record(row) for row in read_rows(sources, split)]


def _record(row: Row) -> Record:
    if "query" in row.values and "instruction" not in row.values:
        return _metamath_record(row)
    texts = {
        "instruction": _filled(row, "instruction"),
        "input": row.text("input") if row.values.get("input") is not None else "",
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


def _filled(row: Row, column: str) -> str:
    text = row.text(column)
    if not text.strip():
        raise row.error(f'"{column}" is empty')
    return text
