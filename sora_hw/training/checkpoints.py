"""Checkpoints of a run: written whole or not at all, checked before they are gone on from, the old ones deleted.

checkpoint-N/checkpoint.json       the checksum of every other file; without it there is no checkpoint
checkpoint-N/state-K.safetensors   trained weights and moments in float32, by name; see `sora_hw.training.engine_state`
checkpoint-N/schedule.json         the steps of the optimiser and the state of the learning rate
checkpoint-N/trainer_state.json    the Trainer's: the step, and all that was logged
checkpoint-N/rng_state_R.pth       random numbers of rank R, on the processor and its device
checkpoint-N/adapter/              the adapter as it is then, to be loaded by PEFT

Nothing in it is a pickle that could run a program: tensors are safetensors, and the random numbers are read by torch's
loader of plain values.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from pickle import UnpicklingError

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sora_hw.errors import UserError
from sora_hw.storage import check_regular, read_json, sync_folder, write_whole
from sora_hw.training.divergence import check_finite

SEAL, SCHEDULE, STATE = "checkpoint.json", "schedule.json", "trainer_state.json"
STATES, RANDOM = "state-*.safetensors", "rng_state*.pth"
VERSION = 1
KEPT = 2  # of the newest: should the last one turn out to be damaged, there is another
LARGEST_FILE = 4 * 2**30  # bytes of tensors that are held in memory until they are written


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder aside for every rank to write into, `together`, which becomes `folder` at the end. Every rank must enter
    it.

    Raises UserError, on every rank, where one of them could not write; then nothing of it is left.
    """
    aside = folder.with_name(f"{folder.name}.part")
    try:
        with together(folder):
            if dist.get_rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        yield aside
        with together(folder):
            if dist.get_rank() == 0:
                _seal(aside)
                delete(folder)  # of an earlier start, that this one has gone on from before
                os.rename(aside, folder)
                sync_folder(folder.parent)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def together(folder: Path) -> Iterator[None]:
    """What one rank cannot write into `folder` ends all of them, which would wait for it otherwise. Nobody may wait for
    others inside. Raises UserError."""
    problem = None
    try:
        yield
    except (OSError, UserError, SafetensorError, RuntimeError) as error:  # torch.save raises the last on a full disk
        problem = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, problem in enumerate(problems):
        if problem:
            raise UserError(
                f"{folder} cannot be written by rank {rank} ({problem}); that mended, --resume goes on from the "
                "last checkpoint"
            )


