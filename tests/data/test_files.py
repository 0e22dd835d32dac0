"""Rows of tables and of the hub: cells with anything in them, and every malformed source named with its line."""

import csv
import gzip
import io
import os
import random
import subprocess
import sys

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from sora_hw.data.files import PARQUET_ROWS, read_rows
from sora_hw.errors import DataError


def write(folder, name, content):
    """Write `content` (text or bytes) under `name`, gzipped when the name says so."""
    content = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def refusal(path) -> str:
    """The one line that the source is refused with."""
    with pytest.raises(DataError) as error:
        read_rows([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


BY_HAND = (
    'instruction,output,"ans,wer"\r\n'
    '"Is ice ""cold""?\nSay so.",true,\r\n'
    "\r\n"
    '  spaces , a " in the middle ,"ü, 世界\r\n"\r\n'
    "last,line,without an end"
)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz", "A.CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte_order_mark"])
def test_cells_hold_quotes_separators_and_line_ends(tmp_path, name, mark):
    text = BY_HAND.replace(",", "\t") if "tsv" in name else BY_HAND
    separator = "\t" if "tsv" in name else ","
    rows = read_rows([write(tmp_path, name, mark + text)])
    third = f"ans{separator}wer"
    assert [row.values for row in rows] == [
        {"instruction": 'Is ice "cold"?\nSay so.', "output": "true", third: ""},
        {"instruction": "  spaces ", "output": ' a " in the middle ', third: f"ü{separator} 世界\r\n"},
        {"instruction": "last", "output": "line", third: "without an end"},
    ]
    assert [row.place for row in rows] == ["line 2", "line 5", "line 7"], "where the rows begin"
    assert [row.id for row in rows] == [f"{name}:2", f"{name}:5", f"{name}:7"]
    assert {row.source for row in rows} == {str(tmp_path / name)}


TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)
CELLS = st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(TEXT, min_size=width, max_size=width), min_size=1))


