"""GLUE's sentences, pairs, labels and scores, in the hub's columns and in ours, and every malformed row by its line."""

import json
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from sora_hw.data.glue import TASKS, SentenceRecord, read_sentences
from sora_hw.errors import DataError

HUB_COLUMNS = {
    "rte": ["sentence1", "sentence2"],
    "mrpc": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
}
PAIRS = [name for name, columns in HUB_COLUMNS.items() if len(columns) == 2]


def lines_file(folder, *items):
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, items)))
    return path


def test_the_tasks_are_those_of_the_paper():
    assert {name: list(task.columns) for name, task in TASKS.items()} == HUB_COLUMNS
    assert all(task.name == name for name, task in TASKS.items())
    assert {name: task.metric for name, task in TASKS.items() if task.metric != "accuracy"} == {
        "cola": "matthews",
        "stsb": "pearson",
    }
    assert {name: task.labels for name, task in TASKS.items() if task.labels != 2} == {"stsb": 1}


@pytest.mark.parametrize("name", TASKS)
def test_rows_in_the_hubs_columns(tmp_path, name):
    texts = [f"text {number} " for number, _ in enumerate(HUB_COLUMNS[name])]
    row = dict(zip(HUB_COLUMNS[name], texts, strict=True))
    path = lines_file(tmp_path, row | {"label": 1, "idx": 7}, row | {"label": 0, "id": "mine"})
    first, second = read_sentences([path], TASKS[name])
    wanted = (texts[0], texts[1] if len(texts) == 2 else None)
    assert first == SentenceRecord(*wanted, 1, "data.jsonl:1")
    assert second == SentenceRecord(*wanted, 0, "mine")
    assert type(first.label) is (float if name == "stsb" else int)


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_may_be_called_sentence1_and_sentence2(tmp_path, name):
    path = lines_file(tmp_path, {"sentence1": "a", "sentence2": "b", "label": 1})
    assert read_sentences([path], TASKS[name]) == [SentenceRecord("a", "b", 1, "data.jsonl:1")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize(("name", "labels"), [("rte", [0, 1]), ("stsb", [3.8, 0.0, 5.0])])
def test_tables_give_the_same_labels(tmp_path, kind, name, labels):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        columns = {"sentence1": ["a"] * len(labels), "sentence2": ["b"] * len(labels), "label": labels}
        parquet.write_table(pyarrow.table(columns), path)
    else:
        rows = [["sentence1", "sentence2", "label"], *(["a", "b", str(label)] for label in labels)]
        path.write_text("\n".join({"csv": ",", "tsv": "\t"}[kind].join(row) for row in rows))
    records = read_sentences([path], TASKS[name])
    assert [record.label for record in records] == labels
    assert [type(record.label) for record in records] == [type(label) for label in labels]


def test_one_side_of_a_pair_may_be_empty(tmp_path):
    path = lines_file(tmp_path, {"question1": "What?", "question2": "", "label": 0})
    assert read_sentences([path], TASKS["qqp"])[0].second == ""


PAIR = {"sentence1": "a", "sentence2": "b", "label": 1}
MALFORMED = [
    ("rte", {"sentence1": "a", "label": 1}, 'lacks the field "sentence2"'),
    ("rte", {"sentence1": "a", "sentence2": "b"}, 'lacks the field "label"'),
    ("cola", PAIR, 'lacks the field "sentence"'),
    ("qnli", {"sentence": "a", "label": 1}, 'lacks the field "question"'),
    ("qqp", {"question1": "a", "sentence2": "b", "label": 1}, 'lacks the field "question2"'),
    ("sst2", {"sentence": None, "label": 1}, '"sentence" must be text, not null'),
    ("sst2", {"sentence": 7, "label": 1}, '"sentence" must be text, not a number'),
    ("sst2", {"sentence": ["a"], "label": 1}, '"sentence" must be text, not a list'),
    ("sst2", {"sentence": "\ud800", "label": 1}, "surrogate"),
    ("sst2", {"sentence": " ", "label": 1}, '"sentence" is empty'),
    ("rte", {"sentence1": "", "sentence2": " ", "label": 1}, '"sentence1" is empty'),
    ("rte", PAIR | {"label": -1}, '"label" is -1: the row has no label, as in the test split on the hub'),
    ("stsb", PAIR | {"label": -1.0}, '"label" is -1: the row has no label'),
    ("rte", PAIR | {"label": 2}, '"label" must be 0 or 1, not 2'),
    ("rte", PAIR | {"label": 10**400}, '"label" must be 0 or 1, not 1000'),
    ("rte", PAIR | {"label": 1.0}, '"label" must be 0 or 1, not 1.0'),
    ("rte", PAIR | {"label": "1.0"}, "\"label\" must be 0 or 1, not '1.0'"),
    ("rte", PAIR | {"label": "entailment"}, "\"label\" must be 0 or 1, not 'entailment'"),
    ("rte", PAIR | {"label": ""}, "\"label\" must be 0 or 1, not ''"),
    ("rte", PAIR | {"label": "1\n" * 99}, '"label" must be 0 or 1, not '),
    ("rte", PAIR | {"label": True}, '"label" must be 0 or 1, not True'),
    ("rte", PAIR | {"label": None}, '"label" must be 0 or 1, not None'),
    ("rte", PAIR | {"label": [1]}, '"label" must be 0 or 1, not [1]'),
    ("stsb", PAIR | {"label": 5.01}, '"label" must be a number from 0 to 5, not 5.01'),
    ("stsb", PAIR | {"label": -0.1}, '"label" must be a number from 0 to 5, not -0.1'),
    ("stsb", PAIR | {"label": float("nan")}, '"label" must be a number from 0 to 5, not nan'),
    ("stsb", PAIR | {"label": "inf"}, "\"label\" must be a number from 0 to 5, not 'inf'"),
    ("stsb", PAIR | {"label": "high"}, "\"label\" must be a number from 0 to 5, not 'high'"),
    ("stsb", PAIR | {"label": False}, '"label" must be a number from 0 to 5, not False'),
]


@pytest.mark.parametrize(("name", "item", "message"), MALFORMED)
def test_malformed_rows_are_named_with_their_line(tmp_path, name, item, message):
    good = dict.fromkeys(HUB_COLUMNS[name], "good") | {"label": 1}
    with pytest.raises(DataError) as error:
        read_sentences([lines_file(tmp_path, good, item)], TASKS[name])
    assert str(error.value).startswith(f"{tmp_path / 'data.jsonl'}: line 2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 150


def test_a_table_without_a_header_is_told_what_its_first_line_is_for(tmp_path):
    (tmp_path / "a.tsv").write_text("It is.\t1\nIs it?\t0\n")
    with pytest.raises(DataError, match=r'line 2: .*lacks the field "sentence"; the first line .* name the columns'):
        read_sentences([tmp_path / "a.tsv"], TASKS["cola"])


def test_the_hubs_subset_is_the_tasks(monkeypatch):
    import datasets

    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
            "idx": datasets.Value("int32"),
        }
    )
    rows = [{"question": "a?", "sentence": "b", "label": label, "idx": 0} for label in (1, 0, -1)]
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(rows[: 3 if options["split"] == "test" else 2], features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read_sentences(["nyu-mll/glue"], TASKS["qnli"], "validation")
    assert records == [SentenceRecord("a?", "b", label, f"nyu-mll/glue:{2 - label}") for label in (1, 0)]
    assert asked == [(("nyu-mll/glue", "qnli"), {"split": "validation"})]
    with pytest.raises(DataError, match='nyu-mll/glue: row 3 of test: "label" is -1'):
        read_sentences(["nyu-mll/glue"], TASKS["qnli"], "test")


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "train", "test"), [("rte", 1500, 160), ("cola", 1500, 400), ("sst2", 1500, 400), ("stsb", 1500, 400)]
)
def test_real_files(shared_data, name, train, test):
    folder, task = shared_data / "glue", TASKS[name]
    records = read_sentences([folder / f"{name}.train.jsonl.gz"], task)
    held_out = read_sentences([folder / f"{name}.test.jsonl.gz"], task)
    assert (len(records), len(held_out)) == (train, test)
    assert len({record.id for record in records + held_out}) == train + test
    assert all((record.second is None) == (name in ("cola", "sst2")) for record in records)
    labels = Counter(record.label for record in records)
    if name == "stsb":
        assert (min(labels), max(labels)) == (0.0, 5.0) and set(map(type, labels)) == {float}
    else:
        assert set(labels) == {0, 1} and min(labels.values()) > 300
