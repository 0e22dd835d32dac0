"""Records are read from every supported kind of file, and every malformed one is named with its line."""

import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from sora_hw.data.records import ChoiceRecord, Record, read_choices, read_questions, read_records
from sora_hw.errors import DataError

GOOD = {"instruction": "Is ice cold?", "input": "", "output": "the correct answer is true", "answer": "true"}
WANTED = Record("Is ice cold?", "", "the correct answer is true", "true", "q/7")


def write(folder, name, content):
    """Write `content` (text or bytes) under `name`, gzipped when the name says so."""
    content = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "A.JSONL"])
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    items = [{**GOOD, "id": "q/7", "task": "boolq", "label": 0}, {**GOOD, "instruction": "Is fire hot? ü"}]
    as_list = ".json" in name and ".jsonl" not in name
    text = json.dumps(items, indent=1) if as_list else "\n\n".join(map(json.dumps, items)) + "\n"
    first, second = read_records([write(tmp_path, name, text)])
    assert first == WANTED
    assert second.instruction == "Is fire hot? ü"
    assert second.id == (f"{name}:2" if as_list else f"{name}:3"), "the default id is the position or the line"


def test_files_are_concatenated_in_the_order_given(tmp_path):
    paths = [write(tmp_path, f"{n}.jsonl", json.dumps({**GOOD, "id": n})) for n in ("z", "a", "m")]
    assert [record.id for record in read_records(paths)] == ["z", "a", "m"]


def test_a_missing_input_is_empty_and_a_byte_order_mark_is_skipped(tmp_path):
    item = {key: GOOD[key] for key in ("instruction", "output", "answer")}
    path = write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + json.dumps(item).encode())
    assert read_records([path])[0].input == ""


def test_a_null_input_is_empty(tmp_path):
    assert read_records([write(tmp_path, "a.jsonl", json.dumps({**GOOD, "input": None}))])[0].input == ""


def test_every_kind_of_table_gives_the_same_records(tmp_path):
    columns = {"instruction": ["Is ice cold?", "1 + 1?"], "output": ["It is.", "2"], "answer": ["true", "2"]}
    wanted = [("Is ice cold?", "", "It is.", "true"), ("1 + 1?", "", "2", "2")]
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({**columns, "input": [None, ""]}), tmp_path / "input.parquet")
    write(tmp_path, "a.csv", "\n".join(map(",".join, rows)))
    write(tmp_path, "a.tsv.gz", "\r\n".join(map("\t".join, rows)))
    for name, first in (("a.parquet", 1), ("input.parquet", 1), ("a.csv", 2), ("a.tsv.gz", 2)):
        records = read_records([tmp_path / name])
        assert [(record.instruction, record.input, record.output, record.answer) for record in records] == wanted
        assert [record.id for record in records] == [f"{name}:{first}", f"{name}:{first + 1}"]


def test_numbers_in_a_typed_table_are_text(tmp_path):
    table = {"id": [0, 7], "instruction": ["2?", "1.5?"], "output": [2, 3], "answer": [2.0, 1.5]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    assert read_records([tmp_path / "a.parquet"]) == [
        Record("2?", "", "2", "2.0", "0"),
        Record("1.5?", "", "3", "1.5", "7"),
    ]


METAMATH = {
    "type": "GSM_Rephrased",
    "query": "What is 3 + 4?",
    "original_question": "What is four and three?",
    "response": "The answer is: not given. It is $3 + 4 = 7$.\n#### 7\nThe answer is: 7 \n",
}


def test_metamaths_columns(tmp_path):
    path = write(tmp_path, "a.json", json.dumps([METAMATH, METAMATH | {"response": "The answer is:\\frac{1}{2}"}]))
    assert read_records([path]) == [
        Record("What is 3 + 4?", "", METAMATH["response"], "7", "a.json:1"),
        Record("What is 3 + 4?", "", "The answer is:\\frac{1}{2}", "\\frac{1}{2}", "a.json:2"),
    ]


def test_a_record_with_an_instruction_is_not_metamaths(tmp_path):
    assert read_records([write(tmp_path, "a.jsonl", json.dumps(GOOD | METAMATH | {"id": "q/7"}))]) == [WANTED]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": "It is 7."}, '"response" must end with "The answer is:" and the answer'),
        ({"response": "The answer is: 7. The answer is: \n"}, '"response" must end with "The answer is:"'),
        ({"response": " "}, '"response" is empty'),
        ({"query": ""}, '"query" is empty'),
        ({"query": None}, '"query" must be text, not null'),
        ({"response": 7}, '"response" must be text, not a number'),
    ],
)
def test_malformed_metamath_rows_are_named(tmp_path, change, message):
    path = write(tmp_path, "a.jsonl", json.dumps(METAMATH) + "\n" + json.dumps(METAMATH | change))
    with pytest.raises(DataError, match=f"a.jsonl: line 2: {message}"):
        read_records([path])
    lacking = {name: text for name, text in METAMATH.items() if name != "response"}
    with pytest.raises(DataError, match='line 1: the record lacks the field "response"'):
        read_records([write(tmp_path, "b.jsonl", json.dumps(lacking))])


