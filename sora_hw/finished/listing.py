"""The runs and adapters below a folder, a line each: what they are, how they ended, how large they are.

Nothing is loaded: of a run, run.json and its scores are read, of an adapter its configuration.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.cells import cell_len

from sora_hw.errors import UserError, one_line, printable
from sora_hw.finished.comparison import compare_runs
from sora_hw.finished.run import QUESTIONS, FinishedRun, read_run
from sora_hw.finished.tables import NONE
from sora_hw.storage import read_json
from sora_hw.terminal import Console
from sora_hw.training.checkpoints import checkpoints
from sora_hw.training.run_folder import MANIFEST
from sora_hw.training.saving import ADAPTER_CONFIG

DEEPEST = 3  # folders below the one that is named
ADAPTER = "adapter"  # the status of one that lies there without its run

COLUMNS = ("folder", "method", "model", "status", "steps", "loss", "score", "of", "size", "date (UTC)")
NUMBERS = ("steps", "loss", "score", "size")


@dataclass(frozen=True)
class Listed:
    """What is known of a folder without loading anything; None is what is not.

    Attributes:
        folder: of the run or the adapter.
        date: when the run ended or, until then, began; of an adapter, when its configuration was written. ISO 8601.
        status: the run's, as `FinishedRun` has it, or "adapter".
        steps: taken by the run or, until it has finished, until its last checkpoint.
        loss: the training loss of the last step.
        score: in percent, of what `scored` names.
        size: of what was trained, in bytes.
        problem: in one line, why nothing is known.
    """

    folder: Path
    date: str | None = None
    method: str | None = None
    model: str | None = None
    status: str | None = None
    steps: int | None = None
    loss: float | None = None
    score: float | None = None
    scored: str | None = None
    size: int | None = None
    problem: str | None = None


def list_runs(folder: Path) -> list[Listed]:
    """The runs and adapters in `folder` and up to three folders below it, the newest last, damaged ones first.

    A folder inside of a run or an adapter is part of it, and links are not followed. Raises UserError where there is
    nothing, OSError where `folder` cannot be read.
    """
    os.scandir(folder).close()
    found = sorted(_found(folder, DEEPEST), key=lambda each: (each.date or "", each.folder))
    if not found:
        raise UserError(f"{folder}: no runs and no adapters there, nor up to {DEEPEST} folders below")
    return found


def _found(folder: Path, deeper: int) -> Iterator[Listed]:
    try:
        with os.scandir(folder) as inside:
            entries = {entry.name: entry for entry in inside}
        if MANIFEST in entries:
            yield _run(read_run(folder))
        elif ADAPTER_CONFIG in entries:
            yield _adapter(folder)
        elif deeper:
            for name, entry in entries.items():
                if entry.is_dir(follow_symlinks=False):
                    yield from _found(folder / name, deeper - 1)
    except (UserError, OSError) as error:
        yield Listed(folder, problem=one_line(error))


def _run(run: FinishedRun) -> Listed:
    results = run.results
    unfinished = [int(folder.name.rpartition("-")[2]) for folder in checkpoints(run.path)[-1:]]
    score, scored = _score(run)
    return Listed(
        run.path,
        _date(run.manifest.get("finished") or run.manifest.get("started"), run.path / MANIFEST),
        run.recipe.method,
        run.recipe.model,
        run.status,
        results.get("steps", next(iter(unfinished), None)),
        results.get("final_loss"),
        score,
        scored,
        _size(run.trained_folder),
    )


def _adapter(folder: Path) -> Listed:
    file = folder / ADAPTER_CONFIG
    try:
        config = read_json(file)
        method, model = config.get("method") or config.get("peft_type"), config.get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise UserError(f"{file} is damaged") from None
    return Listed(folder, _date(None, file), _text(method), _text(model), ADAPTER, size=_size(folder))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _date(told: object, file: Path) -> str:
    """What a file tells where that is a date, otherwise when it was written."""
    try:
        date = datetime.fromisoformat(told).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        date = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return date.isoformat(timespec="seconds")


def _score(run: FinishedRun) -> tuple[float | None, str | None]:
    """That of the first of its tables, the average where it has several tasks; otherwise the embedded questions'."""
    for table in compare_runs([run]):
        return table.rows[0].cells[-1].mean, table.columns[-1]
    questions: Mapping[str, float] = run.results.get(QUESTIONS) or {}
    return (100 * questions["after"], "held-out questions") if questions else (None, None)


def _size(folder: Path) -> int | None:
    """Of the weights, in bytes; None where there are none."""
    files = [file for file in folder.glob("*.safetensors") if file.is_file()]
    return sum(file.stat().st_size for file in files) if files else None


def print_list(found: Sequence[Listed], console: Console) -> None:
    """A table, and below it a line on each folder of which nothing is known."""
    rows = [_row(each) for each in found if each.problem is None]
    if rows:
        header, *lines = _aligned([COLUMNS, *rows])
        console.print(header, style="bold")
        console.print("\n".join(lines))
    for each in found:
        if each.problem is not None:
            console.print(each.problem)


def _row(each: Listed) -> tuple[str, ...]:
    """Of the table: a text for each of `COLUMNS`."""
    texts = [printable(text or NONE) for text in (str(each.folder), each.method, each.model, each.status, each.scored)]
    score, size = _shown(each.score, "{:.2f} %"), _shown(each.size and each.size / 2**20, "{:,.1f} MiB")
    numbers = _shown(each.steps, "{:,}"), _shown(each.loss, "{:.4f}"), score
    return (*texts[:4], *numbers, texts[4], size, each.date[:16].replace("T", " "))


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A line for each row. rich's own table takes seconds for a thousand of them."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        blanks = [" " * (width - cell_len(text)) for width, text in zip(widths, row, strict=True)]
        cells = zip(COLUMNS, row, blanks, strict=True)
        yield "  ".join(blank + text if name in NUMBERS else text + blank for name, text, blank in cells).rstrip()


def _shown(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def as_json(found: Sequence[Listed]) -> str:
    """A list with the fields of `Listed`."""
    return json.dumps([asdict(each) | {"folder": str(each.folder)} for each in found], indent=2, allow_nan=False) + "\n"
