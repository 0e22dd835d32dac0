"""What was scored, laid out as the paper's tables, with the paper's figures where it has the same."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sora_hw.analysis.figures import COLOURS
from sora_hw.conditioning import PRESETS
from sora_hw.evaluation.tasks import COMMONSENSE, MATH, TASKS
from sora_hw.finished.scores import ACCURACY, GENERATION, LIKELIHOOD, NORMALISED, Score
from sora_hw.finished.tables import Cell, Row, Table
from sora_hw.recipes import commonsense, glue, metamath, published
from sora_hw.recipes.recipe import Recipe

GLUE = "GLUE"  # beside the kinds of tasks that are scored after training
UNTUNED = "not tuned"  # stands where a tuned model's method does
ROWS = (UNTUNED, *COLOURS)  # from top to bottom, as in every legend
AVERAGE, RATE = "average", "trainable, %"


class Measure(NamedTuple):
    """What is measured: `sheet` is one of `SHEETS`, `task` one of its columns, `how` the protocol and the metric."""

    sheet: str
    task: str
    how: str = ""


class Sample(NamedTuple):
    """A share for every seed, each of `records` records where that is known."""

    values: tuple[float, ...]
    records: int | None = None


def benchmark(recipe: Recipe) -> str:
    """One of `sora_hw.recipes.BENCHMARKS`: GLUE's recipes are named after their tasks."""
    return recipe.name.partition("-")[0]


@dataclass(frozen=True)
class Setting:
    """Runs of one recipe, which differ in their seeds alone, and what they scored.

    `tuned` is False for the base model as it came. `rate`, trainable parameters in percent, and `speed`, optimiser
    steps per second, are means over the runs, None where they are not known.
    """

    recipe: Recipe
    scores: Mapping[Measure, Sample]
    tuned: bool = True
    rate: float | None = None
    speed: float | None = None

    @property
    def method(self) -> str:
        """The name of its row."""
        return self.recipe.method if self.tuned else UNTUNED

    @property
    def rank(self) -> int | None:
        """Of the low-rank update; None where there is none."""
        return self.recipe.rank if self.tuned and self.recipe.low_rank else None

    @property
    def rotation_rank(self) -> int | None:
        """None where nothing is rotated."""
        rotates = "rotation" in PRESETS.get(self.recipe.method, ())
        return self.recipe.rotation_rank if self.tuned and rotates else None

    @property
    def trained_on(self) -> str | None:
        """The benchmark."""
        return benchmark(self.recipe) if self.tuned else None


@dataclass(frozen=True)
class Sheet:
    """One of the paper's tables.

    Attributes:
        number: in the paper.
        recipe: the paper's, whose model and rotation rank its figures are of.
        ranks: those that it has figures of.
        columns: the tasks, with their titles.
        figures: from rank and method to its figures, each with a standard deviation or None.
        averages: the same for the averages that it prints.
        beside: the protocols and metrics that its figures may stand beside.
        note: what is to say of them.
        rates: trainable parameters in percent, where it prints them, by the method.
    """

    number: int
    recipe: Recipe
    ranks: tuple[int, ...]
    columns: Mapping[str, str]
    figures: Callable[[int | None, str], Mapping[str, tuple[float, float | None]]]
    averages: Callable[[int | None, str], float | None]
    beside: tuple[str, ...]
    note: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)


def _how(protocol: str, metric: str) -> str:
    return f"{metric} by {protocol}"


def _columns(kind: str) -> dict[str, str]:
    return {task.name: task.title for task in TASKS.values() if task.kind == kind}


def _without_spread(figures: Mapping[str, float]) -> dict[str, tuple[float, None]]:
    return {task: (figure, None) for task, figure in figures.items()}


SHEETS = {
    GLUE: Sheet(
        number=2,
        recipe=glue.recipe(),
        ranks=glue.grid().ranks,
        columns={
            "rte": "RTE",
            "mrpc": "MRPC",
            "stsb": "STS-B",
            "cola": "CoLA",
            "sst2": "SST-2",
            "qnli": "QNLI",
            "qqp": "QQP",
        },
        figures=lambda rank, method: published.GLUE.get(method, {}),
        averages=lambda rank, method: published.GLUE_AVERAGE.get(method),
        beside=("",),
        note="Accuracy; for STS-B Pearson's correlation, for CoLA Matthews'. The paper's averages are from Table 5.",
    ),
    COMMONSENSE: Sheet(
        number=3,
        recipe=commonsense.recipe(),
        ranks=commonsense.grid().ranks,
        columns=_columns(COMMONSENSE),
        figures=lambda rank, method: _without_spread(published.COMMONSENSE.get(rank, {}).get(method, {})),
        averages=lambda rank, method: published.COMMONSENSE_AVERAGE.get(rank, {}).get(method),
        beside=(_how(LIKELIHOOD, ACCURACY), _how(LIKELIHOOD, NORMALISED)),
        note="The paper's are accuracies of lm-evaluation-harness, zero-shot; which of its two is not known here.",
    ),
    MATH: Sheet(
        number=4,
        recipe=metamath.recipe(),
        ranks=metamath.grid().ranks,
        columns=_columns(MATH),
        figures=lambda rank, method: _without_spread(published.MATH.get(method, {})),
        averages=lambda rank, method: published.MATH_AVERAGE.get(method),
        beside=(_how(GENERATION, ACCURACY),),
        rates=published.MATH_RATE,
    ),
}


