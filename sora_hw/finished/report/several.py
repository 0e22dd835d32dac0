"""The page of several runs: the same figures and charts beside one another, and only what the runs differ in."""

import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

from sora_hw.analysis.figures import COLOURS
from sora_hw.finished.comparison import compare_runs
from sora_hw.finished.report.charts import Chart, Line, Point
from sora_hw.finished.report.measured import Measured
from sora_hw.finished.report.one import BLOCK
from sora_hw.finished.report.page import Bar, Bars, Block, Card, Grid, Note, Page, Scores, Section, Side, shown
from sora_hw.finished.run import FinishedRun
from sora_hw.finished.spectra import Spectrum
from sora_hw.finished.tables import Cell, Row, Table

BESIDE = ", beside the paper"  # in the title of a table that has its figures
# What a run's name says of its recipe beside the method, as far as it helps to tell the runs apart.
NAMING = {"name": "", "rank": "rank ", "learning_rate": "learning rate ", "seed": "seed "}


def comparing(runs: Sequence[FinishedRun]) -> Page:
    """The page. Raises UserError for a damaged file."""
    all_measured = [Measured(run) for run in runs]
    names, colours = _names(all_measured), _colours(all_measured)
    named = list(zip(names, colours, all_measured, strict=True))
    recipes = dict.fromkeys(run.recipe.name for run in runs)
    models = dict.fromkeys(measured.model for measured in all_measured)
    sections = [
        Section("Key figures", [_key_figures(named)]),
        Section("Training", list(_training(named))),
        Section("Scores", list(_scores(named))),
        Section("What they have done to the weights", list(_spectra(named))),
        Section("What they differ in", [_differences(named)]),
    ]
    return Page(f"{len(runs)} runs", f"{', '.join(recipes)} · {', '.join(models)}", sections, COLOURS["full"])


Named = tuple[str, str, Measured]  # what a run is called on this page, its colour, what it has measured


def _names(all_measured: Sequence[Measured]) -> list[str]:
    """The methods, and what else of the recipes it takes to tell the runs apart; otherwise their folders."""
    names = [measured.method for measured in all_measured]
    for field, words in NAMING.items():
        values = [shown(getattr(measured.run.recipe, field)) for measured in all_measured]
        longer = [f"{name}, {words}{value}" for name, value in zip(names, values, strict=True)]
        if len(set(longer)) > len(set(names)):
            names = longer
    if len(set(names)) == len(names):
        return names
    return [str(measured.run.path) for measured in all_measured]


def _colours(all_measured: Sequence[Measured]) -> list[str]:
    """The methods', where every run has its own; otherwise one after the other."""
    own = [measured.colour for measured in all_measured]
    if len(set(own)) == len(own):
        return own
    palette = list(COLOURS.values())
    return [palette[index % len(palette)] for index in range(len(all_measured))]


def _key_figures(named: Sequence[Named]) -> Grid:
    figures = [{_label(card): card.value for card in measured.cards} for _, _, measured in named]
    labels = list(dict.fromkeys(label for each in figures for label in each))
    rows = [
        [name, measured.run.status, *(each.get(label, "-") for label in labels)]
        for (name, _, measured), each in zip(named, figures, strict=True)
    ]
    return Grid(["run", "status", *labels], rows, colours=[colour for _, colour, _ in named])


def _label(card: Card) -> str:
    return f"{card.label}, {card.unit}" if card.unit else card.label


def _training(named: Sequence[Named]) -> Iterator[Block]:
    step = "optimiser step"
    units = ", ".join(dict.fromkeys(measured.loss_unit for _, _, measured in named))
    charts = [
        Chart("Training loss", units, step, _lines(named, "loss"), may_log=True, wide=True),
        Chart("Validation loss", units, step, _lines(named, "eval_loss"), may_log=True),
        Chart("Throughput", "tokens/s", step, _lines(named, "tokens_per_second"), True, show="{:,.0f}".format),
        Chart("Peak memory so far", "GiB on rank 0", step, _lines(named, "peak_memory_gib"), True),
    ]
    drawn = [chart for chart in charts if chart.has_values]
    if drawn:
        yield Side(drawn)
    else:
        yield Note("No losses yet: they are written with the first checkpoint.")


def _lines(named: Sequence[Named], key: str) -> list[Line]:
    curves = [(name, measured.curve(key), colour) for name, colour, measured in named]
    return [Line(name, curve, colour) for name, curve, colour in curves if curve]