def write_state(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as they come into state-K.safetensors. Every rank must call it with all tensors; rank 0 writes.

    Raises UserError, on every rank, where it cannot.
    """
    for number, part in enumerate(_parts(tensors)):
        with together(folder):
            if dist.get_rank() == 0:
                save_file(part, folder / f"state-{number}.safetensors")


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The tensors in the host's memory on rank 0, and none on the others, so many at a time as fit into a file."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        check_finite(name, tensor)
        if dist.get_rank() == 0:
            part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= LARGEST_FILE:
            yield part
            part, size = {}, 0
    if size:
        yield part


@contextmanager
def reading_state(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """What gives a tensor of a checkpoint by its name; read when it is asked for."""
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(file, framework="pt")) for file in sorted(folder.glob(STATES))]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (no dictionary)
        yield lambda name: where[name].get_tensor(name)


def state_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint."""
    shapes = {}
    for file in sorted(folder.glob(STATES)):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes


def _seal(folder: Path) -> None:
    """Write down what every file must be."""
    sums = {str(file.relative_to(folder)): _sha256(file) for file in sync(folder)}
    write_whole(folder / SEAL, json.dumps({"version": VERSION, "sha256": sums}, indent=2) + "\n")


def sync(folder: Path) -> list[Path]:
    """Make sure that all that lies in `folder` is on the disk; its files."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        sync_folder(file.parent)
    return files


def _sha256(file: Path) -> str:
    check_regular(file)
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def damage(checkpoint: Path) -> str | None:
    """Why there is nothing to go on from in the folder, in a few words, or None.

    Every file is read and compared with what it was when the checkpoint was written, so that one that was cut off,
    changed or put there from another checkpoint is found. Where the run would end with an earlier checkpoint, the best
    so far, that one must be whole as well.
    """
    if reason := _damage_inside(checkpoint):
        return reason
    best = best_of(checkpoint)
    reason = best and best != checkpoint and _damage_inside(best)
    return f"{best.name}, the best so far: {reason}" if reason else None


def best_of(checkpoint: Path) -> Path | None:
    """The one with the lowest validation loss of a run that keeps it, as of a whole checkpoint, beside which it is."""
    step = read_json(checkpoint / STATE).get("best_global_step")
    return checkpoint.with_name(f"checkpoint-{step}") if step else None


def _damage_inside(checkpoint: Path) -> str | None:
    if not (checkpoint / SEAL).is_file():
        return f"{SEAL} is missing"
    try:
        seal = read_json(checkpoint / SEAL)
        version, sums = seal["version"], dict(seal["sha256"])
        if version != VERSION:
            return f"it is of version {version}, this sora_hw reads version {VERSION}"
        for name, sha256 in sums.items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if _sha256(file) != sha256:
                return f"{name} is damaged"
        there = [file.name for pattern in (STATES, RANDOM) for file in checkpoint.glob(pattern)]
        for name in (*there, "state-0.safetensors", SCHEDULE, STATE):  # what is gone on from
            if name not in sums:
                return f"{name} is none of its files"
        if not any(fnmatch(name, RANDOM) for name in sums):
            return "its random numbers are missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is damaged"
    try:
        state = read_json(checkpoint / STATE)
        step, best, logged = state["global_step"], state.get("best_global_step"), list(state["log_history"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE} is damaged"
    if not (isinstance(step, int) and isinstance(best, int | None) and all(isinstance(each, dict) for each in logged)):
        return f"{STATE} is damaged"
    return None if checkpoint.name == f"checkpoint-{step}" else f"it is that of step {step}"


@contextmanager
def going_on_from(checkpoint: Path) -> Iterator[None]:
    """Its checksums tell what happened to a checkpoint, not what whoever wrote them has put there. Raises UserError for
    what cannot be gone on from."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        SafetensorError,
        TypeError,
        UnpicklingError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, UnpicklingError):  # whose text says how to run what it holds
            reason = "its random numbers are none, or hold a program"
        raise UserError(f"{checkpoint} cannot be gone on from, though its checksums are right ({reason})") from None


def checkpoints(run: Path) -> list[Path]:
    """The folders called checkpoint-N, in the order of N."""
    steps = {folder: folder.name.removeprefix("checkpoint-") for folder in run.glob("checkpoint-*")}
    return sorted((folder for folder, step in steps.items() if step.isdecimal()), key=lambda folder: int(steps[folder]))


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The last checkpoint that is whole, and one line on each that was passed over for it."""
    passed_over = []
    for checkpoint in reversed(checkpoints(run)):
        if (reason := damage(checkpoint)) is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint} is left out: {reason}")
    return None, passed_over


def prune(run: Path, best: Path | None) -> None:
    """Delete all checkpoints but the newest and the best. For one rank."""
    for checkpoint in checkpoints(run)[:-KEPT]:
        if best is None or checkpoint.name != best.name:
            delete(checkpoint)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint's folder if it is there; half of it is never taken for a whole one."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f"{checkpoint.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(checkpoint, aside)
        shutil.rmtree(aside)


def clear(run: Path) -> None:
    """Delete what an earlier start had no time to finish: checkpoints half written or half deleted. For one rank."""
    for ending in ("part", "old"):
        for folder in run.glob(f"checkpoint-*.{ending}"):
            shutil.rmtree(folder, ignore_errors=True)
