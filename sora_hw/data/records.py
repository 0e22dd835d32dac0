"""Reading training and test records: json, jsonl, json.gz and jsonl.gz files in the LLM-Adapters record format."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sora_hw.errors import DataError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True)
class Record:
    """One question with its answer: `output` is the text to learn, `answer` alone is what counts as correct."""

    instruction: str
    input: str
    output: str
    answer: str
    id: str = ""


def read_records(paths: Sequence[str | Path]) -> list[Record]:
    """All records of `paths`, in the order of the files and of the lines within them.

    A json file holds one list of objects, a jsonl file one object per line; either may be gzipped. Objects need
    `instruction`, `output` and `answer`; `input` and `id` are optional and further keys are ignored. A record without
    an id gets "<file name>:<line or position>".

    Raises DataError, naming file and line, for a file that is missing, empty, truncated, not UTF-8 or not JSON and for
    a record that lacks a field or has one of the wrong type.
    """
    return [record for path in paths for record in _read_file(Path(path))]


def _read_file(path: Path) -> list[Record]:
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown kind of data file; use one that ends in {', '.join(SUFFIXES)}")
    objects = _list_items if name.removesuffix(".gz").endswith(".json") else _lines
    try:
        with _open(path) as file:
            records = [_record(item, path, place, number) for number, place, item in objects(file, path)]
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        if _starts_as_gzip(path):
            raise DataError(f"{path}: the gzip file is truncated or damaged; fetch it again") from None
        raise DataError(f"{path}: not a gzip file although its name ends in .gz") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not records:
        raise DataError(f"{path}: the file holds no records")
    return records


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _starts_as_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str, object]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, f"line {number}", _parse(_decode(line, path, number), path, number)


def _list_items(file: BinaryIO, path: Path) -> Iterator[tuple[int, str, object]]:
    content = file.read()
    if not content.strip():
        return
    items = _parse(_decode(content, path, 1), path, 1, "; name a file of one record per line .jsonl")
    if not isinstance(items, list):
        raise DataError(f"{path}: a .json file must hold one list of records; name a file of one per line .jsonl")
    for number, item in enumerate(items, start=1):
        yield number, f"record {number}", item


def _decode(content: bytes, path: Path, first_line: int) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(f"{path}: line {line}: not UTF-8 text; convert the file to UTF-8") from None


def _parse(text: str, path: Path, first_line: int, if_more_follows: str = "") -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = if_more_follows if error.msg == "Extra data" else ""
        raise DataError(f"{path}: line {line}: not JSON ({error.msg}, column {error.colno}){hint}") from None
    except (RecursionError, ValueError):  # nesting or a number beyond what Python parses
        raise DataError(
            f"{path}: line {first_line}: JSON that is nested too deeply or holds too long a number"
        ) from None


def _record(item: object, path: Path, place: str, number: int) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"{path}: {place}: a record must be an object, not {_kind(item)}")
    texts = {}
    for field in ("instruction", "input", "output", "answer"):
        if field not in item and field != "input":
            raise DataError(f'{path}: {place}: the record lacks the field "{field}"')
        text = item.get(field, "")
        if not isinstance(text, str):
            raise DataError(f'{path}: {place}: "{field}" must be text, not {_kind(text)}')
        if field in ("instruction", "output") and not text.strip():
            raise DataError(f'{path}: {place}: "{field}" is empty')
        if not _is_unicode(text):
            raise DataError(f'{path}: {place}: "{field}" holds half of a surrogate pair, which is not text')
        texts[field] = text
    return Record(**texts, id=str(item.get("id") or f"{path.name}:{number}"))


def _is_unicode(text: str) -> bool:
    """JSON can spell lone surrogates ("\\ud800"), which no tokenizer and no UTF-8 file can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
