"""A run as it lies on the disk: which recipe it followed, what it trained, how it went."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from sora_hw.errors import UserError
from sora_hw.recipes.recipe import FULL, Classification, LanguageModelling, Recipe
from sora_hw.storage import read_json
from sora_hw.training.checkpoints import STATE, newest
from sora_hw.training.run_folder import ADAPTER, MANIFEST, MODEL

# Of what a run ends with: numbers, and names with a number each; None stands for what was not measured.
NUMBERS = (
    *("steps", "final_loss", "validation_loss", "seconds"),
    *("tokens_per_second", "peak_memory_bytes", "trainable_percent"),
)
SCORES, QUESTIONS = ("validation", "test"), "embedded_questions"
SECTIONS = ("results", "data", "batch", "profile", "versions", "environment", "device_settings")  # of run.json


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder and what its run.json says.

    `manifest` holds what `sora_hw.training.run` wrote; `recipe` is the recipe it resolved to.
    """

    path: Path
    manifest: Mapping[str, object]
    recipe: Recipe

    @property
    def status(self) -> str:
        """ "started", "interrupted", "finished" or "diverged"."""
        return str(self.manifest.get("status"))

    @property
    def trained_folder(self) -> Path:
        """Where the adapter or, after full fine-tuning, the model is, or would be."""
        return self.path / (MODEL if self.recipe.method == FULL else ADAPTER)

    @property
    def results(self) -> Mapping[str, object]:
        """What the run ended with, as `sora_hw.training.run.finish` gives it; empty where it has not finished."""
        return self.manifest.get("results") or {}

    @property
    def trained(self) -> Path:
        """The folder of the adapter or, after full fine-tuning, of the model. Raises UserError where there is none."""
        folder = self.trained_folder
        if not folder.is_dir():
            raise UserError(f"{self.path}: the run has left no {folder.name}/ (its status: {self.status})")
        return folder

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """What the run logged, in the order of its steps: `step`, and `loss` with `learning_rate`, `tokens_per_second`
        and `peak_memory_gib`, or `eval_loss`.

        Of a run that has not finished, what its newest checkpoint knows; empty where there is none. Raises UserError
        where the file is damaged.
        """
        checkpoint, _ = newest(self.path)
        file = checkpoint / STATE if checkpoint and self.status in ("started", "interrupted") else self.path / STATE
        if not file.exists():
            return []
        try:
            history = list(read_json(file)["log_history"])
            for entry in history:
                list(map(float, (value for value in entry.values() if isinstance(value, int))))  # no float holds all
            if all(isinstance(entry["step"], int) for entry in history):
                return history
            raise ValueError
        except (OSError, ValueError, OverflowError, LookupError, TypeError, AttributeError):
            raise UserError(f"{file} is damaged") from None


def read_run(folder: Path, model: str | None = None) -> FinishedRun:
    """The run in `folder`, on the base model `model` where that has moved from where run.json names it.

    Raises UserError where there is none, or its run.json is damaged or of another version.
    """
    file = folder / MANIFEST
    if not file.exists():
        raise UserError(f"{folder}: no run there (it has no {MANIFEST})")
    try:
        manifest = read_json(file)
        values = dict(manifest["recipe"])
        for section in SECTIONS:
            dict(manifest.get(section) or {})
        _check_results(manifest.get("results") or {})
    except (OSError, ValueError, OverflowError, KeyError, TypeError):
        raise UserError(f"{file} is damaged") from None
    kind = Classification if "task" in values else LanguageModelling
    known = {field.name for field in fields(kind)}
    if known != set(values):
        differing = ", ".join(sorted(known ^ set(values)))
        raise UserError(f"{file}: its recipe is of another version of sora_hw (differing: {differing})")
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    if wrong := [field.name for field in fields(kind) if not _is_of(values[field.name], field.type)]:
        raise UserError(f"{file} is damaged: the {wrong[0]} of its recipe is of another type than a recipe has")
    try:
        recipe = kind(**{**values, "model": model or values["model"]})
    except UserError as error:  # it speaks of a flag
        raise UserError(f"{file}: its recipe does not exist here ({error})") from None
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{file} is damaged") from None
    return FinishedRun(folder, manifest, recipe)


def _check_results(results: Mapping[str, object]) -> None:
    """Raises ValueError, OverflowError, KeyError or TypeError where anything else stands in the place of a number."""
    values = [results.get(name) for name in NUMBERS]
    values += [value for name in SCORES for value in dict(results.get(name) or {}).values()]
    if questions := results.get(QUESTIONS):
        values += [float(questions[name]) for name in ("questions", "chance", "before", "after")]
    for value in values:
        if value is not None and not (_is_of(value, float) and math.isfinite(value)):
            raise ValueError


def _is_of(value: object, kind: object) -> bool:
    """Whether a value may stand in a recipe's field of this type."""
    if kind == tuple[str, ...]:
        return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def read_runs(folders: Sequence[Path], model: str | None = None) -> list[FinishedRun]:
    """The runs in `folders`, each of which holds one, or is that of a sweep and holds several; `model` as `read_run`
    has it. Raises UserError for a folder with neither.
    """
    runs = []
    for folder in folders:
        inside = (
            [folder] if (folder / MANIFEST).exists() else sorted(each.parent for each in folder.glob(f"*/{MANIFEST}"))
        )
        if not inside:
            raise UserError(f"{folder}: neither a run nor a sweep (no {MANIFEST} in it or one folder below)")
        runs += [read_run(each, model) for each in inside]
    return runs
