"""A run's folder (run.json, checkpoint-N, adapter/ or model/): which run it holds, and whether one may go on."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path

from sora_hw.errors import UserError
from sora_hw.recipes.recipe import FULL, RUN, Recipe
from sora_hw.storage import read_json, write_whole
from sora_hw.training.arguments import NEWEST, Request
from sora_hw.training.checkpoints import STATE, best_of, checkpoints, clear, damage, delete, newest
from sora_hw.training.plan import Plan

MANIFEST, CURVE = "run.json", "loss.png"
ADAPTER, MODEL = "adapter", "model"  # what was trained
EVENTS = "tensorboard"
REPORT = "report.html"
LATER = ("scores", "spectrum.json", REPORT)  # what sora_hw.finished makes of the run, and is nothing without it
RUNS = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, the checkpoint that it continues from, and a line on each newer one that is damaged."""

    path: Path
    checkpoint: Path | None = None
    passed_over: Sequence[str] = ()

    def trained(self, recipe: Recipe) -> Path:
        """The folder for what the recipe trains: an adapter, or the whole model."""
        return self.path / (MODEL if recipe.method == FULL else ADAPTER)

    def create(self, overwrite: bool) -> None:
        """Make the folder; with `overwrite`, delete the run that it holds, and nothing else that lies in it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {self.path}: the folder cannot be made ({error.strerror})") from None
        clear(self.path)
        if overwrite:
            for entry in _traces(self.path):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def drop_checkpoints(self) -> None:
        """Delete them: a finished run goes on from none, and each is larger than what was trained."""
        for checkpoint in checkpoints(self.path):
            delete(checkpoint)

    def write_manifest(self, manifest: Mapping[str, object]) -> None:
        """Write run.json whole or not at all."""
        write_whole(self.path / MANIFEST, json.dumps(manifest, indent=2, allow_nan=False) + "\n")


def fingerprint(plan: Plan, steps: int, train_data: str, base_weights: str) -> dict[str, object]:
    """Everything that decides how a run goes on from a checkpoint, with the checksums of its data and of the model that
    it began from; ranks, ZeRO stage and device change no loss beyond rounding, so any may go on."""
    recipe = {
        field.name: getattr(plan.recipe, field.name)
        for field in fields(plan.recipe)
        if field.metadata.get("group") != RUN
    }
    decided = {"max_steps": steps, "train_data": train_data, "base_weights": base_weights}
    hardware = {name: asdict(plan.profile)[name] for name in ("dtype", "four_bit")}
    return json.loads(json.dumps(recipe | decided | hardware))  # in JSON's types, as they are read back


def open_folder(request: Request, plan: Plan, wanted: Mapping[str, object]) -> RunFolder:
    """The folder for a run with the fingerprint `wanted`, and where it resumes. Creates nothing.

    Raises UserError when the folder cannot be written or holds another run, or the checkpoint is missing or belongs to
    a run that differs.
    """
    path = request.output or _default(request, plan)
    check_writable(path)
    _check_links(path)
    traces = _traces(path)
    if request.resume in (None, NEWEST):
        if traces and not request.overwrite and not request.resume:
            raise UserError(
                f"--output {path} already holds a run; continue it with --resume, delete it with --overwrite"
            )
        if traces and request.overwrite and not (path / MANIFEST).exists():
            raise UserError(
                f"--output {path} holds {traces[0].name} but no {MANIFEST}: it is no run of this launcher, so it is "
                "not overwritten; name another folder"
            )
        checkpoint, passed_over = newest(path) if request.resume else (None, [])
        if request.resume and traces:
            _check_same(path, wanted, "--sweep" if request.sweep else "--resume")
    else:
        checkpoint = Path(request.resume).expanduser()
        if (checkpoint / MANIFEST).exists():
            raise UserError(
                f"--resume {checkpoint} is a run's folder: name one of its checkpoints, or give --output {checkpoint} "
                "--resume for the newest"
            )
        passed_over = []
        if reason := damage(checkpoint):
            raise UserError(f"--resume {checkpoint}: no checkpoint to go on from ({reason})")
        _check_same(checkpoint.absolute().parent, wanted, "--resume")
        elsewhere = path.resolve() != checkpoint.resolve().parent
        if elsewhere and _traces(path):
            raise UserError(f"--output {path} already holds another run than --resume {checkpoint}; name a new folder")
        if elsewhere and best_of(checkpoint):
            raise UserError(
                f"--output {path}: with --keep-best a run goes on where its checkpoints are, in {checkpoint.parent}"
            )
    return RunFolder(path, checkpoint, passed_over)


def _default(request: Request, plan: Plan) -> Path:
    """The checkpoint's folder, or the next free runs/RECIPE-METHOD-NUMBER (the last one, to resume or overwrite it)."""
    if request.resume not in (None, NEWEST):
        return Path(request.resume).expanduser().absolute().parent
    numbered = (RUNS / f"{plan.recipe.name}-{plan.recipe.method}-{number}" for number in count(1))
    last = None
    for folder in numbered:
        if not folder.exists():
            return last if last and (request.resume or request.overwrite) else folder
        last = folder
    raise AssertionError("count() does not end")


def _traces(path: Path) -> list[Path]:
    """What a run has left in `path`."""
    named = [path / name for name in (MANIFEST, ADAPTER, MODEL, CURVE, STATE, EVENTS, *LATER)]
    return [entry for entry in named if entry.exists()] + checkpoints(path)


def _check_links(path: Path) -> None:
    """Raises UserError where a link in the folder would lead what the run writes elsewhere: a stranger's may."""
    own = (MANIFEST, ADAPTER, MODEL, CURVE, STATE, EVENTS, *LATER)
    for entry in path.glob("*"):
        name = entry.name.removesuffix(".part").removesuffix(".old")
        if entry.is_symlink() and (name in own or name.startswith("checkpoint-")):
            raise UserError(f"--output {path}: {entry.name} in it is a link; a run writes only into its own folder")


def check_writable(path: Path) -> None:
    """Raises UserError where the folder --output cannot be made or written to."""
    existing = path.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from None
    if not existing.is_dir():
        raise UserError(f"--output {path}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: {existing} cannot be written to")


def _check_same(folder: Path, wanted: Mapping[str, object], flag: str) -> None:
    """Raises UserError, beginning with the `flag` that asked to go on, unless the run in `folder` is the one wanted."""
    try:
        found = read_json(folder / MANIFEST)["fingerprint"]
        differing = [name for name in wanted if found[name] != wanted[name]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{flag}: {folder / MANIFEST} is missing or damaged, so its recipe is unknown") from None
    if differing:
        name = differing[0]
        raise UserError(
            f"{flag}: the run in {folder} is another one: its {name} is {found[name]}, here it is {wanted[name]}"
        )