def test_a_data_set_of_the_hub(monkeypatch):
    import datasets

    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([METAMATH, METAMATH | {"query": "And again?"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read_records(["meta-math/MetaMathQA"])
    assert [(record.instruction, record.answer) for record in records] == [("What is 3 + 4?", "7"), ("And again?", "7")]
    assert [record.id for record in records] == ["meta-math/MetaMathQA:1", "meta-math/MetaMathQA:2"]
    assert asked == [(("meta-math/MetaMathQA", None), {"split": "train"})]


GOOD_LINE = json.dumps(GOOD) + "\n"
BROKEN = {
    "empty.jsonl": ("", "empty.jsonl: the file holds no records"),
    "blank.jsonl": (" \n\n", "holds no records"),
    "empty.json": ("", "holds no records"),
    "none.json": ("[]", "holds no records"),
    "empty.jsonl.gz": ("", "holds no records"),
    "text.jsonl": (GOOD_LINE + "\nnot json\n", "line 3: not JSON"),
    "cut.json": ('[\n{"instruction": "a",\n', "line 3: not JSON"),
    "text.json": ("hello", "line 1: not JSON"),
    "lines.json": (GOOD_LINE, "must hold one list"),
    "latin.jsonl": (GOOD_LINE.encode() * 2 + "é".encode("latin-1"), "line 3: not UTF-8"),
    "latin.json": (b"[\n\n\xff]", "line 3: not UTF-8"),
    "list.jsonl": (GOOD_LINE + "[1]", "line 2: a record must be an object, not a list"),
    "number.json": ("[1]", "record 1: a record must be an object, not a number"),
    "no_output.jsonl": (json.dumps({"instruction": "a", "answer": "b"}), 'line 1: the record lacks the field "output"'),
    "no_answer.json": (
        json.dumps([GOOD, {"instruction": "a", "output": "b"}]),
        'record 2: .* lacks the field "answer"',
    ),
    "no_question.jsonl": (json.dumps({"output": "a", "answer": "b"}), 'lacks the field "instruction"'),
    "type.jsonl": (json.dumps({**GOOD, "answer": 3}), '"answer" must be text, not a number'),
    "null.jsonl": (json.dumps({**GOOD, "output": None}), '"output" must be text, not null'),
    "list_input.jsonl": (json.dumps({**GOOD, "input": []}), '"input" must be text, not a list'),
    "bare.jsonl": (json.dumps({**GOOD, "output": " "}), '"output" is empty'),
    "surrogate.jsonl": (json.dumps({**GOOD, "output": "\ud800"}), "surrogate"),
    "deep.json": ("[" * 100_000, "line 1: .*nested"),
    "long.jsonl": ("9" * 10_000, "line 1: .*too long a number"),
    "data.xlsx": ("a,b", "unknown kind of data file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_their_line(tmp_path, name):
    content, message = BROKEN[name]
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as error:
        read_records([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such data file"):
        read_records([tmp_path / "gone.jsonl"])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl: cannot be read"):
        read_records([tmp_path / "folder.jsonl"])


def test_damaged_gzip_files_are_named(tmp_path):
    whole = gzip.compress((GOOD_LINE * 50).encode())
    for name, content, message in (
        ("cut.jsonl.gz", whole[:-20], "truncated or damaged"),
        ("flipped.jsonl.gz", whole[:12] + b"\xff\xff\xff" + whole[15:], "truncated or damaged"),
        ("checksum.jsonl.gz", whole[:-8] + b"\0\0\0\0" + whole[-4:], "truncated or damaged"),
        ("followed.jsonl.gz", whole + b"more", "truncated or damaged"),
        ("plain.jsonl.gz", GOOD_LINE.encode(), "not a gzip file"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_records([path])


def test_lines_under_the_name_of_a_list_are_told_their_name(tmp_path):
    (tmp_path / "lines.json").write_text(GOOD_LINE * 2)
    with pytest.raises(DataError, match=r"not JSON \(Extra data, .*name a file of one record per line \.jsonl"):
        read_records([tmp_path / "lines.json"])


def test_questions_need_no_output(tmp_path):
    rows = [{"instruction": "1 + 1?", "answer": 2.0, "id": "a"}, {"instruction": "x?", "input": "y", "answer": " 3 "}]
    file = tmp_path / "test.json"
    file.write_text(json.dumps(rows))
    seen = []
    assert read_questions(file, seen.append) == [
        Record("1 + 1?", "", "", "2.0", "a"),
        Record("x?", "y", "", "3", "test.json:2"),
    ]
    assert seen == ["2.0", "3"]


def test_an_answer_that_cannot_be(tmp_path):
    def check(answer: str) -> None:
        raise ValueError("a colour")

    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"instruction": "which?", "answer": "2"}))
    with pytest.raises(DataError, match=r"test\.jsonl: line 1: \"answer\" must be a colour, not '2'"):
        read_questions(file, check)


CHOICE = {"question": "which?", "choices": ["a", "b"], "label": 1, "id": "one"}


def test_choices(tmp_path):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(CHOICE))
    assert read_choices(file) == [ChoiceRecord("which?", ("a", "b"), 1, "one")]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"choices": ["a"]}, '"choices" must be a list of at least two texts'),
        ({"choices": "ab"}, '"choices" must be a list of at least two texts'),
        ({"choices": ["a", ""]}, '"choices" must be a list of at least two texts'),
        ({"label": 2}, '"label" must be a number from 0 to 1, not 2'),
        ({"label": True}, '"label" must be a number from 0 to 1, not True'),
        ({"label": "1"}, "\"label\" must be a number from 0 to 1, not '1'"),
        ({"question": " "}, '"question" is empty'),
    ],
)
def test_choices_that_cannot_be_asked(tmp_path, changed, message):
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({**CHOICE, **changed}))
    with pytest.raises(DataError, match=message):
        read_choices(file)