# The writer quotes the characters of its own line end alone, so a bare one of another kind needs quotes everywhere.
STYLES = [("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL), ("\r", csv.QUOTE_ALL)]


@given(CELLS, st.sampled_from(["csv", "tsv"]), st.sampled_from(STYLES))
def test_whatever_is_written_as_csv_is_read_again(tmp_path_factory, table, kind, style):
    header = [f"column {number}" for number in range(len(table[0]))]
    written = io.StringIO(newline="")
    separator, (line_end, quoting) = {"csv": ",", "tsv": "\t"}[kind], style
    csv.writer(written, delimiter=separator, lineterminator=line_end, quoting=quoting).writerows([header, *table])
    path = tmp_path_factory.getbasetemp() / f"round_trip.{kind}"
    path.write_bytes(written.getvalue().encode())
    assert [list(row.values.values()) for row in read_rows([path])] == table


HEADER = "a,b\n"
BROKEN = {
    "empty.csv": ("", "the file holds no records"),
    "blank.tsv": ("\n\n", "the file holds no records"),
    "header.csv": (HEADER, "the file holds no records"),
    "empty.csv.gz": ("", "the file holds no records"),
    "many.csv": (HEADER + "1,2\n\n1,2,3\n", "line 4: 3 cells under a header of 2 columns; a cell with the separator"),
    "few.csv": (HEADER + '"1\n1",2\n1\n', "line 4: 1 cells under a header of 2 columns"),
    "few.tsv": ("a\tb\n1,2\n", "line 2: 1 cells under a header of 2 columns"),
    "twice.csv": ("a,b,a\n1,2,3\n", "line 1: the header names two columns 'a'"),
    "long.csv": (f"{'x' * 999},{'x' * 999}\n", "the header names two columns 'xxx"),
    "nameless.csv": ("\na,,c\n1,2,3\n", "line 2: the header does not name column 2"),
    "nul.csv": (HEADER + "1,2\n\x001,2\n", "line 3: a NUL byte"),
    "open.csv": (HEADER + '1,2\n1,"2\n3,4\n', "line 3: a quote that is misplaced or never closed"),
    "open_header.csv": ('a,"b\n1,2\n', "line 1: a quote that is misplaced or never closed"),
    "after.csv": (HEADER + '1,"2"3\n', "line 2: a quote that is misplaced or never closed"),
    "endless.csv": (HEADER + "1," + "2" * 200_000, "line 2: .*a cell of more than 131,072 characters"),
    "latin.csv": ((HEADER + "1,2\né,2\n").encode("latin-1"), "line 3: not UTF-8"),
    "wide.csv": (HEADER.encode("utf-16"), "line 1: not UTF-8"),
    "empty.parquet": (b"", "row 1 cannot be read: not a parquet file"),
    "text.parquet": (HEADER, "row 1 cannot be read: not a parquet file"),
    "cut.parquet": (b"PAR1" + b"\0" * 100, "row 1 cannot be read: the parquet file is truncated or damaged"),
    "data.txt": (HEADER, "unknown kind of data file; use one that ends in .json, .jsonl, .csv, .tsv, .parquet, "),
    "data.parquet.gz": (b"", "unknown kind of data file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_their_line(tmp_path, name):
    content, message = BROKEN[name]
    line = refusal(write(tmp_path, name, content))
    assert message.split(".*")[0] in line and message.split(".*")[-1] in line
    assert len(line) < len(str(tmp_path)) + 250


@pytest.mark.parametrize("suffix", [".csv", ".tsv.gz", ".parquet"])
def test_a_missing_file_and_a_folder_are_named(tmp_path, suffix):
    assert refusal(tmp_path / f"gone{suffix}").endswith(f"gone{suffix}: no such data file")
    (tmp_path / f"folder{suffix}").mkdir()
    assert "cannot be read" in refusal(tmp_path / f"folder{suffix}")


def test_a_damaged_gzip_file_is_named(tmp_path):
    whole = gzip.compress((HEADER + "1,2\n" * 50).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-10])
    assert "truncated or damaged" in refusal(tmp_path / "cut.csv.gz")
    (tmp_path / "plain.tsv.gz").write_text(HEADER)
    assert "not a gzip file" in refusal(tmp_path / "plain.tsv.gz")


def test_a_parquet_files_cells_become_text(tmp_path):
    columns = {
        "instruction": ["Is ice cold?", "世界\n\0", None],
        "answer": pyarrow.array([1, -2, None]),
        "score": pyarrow.array([3.8, 0.5, 1e-7], pyarrow.float32()),
        "true": [True, False, None],
        "list": [["a"], [], None],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = read_rows([tmp_path / "a.parquet"])
    assert [row.values["instruction"] for row in rows] == columns["instruction"]
    assert [row.values["answer"] for row in rows] == ["1", "-2", None]
    assert [float(row.values["score"]) for row in rows] == columns["score"].to_pylist()
    assert [row.values["true"] for row in rows] == ["True", "False", None]
    assert [row.values["list"] for row in rows] == columns["list"]
    assert [row.place for row in rows] == ["row 1", "row 2", "row 3"]
    assert [row.id for row in rows] == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]


def test_rows_are_numbered_through_the_parts_of_a_parquet_file(tmp_path):
    numbers = list(range(2 * PARQUET_ROWS + 10))
    parquet.write_table(pyarrow.table({"n": numbers}), tmp_path / "a.parquet", row_group_size=1000)
    rows = read_rows([tmp_path / "a.parquet"])
    assert [row.values["n"] for row in rows] == list(map(str, numbers))
    assert [row.number for row in rows] == [number + 1 for number in numbers]


def test_malformed_parquet_files_are_named_with_their_row(tmp_path):
    latin = pyarrow.array([b"good"] * 5000 + ["é".encode("latin-1")] + [b"good"] * 9).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    assert "row 5001: not UTF-8 text" in refusal(tmp_path / "latin.parquet")
    two = pyarrow.table([["1"], ["2"]], names=["a", "a"])
    parquet.write_table(two, tmp_path / "two.parquet")
    assert "the schema names two columns 'a'" in refusal(tmp_path / "two.parquet")
    parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet")
    assert "holds no records" in refusal(tmp_path / "none.parquet")


def test_a_damaged_part_of_a_parquet_file_is_named_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text {number}" for number in range(3 * PARQUET_ROWS)]})
    parquet.write_table(table, path, row_group_size=PARQUET_ROWS, use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    start = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 50] = b"\xff" * 50
    path.write_bytes(content)
    assert "cannot be read: the parquet file is truncated or damaged; fetch it again" in refusal(path)


def test_a_parquet_file_cut_anywhere_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for size in random.Random(0).sample(range(len(whole)), 40):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        assert "cannot be read" in refusal(tmp_path / "cut.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub: `datasets` reads "owner/name" from the folder of that name within it."""
    import datasets

    load = datasets.load_dataset
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, subset, split: load(str(tmp_path / "hub" / name), subset, split=split, cache_dir=cache),
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def upload(folder, subset, split, rows):
    """Put a subset's split into a data set's folder as the hub's data sets have it: parquet, listed in the README."""
    (folder / subset).mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / subset / f"{split}.parquet")
    subsets = sorted(each.name for each in folder.iterdir() if each.is_dir())
    listed = "".join(f"- config_name: {each}\n  data_dir: {each}\n" for each in subsets)
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")


def test_a_data_set_of_the_hub_is_read_by_subset_and_split(hub):
    upload(hub / "owner" / "name", "rte", "train", [{"text": "a", "label": 1}])
    upload(hub / "owner" / "name", "rte", "validation", [{"text": "b", "label": 0}, {"text": None, "label": -1}])
    upload(hub / "owner" / "name", "cola", "train", [{"text": "c", "label": 1}])
    (row,) = read_rows(["owner/name"], subset="rte")
    assert (row.source, row.place, row.number, row.id) == ("owner/name", "row 1 of train", 1, "owner/name:1")
    assert row.values == {"text": "a", "label": "1"}
    assert read_rows(["owner/name"], subset="cola")[0].values["text"] == "c"
    rows = read_rows(["owner/name"], "validation", "rte")
    assert [row.values for row in rows] == [{"text": "b", "label": "0"}, {"text": None, "label": "-1"}]
    assert str(rows[1].error("it is wrong")) == "owner/name: row 2 of validation: it is wrong"


def test_files_and_data_sets_are_concatenated_in_the_order_given(hub, tmp_path):
    upload(hub / "owner" / "name", "one", "train", [{"text": "from the hub"}])
    local = write(tmp_path, "a.csv", "text\nfrom a file\n")
    rows = read_rows([local, "owner/name", local])
    assert [row.values["text"] for row in rows] == ["from a file", "from the hub", "from a file"]


def test_a_split_or_subset_that_the_hub_does_not_have_is_named(hub):
    upload(hub / "owner" / "name", "one", "train", [{"text": "a"}])
    with pytest.raises(DataError, match=r'owner/name: no such file, .*Unknown split "dev"'):
        read_rows(["owner/name"], "dev")
    with pytest.raises(DataError, match="'two' not found") as error:
        read_rows(["owner/name"], subset="two")
    assert "\n" not in str(error.value)


def test_a_split_without_rows_is_named(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([]))
    with pytest.raises(DataError, match="owner/name: the split test holds no records"):
        read_rows(["owner/name"], "test")


def test_a_data_set_that_the_hub_cannot_give():
    program = (
        "from sora_hw.data.files import read_rows\n"
        "from sora_hw.errors import DataError\n"
        "try:\n    read_rows(['nobody/no-data.v2'])\nexcept DataError as error:\n    print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    (line,) = done.stdout.splitlines()
    assert line.startswith("nobody/no-data.v2: no such file, and the hub cannot give it as a data set (")
    assert "name a local file with --train-data" in line
    assert line.endswith("hf download --repo-type dataset nobody/no-data.v2")


def test_an_error_without_words_is_named_by_its_kind(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "(TimeoutError)" in refusal("owner/name")


@pytest.mark.parametrize("source", ["name", "a/b/c", "../owner/name", "/owner/name", "owner/", "owner/näme", "a b/c"])
def test_what_is_no_id_of_the_hub_is_not_asked_for(source):
    assert "unknown kind of data file" in refusal(source)


def test_a_local_file_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such data file" in refusal("owner/name.jsonl")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("hello")
    assert "unknown kind of data file" in refusal("owner/name")


def test_tables_cost_no_import_before_one_is_read():
    program = (
        "import sys, sora_hw, sora_hw.data.records, sora_hw.data.glue\n"
        "print([name for name in ('datasets', 'pyarrow', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