def score_tables(recipe: Recipe, scores: Sequence[Score], tuned: bool = True, rate: float | None = None) -> list[Table]:
    """The scores of one run of `recipe`, or with `tuned` False of its base model, beside the paper's; `rate` in percent
    is what the run trained of the parameters."""
    return tables_of([Setting(recipe, samples(scores), tuned, rate)])


def samples(scores: Sequence[Score]) -> dict[Measure, Sample]:
    """The scores of one run."""
    return {
        Measure(TASKS[score.task].kind, score.task, _how(score.protocol, score.metric)): Sample(
            (score.value,), score.records
        )
        for score in scores
    }


def tables_of(settings: Sequence[Setting]) -> list[Table]:
    """A table for each benchmark, base model, protocol and metric; then those by the rank of the rotation."""
    found: dict[tuple[str, str, str], list[Setting]] = {}
    for setting in settings:
        for sheet, how in dict.fromkeys((measure.sheet, measure.how) for measure in setting.scores):
            found.setdefault((sheet, how, setting.recipe.model), []).append(setting)
    order = list(SHEETS)
    wanted = sorted(found, key=lambda key: order.index(key[0]))
    return [_table(sheet, how, found[sheet, how, model]) for sheet, how, model in wanted] + _by_rotation_rank(settings)


def _table(name: str, how: str, settings: Sequence[Setting]) -> Table:
    sheet, of = SHEETS[name], settings[0]
    tasks = [task for task in sheet.columns if any(Measure(name, task, how) in setting.scores for setting in settings)]
    keys = _keys(sheet, settings)
    members: dict[tuple[str, ...], list[Setting]] = {}  # GLUE has a setting of its own for every task
    for setting in sorted(settings, key=_place):
        members.setdefault(tuple(str(getattr(setting, key) or "-") for key in keys), []).append(setting)
    rows = tuple(Row(row, _cells(name, how, tasks, theirs)) for row, theirs in members.items())
    title = f"{', '.join(filter(None, (name, how)))}, of {of.recipe.model}"
    notes = [_seeds(rows), _records(name, how, tasks, settings)]
    if any(row.has_paper for row in rows):
        title += f", beside the paper's Table {sheet.number}"
        notes += [sheet.note, _difference(sheet, of.recipe.model, "trained_on" in keys)]
    columns = [RATE] * _shows_rate(sheet, how) + [sheet.columns[task] for task in tasks] + [AVERAGE] * (len(tasks) > 1)
    return Table(title, tuple(key.replace("_", " ") for key in keys), tuple(columns), rows, _told(notes))


def _shows_rate(sheet: Sheet, how: str) -> bool:
    return bool(sheet.rates) and how in sheet.beside


def _keys(sheet: Sheet, settings: Sequence[Setting]) -> list[str]:
    """What the rows are told by: the method, and what of ours is not as in the paper's table."""
    ranks = len(sheet.ranks) > 1 or any(setting.rank not in (None, *sheet.ranks) for setting in settings)
    rotation_ranks = any(not _papers_rotation(setting) for setting in settings)
    elsewhere = any(setting.trained_on not in (None, benchmark(sheet.recipe)) for setting in settings)
    return ["trained_on"] * elsewhere + ["rank"] * ranks + ["method"] + ["rotation_rank"] * rotation_ranks


def _papers_rotation(setting: Setting) -> bool:
    """Whether it rotates as the paper does on the benchmark that it was trained on."""
    ranks = {benchmark(sheet.recipe): sheet.recipe.rotation_rank for sheet in SHEETS.values()}
    return setting.rotation_rank in (None, ranks.get(setting.trained_on))


def _place(setting: Setting) -> tuple[str, float, int, int]:
    rank = setting.rank or (math.inf if setting.tuned else 0)
    return setting.trained_on or "", rank, ROWS.index(setting.method), setting.rotation_rank or 0


