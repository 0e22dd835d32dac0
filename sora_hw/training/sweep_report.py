"""What came of a sweep: a row for every setting, its seeds together, as a table on the terminal, Markdown and JSON."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from sora_hw.errors import UserError
from sora_hw.recipes.recipe import Recipe
from sora_hw.storage import write_whole
from sora_hw.terminal import Console

SUMMARY = "summary"
LOSSES = {"validation loss": "validation_loss", "training loss": "final_loss"}


@dataclass(frozen=True)
class Outcome:
    """One run of a sweep and the `results` of its run.json, None where it has diverged."""

    rank: int
    learning_rate: float
    seed: int
    validation_size: int
    folder: Path
    results: Mapping[str, object] | None

    @property
    def setting(self) -> tuple[int, float, int]:
        """What the seeds of a row share."""
        return self.rank, self.learning_rate, self.validation_size


@dataclass(frozen=True)
class Row:
    """The seeds of one setting. Scores are shares, losses nats; means and standard deviations of a sample over the
    seeds (None for one seed, or where a run has diverged or the value is not measured)."""

    rank: int
    learning_rate: float
    validation_size: int
    seeds: list[int]
    diverged: int
    scores: dict[str, tuple[float, float | None]]


def best_learning_rate(outcomes: Sequence[Outcome]) -> float:
    """The learning rate of the best mean over its seeds on the records that were held out: by the task's metric where
    it has one, otherwise by the loss. A rate with which a run has diverged is out, or has no finite validation loss.

    Raises UserError when every rate is, or no run has held records out.
    """
    if not any(outcome.validation_size for outcome in outcomes):
        raise UserError("several learning rates, and no records held out to choose one of them by")
    rows = [row for row in rows_of(outcomes) if not row.diverged and "validation loss" in row.scores]
    if not rows:
        raise UserError("every learning rate of the sweep has diverged: give a smaller --learning-rate")
    return max(rows, key=_merit).learning_rate


def chosen(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Of the runs of one rank those of the best setting: of the learning rate that `best_learning_rate` takes, or of
    the only one, the runs with the fewest records held out. Raises UserError where nothing decides among several.
    """
    rates = {outcome.learning_rate for outcome in outcomes}
    rate = rates.pop() if len(rates) == 1 else best_learning_rate(outcomes)
    candidates = [outcome for outcome in outcomes if outcome.learning_rate == rate]
    size = min(outcome.validation_size for outcome in candidates)
    return [outcome for outcome in candidates if outcome.validation_size == size]


def _merit(row: Row) -> float:
    """More is better: the task's metric on the records held out, otherwise the negative loss."""
    held_out = {name: mean for name, (mean, _) in row.scores.items() if name.startswith("validation ")}
    loss = held_out.pop("validation loss")
    return next(iter(held_out.values()), -loss)


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """The settings, in the order of their first runs."""
    settings = dict.fromkeys(outcome.setting for outcome in outcomes)
    return [_row([outcome for outcome in outcomes if outcome.setting == setting]) for setting in settings]


def _row(runs: Sequence[Outcome]) -> Row:
    first = runs[0]
    finished = [_scores(run.results) for run in runs if run.results]
    names = finished[0] if finished else {}
    scores = {name: _spread([scores.get(name) for scores in finished]) for name in names}
    return Row(
        first.rank,
        first.learning_rate,
        first.validation_size,
        [run.seed for run in runs],
        len(runs) - len(finished),
        {name: spread for name, spread in scores.items() if spread},
    )


def _scores(results: Mapping[str, object]) -> dict[str, float | None]:
    scores = {f"test {name}": value for name, value in (results.get("test") or {}).items()}
    scores |= {f"validation {name}": value for name, value in (results.get("validation") or {}).items()}
    return scores | {name: results.get(key) for name, key in LOSSES.items()}


def _spread(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    if any(value is None for value in values):
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def report(recipe: Recipe, outcomes: Sequence[Outcome], folder: Path, console: Console, finished: bool) -> None:
    """Print the rows, and write them to summary.md and summary.json in the sweep's folder; `finished` says whether runs
    are still to come."""
    rows = rows_of(outcomes)
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    columns = ["rank", "learning rate", "held out", "seeds", *names]
    cells = [_cells(row, names) for row in rows]
    title = f"{recipe.name}, {recipe.method}" + ("" if finished else " (unfinished)")
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in cells:
        table.add_row(*row)
    console.print(table)
    lines = [columns, ["---"] * len(columns), *cells]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    write_whole(folder / f"{SUMMARY}.md", f"# {title}\n\n{text}")
    facts = {"recipe": recipe.name, "method": recipe.method, "finished": finished}
    facts |= {"rows": [asdict(row) for row in rows], "runs": [str(outcome.folder) for outcome in outcomes]}
    write_whole(folder / f"{SUMMARY}.json", json.dumps(facts, indent=2) + "\n")


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    seeds = " ".join(map(str, row.seeds)) + (f" ({row.diverged} diverged)" if row.diverged else "")
    scores = [shown(name, row.scores[name]) if name in row.scores else "-" for name in names]
    return [str(row.rank), f"{row.learning_rate:g}", str(row.validation_size), seeds, *scores]


def shown(name: str, spread: tuple[float, float | None]) -> str:
    """Losses in nats, everything else in percent, as the paper has it: mean and standard deviation."""
    factor, digits = (1, 4) if name.endswith("loss") else (100, 2)
    return " ± ".join(f"{factor * value:.{digits}f}" for value in spread if value is not None)
