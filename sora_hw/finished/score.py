"""Scoring a finished run, or a base model, on the benchmark's tasks: what `launchers/score.py` does."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sora_hw.devices.detect import select
from sora_hw.evaluation import harness
from sora_hw.evaluation.generation import NEW_TOKENS, GeneratedAnswers, Generator
from sora_hw.evaluation.scorer import Scorer
from sora_hw.evaluation.tasks import TASKS
from sora_hw.finished.beside_paper import score_tables
from sora_hw.finished.loading import Loaded, load, profile_for, weights
from sora_hw.finished.predictions import PredictionFile, take_folder
from sora_hw.finished.run import read_run
from sora_hw.finished.score_request import Piece, Request, parse, pieces, recipe_of
from sora_hw.finished.scores import (
    ACCURACY,
    GENERATION,
    LIKELIHOOD,
    NORMALISED,
    STRICT,
    Score,
    read_facts,
    read_scores,
    write_scores,
)
from sora_hw.finished.tables import print_tables, write_tables
from sora_hw.terminal import Console
from sora_hw.training.callbacks import PLAIN_LINES, duration
from sora_hw.training.environment import rank, rank_here
from sora_hw.training.launch import exit_code
from sora_hw.training.ranks import leave, start_without_engine
from sora_hw.training.report import facts, kernels
from sora_hw.training.run_folder import check_writable
from sora_hw.versions import check_versions

METRICS = {"correct": ACCURACY, "correct_normalised": NORMALISED, "strict_correct": STRICT}  # by a prediction's fields
INTERRUPTED = "interrupted; the same command goes on from the predictions made so far"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the launcher; its exit code: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    return exit_code(lambda: score(parse(argv)), INTERRUPTED)


def score(request: Request) -> None:
    """Do what the command line asks for. Nothing is created before everything has been checked. Raises UserError."""
    check_versions(unneeded=("deepspeed",))
    console = Console(quiet=rank() > 0)
    device = select(request.backend)
    run = read_run(request.adapter) if request.adapter else None
    recipe = recipe_of(request, run)
    asked = pieces(request, recipe)
    if any(piece.protocol == LIKELIHOOD for piece in asked):
        harness.check_installed()
    check_writable(request.folder)
    profile = profile_for(run, device)

    start_without_engine(device, profile)
    here = device.torch_device(rank_here())
    scorers = _scorers(asked, load(recipe, run, profile, here), here, request.batch_size)
    named = zip(asked, scorers, strict=True)
    files = [PredictionFile(request.folder, piece.name, scorer.metrics) for piece, scorer in named]
    known = {"model": recipe.model, "weights": weights(recipe, run), "device": device.type, "dtype": profile.dtype}
    known |= {"four_bit": profile.four_bit}
    if dist.get_rank() == 0:
        questions = {piece.name: scorer.fingerprint for piece, scorer in zip(asked, scorers, strict=True)}
        take_folder(request.folder, known, questions, request.overwrite)
        for file in files:
            file.gather()
    dist.barrier()
    console.print(
        f"{f'{recipe.method} of {run.path} on ' if run else ''}{recipe.model}: {device.display_name} "
        f"({device.name()}), {profile.dtype}, {dist.get_world_size()} ranks x {request.batch_size} texts, kernels of "
        f"{kernels(device)}"
    )
    seconds = _predict(asked, scorers, files, request.batch_size, console)
    if dist.get_rank() == 0:
        predictions = [file.finish(len(scorer.lengths)) for file, scorer in zip(files, scorers, strict=True)]
        known |= {"adapter": str(run.trained) if run else None, "recipe": recipe.name if run else None}
        known |= {"method": recipe.method if run else None, **facts(device), "ranks": dist.get_world_size()}
        known |= {"batch_size": request.batch_size, "seconds": seconds, "data": questions}
        _write(request.folder, asked, scorers, predictions, known)
        rate = run.results.get("trainable_percent") if run else None
        tables = score_tables(recipe, read_scores(request.folder), tuned=run is not None, rate=rate)
        write_tables(tables, request.folder)
        print_tables(tables, console)
        console.print(f"scores and predictions: {request.folder}")
    leave()


def _scorers(asked: Sequence[Piece], loaded: Loaded, device: torch.device, batch_size: int) -> list[Scorer]:
    model = None
    if any(piece.protocol == LIKELIHOOD for piece in asked):
        model = harness.harness_model(loaded.model, loaded.tokenizer, batch_size)

    def scorer(piece: Piece) -> Scorer:
        if piece.protocol == GENERATION:
            generator = Generator(loaded.model, loaded.tokenizer, device, NEW_TOKENS[piece.task.kind])
            return GeneratedAnswers(piece.task, piece.records, generator)
        local = piece.records is not None
        task = harness.local_task(piece.task, piece.records) if local else harness.official_task(piece.task)
        return harness.HarnessChoices(piece.task, task, model)

    return list(map(scorer, asked))


def _predict(
    asked: Sequence[Piece],
    scorers: Sequence[Scorer],
    files: Sequence[PredictionFile],
    batch_size: int,
    console: Console,
) -> float:
    """Predict what is missing, each rank its share of every task; the seconds that took until all were done."""
    shares = [_share(scorer, file) for scorer, file in zip(scorers, files, strict=True)]
    dist.barrier()  # nobody writes while others read
    started = time.monotonic()
    with _progress(sum(map(len, shares)), console) as done:
        for piece, scorer, file, share in zip(asked, scorers, files, shares, strict=True):
            with file.appending(dist.get_rank()) as part:
                for first in range(0, len(share), batch_size):
                    batch = share[first : first + batch_size]
                    part.write(zip(batch, scorer.predict(batch), strict=True))
                    done(len(batch), piece.name)
    dist.barrier()
    return time.monotonic() - started


def _share(scorer: Scorer, file: PredictionFile) -> list[int]:
    """This rank's part of the records that have no prediction yet, the longest first: what does not fit into memory
    shows at once, and every rank has as many of each length."""
    there = file.read()
    missing = [number for number in range(len(scorer.lengths)) if number not in there]
    missing.sort(key=lambda number: -scorer.lengths[number])
    return missing[dist.get_rank() :: dist.get_world_size()]


@contextmanager
def _progress(total: int, console: Console) -> Iterator:
    """Rank 0's progress through its share: a bar on a terminal, now and then a line elsewhere."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield lambda count, name: bar.update(task, advance=count, description=name)
        return
    started, step = time.monotonic(), max(1, total // PLAIN_LINES)
    reached = 0

    def line(count: int, name: str) -> None:
        nonlocal reached
        before, reached = reached, reached + count
        if reached // step > before // step or reached == total:
            left = duration((time.monotonic() - started) / reached * (total - reached))
            console.print(f"{reached}/{total} records of rank 0  {name}  {left} left")

    yield line


def _write(
    folder: Path,
    asked: Sequence[Piece],
    scorers: Sequence[Scorer],
    predictions: Sequence[list[dict[str, object]]],
    known: Mapping[str, object],
) -> None:
    """Write scores.json: these scores, and those that an earlier call found for other tasks of the same model."""
    scores, counts = [], {}
    for piece, scorer, found in zip(asked, scorers, predictions, strict=True):
        for field in scorer.metrics:
            share = sum(bool(each[field]) for each in found) / len(found)
            scores.append(Score(piece.protocol, piece.task.name, METRICS[field], share, len(found)))
        unanswered = sum("extracted" in each and each["extracted"] is None for each in found)
        counts[piece.name] = {"unanswered": unanswered, "cut": sum(bool(each["cut"]) for each in found)}
    names = {piece.name for piece in asked}
    scores += [score for score in read_scores(folder) if f"{score.protocol}/{score.task}" not in names]
    scores.sort(key=lambda score: ([LIKELIHOOD, GENERATION].index(score.protocol), [*TASKS].index(score.task)))
    earlier = read_facts(folder)
    both = {name: {**earlier.get(name, {}), **now} for name, now in (("data", known["data"]), ("counts", counts))}
    write_scores(folder, scores, {**known, **both})
