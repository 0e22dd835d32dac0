"""Rows of data, from local files (json, jsonl, csv, tsv, parquet) or from a data set of the Hugging Face hub.

What the rows mean is for others to say (`records`, `glue`); here every row knows where it stands, so that whatever is
wrong with it can be told with file and line. pyarrow and datasets are imported only where they are needed.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sora_hw.errors import DataError
from sora_hw.storage import check_regular

if TYPE_CHECKING:
    import pyarrow

PARQUET_ROWS = 4096  # read at a time
Numbered = Iterator[tuple[int, str, object]]  # number, place, item


@dataclass(frozen=True)
class Row:
    """One row: its values by column, and where they stand.

    Attributes:
        source: the file's path as it was given, or the id of the data set.
        place: where in the source, for messages: "line 3", "record 2", "row 4".
        number: that line, record or row, from 1.
        values: JSON's types from json and jsonl; from tables text, or None for a cell without a value.
    """

    source: str
    place: str
    number: int
    values: dict[str, object]

    @property
    def id(self) -> str:
        """The row's own id, otherwise "<file name or id of the data set>:<number>"."""
        if given := self.values.get("id"):
            return str(given)
        name = Path(self.source).name if self.source.lower().endswith(SUFFIXES) else self.source
        return f"{name}:{self.number}"

    def text(self, column: str) -> str:
        """The text in `column`. Raises DataError when there is none, or something that is not text."""
        if column not in self.values:
            raise self.lacks(column)
        value = self.values[column]
        if not isinstance(value, str):
            raise self.error(f'"{column}" must be text, not {_kind(value)}')
        if not _is_unicode(value):
            raise self.error(f'"{column}" holds half of a surrogate pair, which is not text')
        return value

    def lacks(self, column: str) -> DataError:
        """The error to raise when there is no `column`."""
        has_header = self.source.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
        hint = "; the first line of the file must name the columns" if has_header else ""
        return self.error(f'the record lacks the field "{column}"{hint}')

    def error(self, problem: str) -> DataError:
        """The error to raise for this row."""
        return DataError(f"{self.source}: {self.place}: {problem}")


def read_rows(sources: Sequence[str | Path], split: str = "train", subset: str | None = None) -> list[Row]:
    """All rows of `sources`, as `iterate_rows` gives them."""
    return list(iterate_rows(sources, split, subset))


def iterate_rows(sources: Sequence[str | Path], split: str = "train", subset: str | None = None) -> Iterator[Row]:
    """The rows of `sources`, in the order of the sources and of the rows within them, one at a time: of all kinds of
    file but json, whose list is parsed as one, no more than a part is in memory.

    A json file holds one list of objects, a jsonl file one object per line; csv and tsv files start with a line that
    names the columns. All of these are UTF-8 and may be gzipped. Parquet files are read as they are. What is no file
    but reads "owner/name" is a data set on the Hugging Face hub: its `subset` (where it has several) and `split`,
    which files do not have.

    Raises DataError, naming file and line, for a source that is missing, empty, truncated or not what its name says.
    """
    for source in sources:
        yield from _hub_rows(str(source), split, subset) if is_on_hub(source) else _file_rows(Path(source))


def is_on_hub(source: str | Path) -> bool:
    """Whether a source is the id of a data set on the hub: "owner/name", unless that is a file, or named like one."""
    reads_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source), re.ASCII) and not Path(source).exists()
    return bool(reads_so) and not str(source).lower().endswith(SUFFIXES)


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever stands between here and the hub fails in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{name}: no such file, and the hub cannot give it as a data set ({reason}); name a local file with "
            f"--train-data, or fetch it where there is internet: hf download --repo-type dataset {name}"
        ) from None
    if not len(table):
        raise DataError(f"{name}: the split {split} holds no records")
    for number, values in enumerate(table, start=1):
        yield Row(name, f"row {number} of {split}", number, _as_text(values))


def _file_rows(path: Path) -> Iterator[Row]:
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(
            f"{path}: unknown kind of data file; use one that ends in {', '.join(SUFFIXES)}, "
            "or the id of a data set on the Hugging Face hub (owner/name)"
        )
    read = next(read for suffix, read in READERS.items() if name.removesuffix(".gz").endswith(suffix))
    is_empty = True
    try:
        with _open(path) as file:
            for number, place, item in read(file, path):
                yield _row(item, path, place, number)
                is_empty = False
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        if _starts_as_gzip(path):
            raise DataError(f"{path}: the gzip file is truncated or damaged; fetch it again") from None
        raise DataError(f"{path}: not a gzip file although its name ends in .gz") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if is_empty:
        raise DataError(f"{path}: the file holds no records")


def _row(item: object, path: Path, place: str, number: int) -> Row:
    if not isinstance(item, dict):
        raise DataError(f"{path}: {place}: a record must be an object, not {_kind(item)}")
    return Row(str(path), place, number, item)