def _scores(named: Sequence[Named]) -> Iterator[Block]:
    found = _tables(named)
    yield from map(Scores, found)
    if found:
        yield Note("Seeds together, with mean and standard deviation:", "sora-hw compare RUN...")
    demos = [
        Bar(name, demo["after"], f"{demo['after']:.1%}", colour)
        for name, colour, measured in named
        if (demo := measured.run.results.get("embedded_questions"))
    ]
    if demos:
        yield Bars("Held-out questions answered correctly", demos)
    if not found and not demos:
        yield Note("None of these runs has been scored. To score one:", "python launchers/score.py --adapter RUN")


def _tables(named: Sequence[Named]) -> list[Table]:
    """Each run's tables, those of the same title as one with a row for every run."""
    found: dict[str, list[tuple[str, Table]]] = {}
    for name, _, measured in named:
        for table in compare_runs([measured.run]):
            found.setdefault(table.title.partition(BESIDE)[0], []).append((name, table))
    return [_merged(tables) for tables in found.values()]


def _merged(tables: Sequence[tuple[str, Table]]) -> Table:
    columns = tuple(dict.fromkeys(column for _, table in tables for column in table.columns))
    rows = []
    for name, table in tables:
        cells = dict(zip(table.columns, table.rows[0].cells, strict=True))
        rows.append(Row((name,), tuple(cells.get(column, Cell()) for column in columns)))
    telling = [table for _, table in tables if BESIDE in table.title] or [table for _, table in tables]
    notes = tuple(dict.fromkeys(note for table in telling for note in table.notes))
    return Table(telling[0].title, ("run",), columns, tuple(rows), notes)


def _spectra(named: Sequence[Named]) -> Iterator[Block]:
    known = [(name, colour, measured) for name, colour, measured in named if measured.spectrum]
    missing = [str(measured.run.path) for _, _, measured in named if not measured.spectrum]
    if known:
        means = [measured.spectrum.mean_entropy for _, _, measured in known]
        longest = max(means) or 1.0
        bars = [
            Bar(name, mean / longest, f"{mean:.2f}", colour)
            for (name, colour, _), mean in zip(known, means, strict=True)
        ]
        lines = [Line(name, _by_block(measured.spectrum), colour) for name, colour, measured in known]
        chart = Chart("Singular-value entropy", "nats, mean over the block", BLOCK, lines, from_zero=True, wide=True)
        yield Side([chart, Bars("Mean entropy over the layers, nats", bars)])
    if missing:
        which = shlex.join(missing) if len(missing) <= 2 else "RUN..."
        yield Note(f"No spectra yet of {len(missing)} of these runs. To compute them:", f"sora-hw spectrum {which}")


def _by_block(spectrum: Spectrum) -> list[Point]:
    blocks: dict[int, list[float]] = {}
    for layer in spectrum.layers:
        blocks.setdefault(layer.place[0], []).append(layer.entropy)
    return [(block, statistics.fmean(entropies)) for block, entropies in sorted(blocks.items())]


def _differences(named: Sequence[Named]) -> Block:
    facts = [_facts(measured.run) for _, _, measured in named]
    every = list(dict.fromkeys(name for each in facts for name in each))
    differing = [name for name in every if len({shown(each.get(name)) for each in facts}) > 1]
    if not differing:
        return Note("Nothing: recipe, data, hardware and versions are the same.")
    rows = [
        [name, *(shown(each.get(fact)) for fact in differing)] for (name, _, _), each in zip(named, facts, strict=True)
    ]
    return Grid(["run", *differing], rows, colours=[colour for _, colour, _ in named])


def _facts(run: FinishedRun) -> Mapping[str, object]:
    """What may differ between runs, by the names that a reader knows."""
    manifest = run.manifest
    facts = {each.name.replace("_", " "): getattr(run.recipe, each.name) for each in fields(run.recipe)}
    data, batch, profile = (manifest.get(name) or {} for name in ("data", "batch", "profile"))
    facts |= {"data": str(data.get("checksum"))[:12], "device": manifest.get("device_name")}
    facts |= {"ranks": batch.get("world_size"), "micro-batch": batch.get("micro_batch")}
    facts |= {name: profile.get(name) for name in ("zero_stage", "dtype")}
    facts |= {"git commit": str(manifest.get("git_commit"))[:12], **(manifest.get("versions") or {})}
    return facts
