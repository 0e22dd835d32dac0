"""Finished sweeps in one table: a row for every method, a column for every task, the paper's score in brackets."""

import json
from collections.abc import Sequence
from pathlib import Path

from sora_hw.data.glue import TASKS
from sora_hw.errors import UserError
from sora_hw.recipes.published import GLUE, GLUE_AVERAGE
from sora_hw.training.sweep_report import SUMMARY


def comparison(sweeps: Sequence[Path]) -> str:
    """Markdown: mean and standard deviation over the seeds, in percent, of each sweep's last setting, which is the one
    that its learning rate was chosen for; and of each method the mean over the tasks.

    Raises UserError for a folder that holds no finished sweep, or one that does not score, and for a second sweep of
    the same method on the same task, for which the table has no place.
    """
    scores: dict[str, dict[str, tuple[float, float | None]]] = {}
    for folder in sweeps:
        method, recipe, tested = _summary(folder)
        task = recipe.removeprefix("glue-")
        if not tested:
            how = "give them --test-data" if task in TASKS else "only GLUE's launcher scores what it trains"
            raise UserError(f"{folder}: the runs of this sweep were not scored; {how}")
        if task in scores.setdefault(method, {}):
            raise UserError(f"{folder}: a second sweep of {method} on {task}; compare one of them at a time")
        scores[method][task] = tested[0]
    tasks = list(dict.fromkeys(task for row in scores.values() for task in row))
    lines = [["method", *tasks, "mean"], ["---"] * (len(tasks) + 2)]
    lines += [_row(method, row, tasks) for method, row in scores.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(folder: Path) -> tuple[str, str, list[tuple[float, float | None]]]:
    """Method and recipe of a sweep, and the test scores of its last setting."""
    try:
        summary = json.loads((folder / f"{SUMMARY}.json").read_text())
        scores = summary["rows"][-1]["scores"]
        tested = [(mean, spread) for name, (mean, spread) in scores.items() if name.startswith("test ")]
        return summary["method"], summary["recipe"], tested
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{folder}: no finished sweep there ({SUMMARY}.json is missing or damaged)") from None


def _row(method: str, row: dict[str, tuple[float, float | None]], tasks: Sequence[str]) -> list[str]:
    cells = [_cell(row.get(task), GLUE.get(method, {}).get(task)) for task in tasks]
    mean = 100 * sum(mean for mean, _ in row.values()) / len(row)
    whole = method in GLUE_AVERAGE and set(tasks) == set(TASKS)  # a mean over other tasks cannot be compared
    paper = f" ({GLUE_AVERAGE[method]:.2f})" if whole else ""
    return [method, *cells, f"{mean:.2f}{paper}" if len(row) == len(tasks) else "-"]


def _cell(ours: tuple[float, float | None] | None, papers: tuple[float, float] | None) -> str:
    if ours is None:
        return "-"
    shown = " ± ".join(f"{100 * value:.2f}" for value in ours if value is not None)
    return f"{shown} ({papers[0]:.2f} ± {papers[1]:.2f})" if papers else shown