def _open(path: Path) -> BinaryIO:
    check_regular(path)
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _starts_as_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _lines(file: BinaryIO, path: Path) -> Numbered:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield number, f"line {number}", _parse(_decode(line, path, number), path, number)


def _list_items(file: BinaryIO, path: Path) -> Numbered:
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
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(f"{path}: line {line}: not UTF-8 text; convert the file to UTF-8") from None


def _parse(text: str, path: Path, first_line: int, if_more_follows: str = "") -> object:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = if_more_follows if error.msg == "Extra data" else ""
        raise DataError(f"{path}: line {line}: not JSON ({error.msg}, column {error.colno}){hint}") from None
    except DataError as error:
        raise DataError(f"{path}: line {first_line}: {error}") from None
    except (RecursionError, ValueError):  # nesting or a number beyond what Python parses
        raise DataError(
            f"{path}: line {first_line}: JSON that is nested too deeply or holds too long a number"
        ) from None


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f"an object with two fields {shown(next(name for name in names if names.count(name) > 1))}")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_once_each)


def _delimited(file: BinaryIO, path: Path, dialect: str) -> Numbered:
    """Lines of csv or tsv below their header; a cell in quotes may go on over several lines."""
    cells_of_lines = _cells(_text_lines(file, path), path, dialect)
    line, header = next(cells_of_lines, (1, []))
    _check_names(header, f"{path}: line {line}: the header")
    for line, cells in cells_of_lines:
        if len(cells) != len(header):
            raise DataError(
                f"{path}: line {line}: {len(cells)} cells under a header of {len(header)} columns; "
                "a cell with the separator in it must stand in quotes"
            )
        yield line, f"line {line}", dict(zip(header, cells, strict=True))


def _text_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """The lines with their ends, be it \\n, \\r\\n or \\r."""
    number = 1
    try:
        for line in io.TextIOWrapper(file, encoding="utf-8-sig", newline=""):
            if "\0" in line:
                raise DataError(f"{path}: line {number}: a NUL byte, which no text has; fetch or write the file again")
            yield line
            number += 1
    except UnicodeDecodeError:  # it knows its place in a piece of the file only
        with _open(path) as whole:
            _decode(whole.read(), path, 1)


def _cells(lines: Iterator[str], path: Path, dialect: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of every row that is not blank."""
    reader = csv.reader(lines, dialect, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error:
            raise DataError(
                f"{path}: line {line}: a quote that is misplaced or never closed (a quote within a cell is doubled, "
                f"its cell quoted), or a cell of more than {csv.field_size_limit():,} characters"
            ) from None
        if cells:
            yield line, cells


def _check_names(names: Sequence[str], where: str) -> None:
    for position, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{where} does not name column {position + 1}")
        if name in names[:position]:
            raise DataError(f"{where} names two columns {shown(name)}")


def _parquet(file: BinaryIO, path: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(file)
        _check_names(table.schema_arrow.names, f"{path}: the schema")
        for batch in table.iter_batches(PARQUET_ROWS):
            for values in _values(batch):
                number += 1
                yield number, f"row {number}", _as_text(values)
    except UnicodeDecodeError:
        raise DataError(f"{path}: row {number + 1}: not UTF-8 text; write the file again") from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError):
        problem = "the parquet file is truncated or damaged" if _starts_as_parquet(path) else "not a parquet file"
        raise DataError(f"{path}: row {number + 1} cannot be read: {problem}; fetch it again") from None


def _values(batch: "pyarrow.RecordBatch") -> Iterator[dict[str, object]]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # once more, up to the row that it is about
        for row in range(batch.num_rows):
            yield from batch.slice(row, 1).to_pylist()


def _starts_as_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _as_text(values: dict[str, object]) -> dict[str, object]:
    """The cells of a typed table as those of a csv file: numbers, true and false are written out."""
    return {name: str(value) if isinstance(value, int | float) else value for name, value in values.items()}


def _is_unicode(text: str) -> bool:
    """JSON can spell lone surrogates ("\\ud800"), which no tokenizer and no UTF-8 file can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: object) -> str:
    """`value` on one line, and no longer than a message can bear."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    numbers = {int: "a number", float: "a number"}
    return (kinds | numbers).get(type(value), f"of the type {type(value).__name__}")


READERS: dict[str, Callable[[BinaryIO, Path], Numbered]] = {
    ".json": _list_items,
    ".jsonl": _lines,
    ".csv": partial(_delimited, dialect="excel"),
    ".tsv": partial(_delimited, dialect="excel-tab"),
    ".parquet": _parquet,
}
SUFFIXES = (*READERS, ".json.gz", ".jsonl.gz", ".csv.gz", ".tsv.gz")
