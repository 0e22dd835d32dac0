"""What is to be scored: the command line of `launchers/score.py`, and the tasks, protocols and records it means."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sora_hw.data.records import ChoiceRecord, Record, read_choices, read_questions
from sora_hw.devices.detect import BACKENDS
from sora_hw.errors import Parser, UserError
from sora_hw.evaluation.answers import check_gold
from sora_hw.evaluation.tasks import COMMONSENSE, MATH, TASKS, Task
from sora_hw.finished.run import FinishedRun
from sora_hw.finished.scores import FOLDER, GENERATION, LIKELIHOOD
from sora_hw.recipes import commonsense, metamath
from sora_hw.recipes.recipe import FULL, Classification, Recipe
from sora_hw.training.arguments import path
from sora_hw.training.run_folder import RUNS

BOTH = "both"
KINDS = {commonsense.recipe().name: COMMONSENSE, metamath.recipe().name: MATH}  # of tasks, by the recipe's name
NAMES = ("{}.test.jsonl.gz", "{}.test.jsonl", "{}.test.json", "{}/test.json")  # of a task's file in a data folder


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `adapter` or `model` is given, and not the other."""

    adapter: Path | None
    model: str | None
    tasks: tuple[str, ...]
    data: tuple[Path, ...]
    protocol: str | None
    backend: str
    batch_size: int
    output: Path | None
    overwrite: bool

    @property
    def folder(self) -> Path:
        """Where predictions and scores are written to."""
        if self.output:
            return self.output
        if self.adapter:
            return self.adapter / FOLDER
        return RUNS / f"{FOLDER}-{self.model.strip('/').replace('/', '-')}"


@dataclass(frozen=True)
class Piece:
    """One task under one protocol, with its records; None where they are the harness' own."""

    protocol: str
    task: Task
    records: Sequence[Record] | Sequence[ChoiceRecord] | None

    @property
    def name(self) -> str:
        """As its file of predictions is called."""
        return f"{self.protocol}/{self.task.name}"


def parse(argv: Sequence[str] | None = None) -> Request:
    """The request of `argv` (default: the command line). Raises UserError for flags and values that do not exist."""
    parser = Parser(
        description="Score what a run has trained, or a base model, on the tasks of the paper.", allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", type=path, metavar="RUN", help="a run's folder")
    what.add_argument("--model", metavar="NAME", help="a base model alone: a folder, an id of the hub, or `embedded`")
    parser.add_argument(
        *("--tasks",),
        nargs="+",
        choices=TASKS,
        metavar="NAME",
        default=(),
        help=f"of {', '.join(TASKS)} [those of the run's benchmark; of a base model those that --data has]",
    )
    parser.add_argument(
        *("--data",),
        nargs="+",
        type=path,
        metavar="FOLDER",
        default=(),
        help="with TASK.test.jsonl.gz (.jsonl, .json), or TASK/test.json as in LLM-Adapters' dataset folder "
        "[the harness' own data, from the hub]",
    )
    parser.add_argument(
        *("--protocol",),
        choices=(LIKELIHOOD, GENERATION, BOTH),
        help="lm-evaluation-harness' log-likelihoods, or LLM-Adapters' generated answers "
        f"[{BOTH}; without --data {LIKELIHOOD}]",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="device type to score on [auto]")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="texts at a time per rank; changes no score [16]"
    )
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help=f"of predictions and scores [RUN/{FOLDER}, {RUNS}/{FOLDER}-NAME]"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the predictions that the folder holds")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from DeepSpeed's launcher
    given = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    if given["batch_size"] < 1:
        raise UserError(f"--batch-size {given['batch_size']}: must be at least 1")
    del given["local_rank"]
    return Request(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def recipe_of(request: Request, run: FinishedRun | None) -> Recipe:
    """The run's recipe, or one by which a base model is taken as it is.

    Raises UserError for a run whose model does not answer questions.
    """
    if run is None:
        return replace(commonsense.recipe(), model=request.model, method=FULL)
    if isinstance(run.recipe, Classification):
        tested = run.results.get("test") or {}
        found = ", ".join(f"{name} {value:.4f}" for name, value in tested.items())
        raise UserError(
            f"{run.path} is a run of GLUE, which is scored while it trains "
            + (f"(its test {found}); `sora-hw compare` shows a sweep of them" if found else "with --test-data")
        )
    return run.recipe


def pieces(request: Request, recipe: Recipe) -> list[Piece]:
    """Every task under every protocol that the request means, with the records read.

    Raises UserError for what cannot be scored so, DataError for what is wrong with a file.
    """
    tasks = _tasks(request, recipe)
    wanted = _protocols(request)
    found = [(protocol, task) for protocol in wanted for task in tasks if protocol == GENERATION or task.harness]
    if request.protocol == LIKELIHOOD and (without := [task.name for task in tasks if not task.harness]):
        raise UserError(f"--protocol {LIKELIHOOD}: {', '.join(without)} cannot be scored so; use {GENERATION}")
    if not found:
        raise UserError(_needs_data(f"{tasks[0].name} and its like are scored by generated answers, which need files"))
    return [Piece(protocol, task, _records(request, protocol, task)) for protocol, task in found]


def _tasks(request: Request, recipe: Recipe) -> list[Task]:
    if request.tasks:
        return [task for name, task in TASKS.items() if name in request.tasks]
    if request.model and request.data:
        if there := [task for task in TASKS.values() if _file(task, request.data)]:
            return there
        raise UserError(_nothing_there(request, next(iter(TASKS.values()))))
    kind = KINDS.get(recipe.name, COMMONSENSE)
    return [task for task in TASKS.values() if task.kind == kind]


def _protocols(request: Request) -> list[str]:
    if not request.data and request.protocol in (GENERATION, BOTH):
        raise UserError(_needs_data(f"--protocol {request.protocol} needs the questions in files"))
    if request.protocol in (LIKELIHOOD, GENERATION):
        return [request.protocol]
    return [LIKELIHOOD, GENERATION] if request.data else [LIKELIHOOD]


def _needs_data(what: str) -> str:
    return (
        f"{what}, for the hub has no official set of LLM-Adapters': give --data FOLDER, its dataset folder from GitHub "
        "or one with TASK.test.jsonl.gz"
    )


def _records(request: Request, protocol: str, task: Task) -> Sequence[Record] | Sequence[ChoiceRecord] | None:
    if not request.data:
        return None
    file = _file(task, request.data)
    if file is None:
        raise UserError(_nothing_there(request, task))
    return read_choices(file) if protocol == LIKELIHOOD else read_questions(file, lambda gold: check_gold(task, gold))


def _file(task: Task, folders: Sequence[Path]) -> Path | None:
    return next(
        (file for folder in folders for name in NAMES if (file := folder / name.format(task.name)).exists()), None
    )


def _nothing_there(request: Request, task: Task) -> str:
    folders, names = " ".join(map(str, request.data)), ", ".join(name.format(task.name) for name in NAMES)
    return f"--data {folders}: no questions of {task.name} there ({names}); give the folder, or choose with --tasks"
