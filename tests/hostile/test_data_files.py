"""Malformed files of training and test data, in every format that is read."""

import csv
import gzip
import io
import json
import os
import struct

import pyarrow
import pytest
from pyarrow import parquet

GOOD = {"instruction": "Is 7 even?", "input": "", "output": "the answer is false", "answer": "false"}
SENTENCE = {"sentence": "It rains.", "label": 1}
LINE = json.dumps(GOOD).encode()


def lines(*records: object) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


def table(*rows: dict) -> bytes:
    written = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), written)
    return written.getvalue()


def column(name: str, array: pyarrow.Array) -> bytes:
    written = io.BytesIO()
    columns = {key: pyarrow.array([value] * len(array)) for key, value in GOOD.items() if key != name}
    parquet.write_table(pyarrow.table({**columns, name: array}), written)
    return written.getvalue()


def cells(*rows: tuple, delimiter: str = ",") -> bytes:
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter).writerows(rows)
    return written.getvalue().encode()


HEADER = tuple(GOOD)
ROW = tuple(GOOD.values())
PARQUET = table(GOOD, GOOD)
DEEP = b"[" * 200_000
VALUES = {
    "null": None,
    "true": True,
    "number": 7,
    "fraction": 0.5,
    "infinite": float("inf"),
    "nan": float("nan"),
    "list": ["a"],
    "object": {"a": "b"},
    "empty": "",
    "blank": " \n\t",
    "surrogate": "\ud800",
}
NOT_JSON = {
    "text": b"hello",
    "half": LINE[: len(LINE) // 2],
    "brace": b"{",
    "bracket": b"[",
    "quote": b'"',
    "comma": b'{"instruction": "a",}',
    "single-quotes": str(GOOD).encode(),
    "two": LINE + LINE,
    "comment": b"// a\n" + LINE,
    "nul": LINE[:20] + b"\0" + LINE[20:],
    "nuls": b"\0" * 100_000,
    "control": b'{"instruction": "a\x01b"}',
    "escape": rb'{"instruction": "\x41"}',
    "half-escape": rb'{"instruction": "\u00"}',
    "latin-1": json.dumps({**GOOD, "answer": "é"}, ensure_ascii=False).encode("latin-1"),
    "utf-16": json.dumps(GOOD).encode("utf-16"),
    "utf-32": json.dumps(GOOD).encode("utf-32"),
    "cut-utf-8": LINE + "é".encode()[:1],
    "overlong-utf-8": LINE[:-1] + b', "x": "\xc0\xaf"}',
    "surrogate-utf-8": LINE[:-1] + b', "x": "\xed\xa0\x80"}',
    "two-marks": b"\xef\xbb\xbf\xef\xbb\xbf" + LINE,
    "deep-list": DEEP,
    "deep-object": b'{"a":' * 100_000,
    "deep-value": LINE[:-1] + b', "x": ' + DEEP,
    "long-number": LINE[:-1] + b', "x": ' + b"9" * 5000 + b"}",
    "gzip": gzip.compress(LINE),
    "zip": b"PK\x03\x04" + bytes(26),
    "pickle": b"\x80\x04\x95" + bytes(20) + b".",
    "random": bytes(range(256)) * 40,
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}
FILES: dict[str, bytes] = {
    **{f"{name}.jsonl": content for name, content in NOT_JSON.items()},
    **{f"{name}.json": content for name, content in NOT_JSON.items() if name != "gzip"},
    "empty.jsonl": b"",
    "empty.json": b"",
    "empty.csv": b"",
    "empty.tsv": b"",
    "empty.parquet": b"",
    "blank.jsonl": b"\n \n\t\n",
    "blank.csv": b"\n\n",
    "mark-alone.csv": b"\xef\xbb\xbf",
    "no-records.json": b"[]",
    "one-object.json": LINE,
    "objects-in-lines.json": LINE + b"\n" + LINE,
    "list-of-lists.json": b"[[1]]",
    "list-of-texts.json": b'["a"]',
    "list-of-null.json": b"[null]",
    "list-in-line.jsonl": b"[" + LINE + b"]",
    "text-in-line.jsonl": b'"a"',
    "number-in-line.jsonl": b"7",
    "null-in-line.jsonl": b"null",
    "nan-in-line.jsonl": b"NaN",
    "no-fields.jsonl": b"{}",
    "second-line.jsonl": lines(GOOD, GOOD, {}),
    "twice.jsonl": LINE[:-1] + b', "answer": "true"}',
    "twice-within.jsonl": LINE[:-1] + b', "x": {"a": 1, "a": 2}}',
    **{f"lacks-{name}.jsonl": lines(without(name)) for name in GOOD if name != "input"},
    **{
        f"{kind}-{name}.jsonl": lines({**GOOD, name: value})
        for name in ("instruction", "output", "answer", "input")
        for kind, value in VALUES.items()
        if (name, kind) not in {("answer", "empty"), ("answer", "blank")}
        and not (name == "input" and kind in ("null", "empty", "blank"))
    },
    "no-answer-in-response.jsonl": lines({"query": "What is 1 + 1?", "response": "It is 2."}),
    "empty-answer-in-response.jsonl": lines({"query": "What is 1 + 1?", "response": "The answer is: "}),
    "number-as-query.jsonl": lines({"query": 7, "response": "The answer is: 1"}),
    "header-alone.csv": cells(HEADER),
    "header-missing.csv": cells(ROW),
    "header-empty-name.csv": cells(("instruction", "", "answer"), ("a", "b", "c")),
    "header-twice.csv": cells((*HEADER, "answer"), (*ROW, "true")),
    "short-row.csv": cells(HEADER, ROW[:2]),
    "long-row.csv": cells(HEADER, (*ROW, "more")),
    "open-quote.csv": cells(HEADER) + b'"a,b,c,d\n',
    "quote-within.csv": cells(HEADER) + b'"a"b,c,d,e\n',
    "huge-cell.csv": cells(HEADER, ("a" * 200_000, "", "b", "c")),
    "nul.csv": cells(HEADER, ("a\0b", "", "c", "d")),
    "latin-1.csv": cells(HEADER) + "é,,b,c\n".encode("latin-1"),
    "utf-16.csv": cells(HEADER, ROW).decode().encode("utf-16"),
    "commas.tsv": cells(HEADER, ROW),
    "tabs.csv": cells(HEADER, ROW, delimiter="\t"),
    "empty-instruction.csv": cells(HEADER, ("", "", "b", "c")),
    "lacks-answer.tsv": cells(HEADER[:3], ROW[:3], delimiter="\t"),
    "text.parquet": b"hello",
    "lines.parquet": LINE,
    "magic-alone.parquet": b"PAR1",
    "magic-twice.parquet": b"PAR1PAR1",
    "cut.parquet": PARQUET[:-20],
    "beginning-cut.parquet": PARQUET[20:],
    "middle-cut.parquet": PARQUET[:40] + PARQUET[60:],
    "middle-flipped.parquet": PARQUET[:20] + bytes(byte ^ 0xFF for byte in PARQUET[20:80]) + PARQUET[80:],
    "footer-too-long.parquet": PARQUET[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "footer-nothing.parquet": PARQUET[:-8] + struct.pack("<I", 0) + b"PAR1",
    "no-rows.parquet": table(),
    "lacks-output.parquet": table(without("output")),
    "null.parquet": table({**GOOD, "output": None}),
    "list.parquet": table({**GOOD, "output": ["a"]}),
    "object.parquet": table({**GOOD, "output": {"a": 1}}),
    "binary.parquet": column("output", pyarrow.array([b"\xff\xfe"])),
    "date.parquet": column("output", pyarrow.array([0], pyarrow.date32())),
    "far-date.parquet": column("output", pyarrow.array([2**60], pyarrow.timestamp("ms"))),
    "decimal.parquet": column("output", pyarrow.array([1], pyarrow.decimal128(38))),
    "half-gzip.jsonl.gz": gzip.compress(LINE * 500)[:-30],
    "flipped-gzip.jsonl.gz": gzip.compress(LINE * 500)[:60] + b"\xff\xff" + gzip.compress(LINE * 500)[62:],
    "trailing-gzip.jsonl.gz": gzip.compress(LINE) + b"more",
    "no-gzip.jsonl.gz": LINE,
    "empty.jsonl.gz": b"",
    "nothing-in-gzip.jsonl.gz": gzip.compress(b""),
    "gzip-in-gzip.jsonl.gz": gzip.compress(gzip.compress(LINE)),
    "bomb.jsonl.gz": gzip.compress(b" " * 30_000_000 + b"x"),
    "gzip.csv.gz": gzip.compress(cells(HEADER, ROW[:1])),
    "gzip.parquet": gzip.compress(PARQUET),
    "table.xlsx": b"PK\x03\x04",
    "records.txt": LINE,
    "records": LINE,
    "records.jsonl.zip": LINE,
    "records.jsonl.bz2": LINE,
    "records.pkl": LINE,
    "records.pt": LINE,
}


@pytest.mark.parametrize("name", FILES)
def test_a_malformed_file_is_named(folder, refused, name):
    (folder / name).write_bytes(FILES[name])
    assert name in refused("commonsense", "--backend", "cpu", "--train-data", name)


@pytest.mark.parametrize(
    "name", ["gone.jsonl", "folder.jsonl", "pipe.jsonl", "endless.jsonl", "loop.csv", "dangling.json"]
)
def test_what_is_no_file_is_named_and_not_waited_for(folder, refused, name):
    (folder / "folder.jsonl").mkdir()
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "endless.jsonl").symlink_to("/dev/zero")
    (folder / "loop.csv").symlink_to("loop.csv")
    (folder / "dangling.json").symlink_to("nowhere.json")
    assert name in refused("commonsense", "--backend", "cpu", "--train-data", name)


LABELS = {"null": None, "true": True, "minus-one": -1, "two": 2, "text": "yes", "half": 0.5, "nan": float("nan")}
LABELS |= {"infinite": float("inf"), "huge": 10**400, "list": [1], "object": {}, "empty": "", "spelled-nan": "nan"}


@pytest.mark.parametrize("label", LABELS)
def test_a_label_that_the_task_has_not(folder, refused, label):
    (folder / "a.jsonl").write_bytes(lines(SENTENCE, {**SENTENCE, "label": LABELS[label]}))
    line = refused(
        "glue",
        "--backend",
        "cpu",
        "--model",
        "embedded",
        "--modules-to-save",
        "score",
        "--target-modules",
        "q_proj",
        "--task",
        "cola",
        "--train-data",
        "a.jsonl",
    )
    assert "a.jsonl: line 2" in line and "label" in line


QUESTION = {"instruction": "Is 7 even?", "answer": "false", "question": "is 7 even?", "choices": ["true", "false"]}
QUESTION["label"] = 1
QUESTIONS = {
    "answer": [None, True, [], {}, "maybe", "", float("nan"), 10**30],
    "label": [None, True, -1, 2, 0.5, "1", float("nan"), 10**30],
    "choices": [None, "true", [], ["true"], ["true", 1], ["true", ""], {"true": 1}],
    "question": [None, 7, "", "\ud800"],
    "instruction": [None, 7, " ", []],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in QUESTIONS.items() for value in values]
)
def test_a_malformed_question(folder, refused, field, value):
    (folder / "boolq.test.jsonl").write_bytes(lines(QUESTION, {**QUESTION, field: value}))
    protocol = "generation" if field in ("answer", "instruction") else "likelihood"
    line = refused(
        "score", "--backend", "cpu", "--model", "embedded", "--data", ".", "--tasks", "boolq", "--protocol", protocol
    )
    assert "boolq.test.jsonl: line 2" in line and field in line
