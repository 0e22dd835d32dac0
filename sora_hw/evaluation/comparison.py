"""Finished sweeps in one table: a row for every method, a column for every task, the paper's score in brackets."""

import json
from collections.abc import Sequence
from pathlib import Path

from sora_hw.data.glue import TASKS
from sora_hw.errors import UserError
from sora_hw.recipes.published import GLUE, GLUE_AVERAGE

SUMMARY = "summary.json"  # as `sora_hw.training.sweep_report` leaves it


def comparison(sweeps: Sequence[Path]) -> str:
    """Markdown: mean and standard deviation over the seeds, in percent, of each sweep's last setting, which is the one
    that its learning rate was chosen for; and of each method the mean over the tasks.

    Raises UserError for a folder that holds no finished sweep, or one that does not score.
    """
    scores: dict[str, dict[str, tuple[float, float | None]]] = {}
    for folder in sweeps:
        summary = _summary(folder)
        tested = [spread for name, spread in summary["rows"][-1]["scores"].items() if name.startswith("test ")]
        if not tested:
            raise UserError(f"{folder}: the runs of this sweep were not scored; give them --test-data")
        scores.setdefault(summary["method"], {})[summary["recipe"].removeprefix("glue-")] = tested[0]
    tasks = list(dict.fromkeys(task for row in scores.values() for task in row))
    lines = [["method", *tasks, "mean"], ["---"] * (len(tasks) + 2)]
    lines += [_row(method, row, tasks) for method, row in scores.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(folder: Path) -> dict:
    try:
        return json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: no finished sweep there ({SUMMARY} is missing or damaged)") from None


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
