"""Tables of ours beside the paper's: on the terminal, as Markdown, CSV and JSON.

Every figure is in percent unless the table says otherwise, and is shown with two decimals, as in the paper.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich import table as rich_table
from rich.text import Text

from sora_hw.storage import write_whole
from sora_hw.terminal import Console

NONE = "-"
DECIMALS = 4  # of the figures in files
WIDEST = 1_000  # characters: no table is as wide


@dataclass(frozen=True)
class Cell:
    """One figure of ours, a mean over `runs` seeds with their standard deviation (None for one), beside the paper's.

    `mean` is None where nothing was measured, `paper` where the paper has no such figure.
    """

    mean: float | None = None
    spread: float | None = None
    runs: int = 0
    paper: float | None = None
    paper_spread: float | None = None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, in percentage points; None where one of them is missing."""
        return None if self.mean is None or self.paper is None else self.mean - self.paper

    @property
    def ours_shown(self) -> str:
        """ "60.00 ± 1.00", "60.00" for one run, "-" for none."""
        return _spread_shown(self.mean, self.spread)

    @property
    def paper_shown(self) -> str:
        """ "87.90 ± 0.42", "87.90", or "-"."""
        return _spread_shown(self.paper, self.paper_spread)

    @property
    def difference_shown(self) -> str:
        """ "-27.90" or "+1.00", always with its sign, or "-"."""
        return NONE if self.difference is None else f"{self.difference:+.2f}"


def _spread_shown(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return NONE
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


@dataclass(frozen=True)
class Row:
    """What a row is of, a value for each of the table's `keys`, and a cell for each of its columns."""

    keys: tuple[str, ...]
    cells: tuple[Cell, ...]

    @property
    def has_paper(self) -> bool:
        """Whether the paper has any of its figures."""
        return any(cell.paper is not None for cell in self.cells)


@dataclass(frozen=True)
class Table:
    """A title, what the rows differ in (`keys`, as "method"), columns (tasks), rows, and lines to stand below."""

    title: str
    keys: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Print them, each at the width it needs: a cell that is cut says nothing."""
    for table in tables:
        console.print(_terminal(table, console), soft_wrap=True)
        for note in table.notes:
            console.print(note)
        console.print()


def _terminal(table: Table, console: Console) -> rich_table.Table:
    """Ours, the paper's and the difference below one another; the difference has a sign as well as a colour."""
    shown = rich_table.Table(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    for key in (*table.keys, ""):
        shown.add_column(key)
    for column in table.columns:
        shown.add_column(column, justify="right")
    for row in table.rows:
        shown.add_row(*row.keys, "ours", *(cell.ours_shown for cell in row.cells))
        if row.has_paper:
            blank = [""] * len(row.keys)
            shown.add_row(*blank, "paper", *(cell.paper_shown for cell in row.cells), style="dim")
            shown.add_row(*blank, "difference", *map(_coloured, row.cells))
    shown.width = console.measure(shown, options=console.options.update(max_width=WIDEST)).maximum
    return shown


def _coloured(cell: Cell) -> Text:
    if cell.difference is None:
        return Text(NONE)
    return Text(cell.difference_shown, style="green" if cell.difference >= 0 else "red")


def markdown(tables: Sequence[Table]) -> str:
    """One row per row, its cells as `ours (paper's, difference)`."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Table) -> str:
    lines = [[*table.keys, *table.columns], ["---"] * (len(table.keys) + len(table.columns))]
    lines += [[*row.keys, *map(_markdown_cell, row.cells)] for row in table.rows]
    text = f"### {table.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n{note}\n" for note in table.notes)


def _markdown_cell(cell: Cell) -> str:
    return cell.ours_shown if cell.paper is None else f"{cell.ours_shown} ({cell.paper_shown}, {cell.difference_shown})"


def as_csv(tables: Sequence[Table]) -> str:
    """A line for every cell that says anything: table, what the row is of, column, and the figures of the cell."""
    keys = list(dict.fromkeys(key for table in tables for key in table.keys))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["table", *keys, "column", *_figures(Cell())], lineterminator="\n")
    writer.writeheader()
    for table in tables:
        for names, column, cell in _cells(table):
            writer.writerow({"table": table.title, **names, "column": column, **_figures(cell)})
    return text.getvalue()


def _cells(table: Table) -> Iterator[tuple[Mapping[str, str], str, Cell]]:
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell != Cell():
                yield dict(zip(table.keys, row.keys, strict=True)), column, cell


def as_json(tables: Sequence[Table]) -> str:
    """A list of tables with `title`, `rows` (each with its `of` and, by the column, its `cells`) and `notes`."""
    return json.dumps([_json(table) for table in tables], indent=2, allow_nan=False) + "\n"


def _json(table: Table) -> dict[str, object]:
    rows = [
        {
            "of": dict(zip(table.keys, row.keys, strict=True)),
            "cells": {column: _figures(cell) for column, cell in zip(table.columns, row.cells, strict=True)},
        }
        for row in table.rows
    ]
    return {"title": table.title, "rows": rows, "notes": list(table.notes)}


def _figures(cell: Cell) -> dict[str, float | None]:
    values = {**asdict(cell), "difference": cell.difference}
    return {name: round(value, DECIMALS) if isinstance(value, float) else value for name, value in values.items()}


FORMATS = {"markdown": markdown, "csv": as_csv, "json": as_json}  # beside the terminal


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Write table.md, table.csv and table.json into `folder`, each whole or not at all."""
    for ending, text in (("md", markdown(tables)), ("csv", as_csv(tables)), ("json", as_json(tables))):
        write_whole(folder / f"table.{ending}", text)
