"""Tables in their four forms."""

import csv
import io
import json
import os
import re

import pytest

from sora_hw.errors import UserError
from sora_hw.finished.tables import Cell, Row, Table, as_csv, as_json, markdown, print_tables, write_tables
from sora_hw.terminal import Console

TABLE = Table(
    "GLUE beside Table 2",
    ("rank", "method"),
    ("RTE", "STS-B", "average"),
    (
        Row(("4", "sora"), (Cell(60.004, 1.0, 3, 87.9, 0.42), Cell(91.5, None, 1, 90.79), Cell(75.752, None, 1))),
        Row(("-", "full"), (Cell(51.875, 0.5, 2), Cell(), Cell())),
    ),
    ("A note [of] ours.",),
)
OTHER = Table("Another", ("rotation rank",), ("RTE",), (Row(("2",), (Cell(50.0, None, 1, 50.0),)),))


def test_the_difference_needs_both():
    assert Cell(60.0, 1.0, 3, 87.9).difference == pytest.approx(-27.9)
    assert Cell(60.0).difference is None and Cell(paper=60.0).difference is None
    assert Cell(60.0, paper=59.999).difference_shown == "+0.00"
    assert Cell(91.5, paper=90.79).difference_shown == "+0.71" and Cell(60.0).difference_shown == "-"


def test_figures_have_two_decimals():
    cell = Cell(60.004, 1.0, 3, 87.9, 0.42)
    assert (cell.ours_shown, cell.paper_shown) == ("60.00 ± 1.00", "87.90 ± 0.42")
    assert (Cell(91.5).ours_shown, Cell().ours_shown, Cell().paper_shown) == ("91.50", "-", "-")


def terminal(*shown, **options) -> str:
    console = Console(file=io.StringIO(), **options)
    print_tables(shown, console)
    return console.file.getvalue()


def test_the_terminal_shows_ours_the_paper_s_and_the_difference():
    lines = [line.split() for line in terminal(TABLE, width=120).splitlines()]
    assert lines[0] == TABLE.title.split()
    head = lines.index(["rank", "method", "RTE", "STS-B", "average"])
    ours, papers, differences, full = lines[head + 2 : head + 6]
    assert ours == ["4", "sora", "ours", "60.00", "±", "1.00", "91.50", "75.75"]
    assert papers == ["paper", "87.90", "±", "0.42", "90.79", "-"]
    assert differences == ["difference", "-27.90", "+0.71", "-"]
    assert full == ["-", "full", "ours", "51.88", "±", "0.50", "-", "-"], "no line for a paper that has no figures"
    assert ["A", "note", "[of]", "ours."] in lines


def test_nothing_is_cut_on_a_narrow_terminal():
    assert terminal(TABLE, width=20) == terminal(TABLE, width=120)


def test_better_is_green_and_worse_is_red():
    coloured = terminal(TABLE, OTHER, width=120, force_terminal=True, color_system="standard")
    assert re.search(r"\x1b\[31m *-27\.90", coloured) and re.search(r"\x1b\[32m *\+0\.71", coloured)
    assert re.search(r"\x1b\[32m *\+0\.00", coloured)


def test_markdown():
    assert markdown([TABLE, OTHER]).splitlines() == [
        "### GLUE beside Table 2",
        "",
        "| rank | method | RTE | STS-B | average |",
        "| --- | --- | --- | --- | --- |",
        "| 4 | sora | 60.00 ± 1.00 (87.90 ± 0.42, -27.90) | 91.50 (90.79, +0.71) | 75.75 |",
        "| - | full | 51.88 ± 0.50 | - | - |",
        "",
        "A note [of] ours.",
        "",
        "### Another",
        "",
        "| rotation rank | RTE |",
        "| --- | --- |",
        "| 2 | 50.00 (50.00, +0.00) |",
    ]


def test_csv_has_a_line_for_every_figure():
    lines = list(csv.DictReader(io.StringIO(as_csv([TABLE, OTHER]))))
    assert [(line["table"], line["method"], line["rotation rank"], line["column"]) for line in lines] == [
        ("GLUE beside Table 2", "sora", "", "RTE"),
        ("GLUE beside Table 2", "sora", "", "STS-B"),
        ("GLUE beside Table 2", "sora", "", "average"),
        ("GLUE beside Table 2", "full", "", "RTE"),
        ("Another", "", "2", "RTE"),
    ]
    figures = {name: lines[0][name] for name in ("mean", "spread", "runs", "paper", "paper_spread", "difference")}
    assert list(map(float, figures.values())) == [60.004, 1.0, 3, 87.9, 0.42, -27.896]
    assert lines[3]["paper"] == lines[3]["difference"] == ""


def test_json_has_every_figure():
    table, other = json.loads(as_json([TABLE, OTHER]))
    assert table["title"] == TABLE.title and table["notes"] == ["A note [of] ours."]
    first, second = table["rows"]
    assert first["of"] == {"rank": "4", "method": "sora"} and other["rows"][0]["of"] == {"rotation rank": "2"}
    assert first["cells"]["STS-B"] == {
        **{"mean": 91.5, "spread": None, "runs": 1, "paper": 90.79, "paper_spread": None},
        "difference": 0.71,
    }
    assert second["cells"]["average"]["mean"] is None


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    write_tables([TABLE], tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"table.md", "table.csv", "table.json"}
    for file, form in (("table.md", markdown), ("table.csv", as_csv), ("table.json", as_json)):
        assert (tmp_path / file).read_text() == form([TABLE])

    def full_disk(*names):
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match=r"table\.md cannot be written \(no space\)"):
        write_tables([TABLE, OTHER], tmp_path)
    assert (tmp_path / "table.md").read_text() == markdown([TABLE])