def _cells(name: str, how: str, tasks: Sequence[str], settings: Sequence[Setting]) -> tuple[Cell, ...]:
    """Of one row: its tasks, and with several of them their average, which stands beside that of the same tasks."""
    sheet, setting = SHEETS[name], settings[0]
    figures, average, rate = {}, None, None
    if how in sheet.beside and setting.rank in (None, *sheet.ranks) and _papers_rotation(setting):
        figures = sheet.figures(setting.rank, setting.method)
        average = sheet.averages(setting.rank, setting.method)
        rate = sheet.rates.get(setting.method)
    scores = {measure: sample for each in settings for measure, sample in each.scores.items()}
    shares = [scores.get(Measure(name, task, how), Sample(())).values for task in tasks]
    cells = [_cell(own, *figures.get(task, (None, None))) for task, own in zip(tasks, shares, strict=True)]
    first = [Cell(setting.rate, paper=rate)] if _shows_rate(sheet, how) else []
    return (*first, *cells, *_average(cells, average if set(tasks) == set(sheet.columns) else None))


def _average(cells: Sequence[Cell], paper: float | None) -> list[Cell]:
    """None of a single task; without a figure of ours where a task was not scored."""
    if len(cells) == 1:
        return []
    if any(cell.mean is None for cell in cells):
        return [Cell(paper=paper)]
    return [Cell(statistics.fmean(cell.mean for cell in cells), None, min(cell.runs for cell in cells), paper)]


def _cell(shares: Sequence[float], paper: float | None, paper_spread: float | None) -> Cell:
    if not shares:
        return Cell(paper=paper, paper_spread=paper_spread)
    spread = 100 * statistics.stdev(shares) if len(shares) > 1 else None
    return Cell(100 * statistics.fmean(shares), spread, len(shares), paper, paper_spread)


def _by_rotation_rank(settings: Sequence[Setting]) -> list[Table]:
    """As Table 6: a table for every method and task of GLUE of which there are several ranks of the rotation."""
    found: dict[tuple, list[tuple[Setting, Measure]]] = {}
    for setting in sorted(settings, key=_place):
        for measure in setting.scores:
            if measure.sheet == GLUE and setting.rotation_rank:
                key = setting.recipe.model, setting.method, setting.rank, measure
                found.setdefault(key, []).append((setting, measure))
    return [_rotation_table(group) for group in found.values() if len(group) > 1]


def _rotation_table(group: Sequence[tuple[Setting, Measure]]) -> Table:
    first, measure = group[0]
    sheet = SHEETS[GLUE]
    task = sheet.columns[measure.task]
    in_paper = (first.method, first.rank, measure.task) == ("sora", sheet.recipe.rank, "rte")
    rows = []
    for setting, _ in group:
        paper = published.ROTATION_RANK.get(setting.rotation_rank) if in_paper else None
        rate, score, speed = paper or (None, None, None)
        runs = len(setting.scores[measure].values)
        cells = (
            Cell(setting.rate, None, runs, rate),
            _cell(setting.scores[measure].values, score, None),
            Cell(setting.speed, None, runs, speed),
        )
        rows.append(Row((str(setting.rotation_rank),), cells))
    beside = ", beside the paper's Table 6" if any(row.has_paper for row in rows) else ""
    notes = [_seeds(rows), _difference(sheet, first.recipe.model) if beside else ""]
    return Table(
        f"{first.method} on {task} by the rank of its rotation, {first.recipe.model}{beside}",
        ("rotation rank",),
        ("trainable, %", f"{task}, %", "steps/s"),
        tuple(rows),
        _told(notes),
    )


def _told(notes: Sequence[str]) -> tuple[str, ...]:
    return tuple(note for note in notes if note)


def _seeds(rows: Sequence[Row]) -> str:
    counts = {cell.runs for row in rows for cell in row.cells if cell.runs}
    if counts == {1}:
        return "Percent, one run each."
    several = str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"Percent, mean ± standard deviation over {several} seeds."


def _records(name: str, how: str, tasks: Sequence[str], settings: Sequence[Setting]) -> str:
    counted = []
    for task in tasks:
        found = [setting.scores.get(Measure(name, task, how)) for setting in settings]
        numbers = sorted({sample.records for sample in found if sample and sample.records})
        if numbers:
            counted.append(f"{SHEETS[name].columns[task]} {' or '.join(map(str, numbers))}")
    return f"Records scored: {', '.join(counted)}." if counted else ""


def _difference(sheet: Sheet, model: str, trained_elsewhere: bool = False) -> str:
    """What keeps the two from being the same experiment."""
    paper = sheet.recipe.model
    if trained_elsewhere:
        paper += f" trained on {benchmark(sheet.recipe)}, with rotations of rank {sheet.recipe.rotation_rank}"
    return f"The paper's figures are of {paper}; ours of {model}." if paper != model else ""
