"""The command line `sora-hw`.

    sora-hw doctor      what this machine has, what is missing, and what to do about it
    sora-hw plan        what a launcher would do, whether it fits, and the variables for several machines
    sora-hw compare     sweeps beside one another and beside the paper
    sora-hw merge       an adapter merged into its base model: a plain model
    sora-hw export      an adapter as an exact plain LoRA
    sora-hw import      a checkpoint of the authors' released code as an adapter

A subcommand is a function `(arguments, console) -> exit code`, added in `_parser`. Exit codes: 0 for success, 1 for a
finding that the subcommand exists to report, 2 for an error of the user's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from sora_hw import __version__
from sora_hw.devices.cpu import CPU
from sora_hw.doctor import examine, ready
from sora_hw.errors import UserError
from sora_hw.recipes import BENCHMARKS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; an error of the user's is one line on the standard error."""
    try:
        arguments, rest = _parser().parse_known_args(argv)
        if rest and arguments.run is not plan:
            raise UserError(f"unrecognized arguments: {' '.join(rest)}; see --help")
        arguments.rest = rest
        return arguments.run(arguments, Console())
    except UserError as error:
        print("sora-hw:", re.sub(r"\s*\n\s*", " ", str(error)), file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sora-hw", description="Weight-conditioned adapters: tools beside training.")
    parser.add_argument("--version", action="version", version=f"sora-hw {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser("doctor", help="what this machine has, what is missing, and what to do about it")
    command.set_defaults(run=doctor)
    command = commands.add_parser(
        "plan", help="what a launcher would do: memory, steps, settings", epilog="Further flags are the launcher's."
    )
    command.add_argument("benchmark", choices=BENCHMARKS)
    command.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="plan for its machines, and write .deepspeed_env for them"
    )
    command.set_defaults(run=plan)
    command = commands.add_parser("compare", help="sweeps beside one another and beside the paper")
    command.add_argument("sweeps", nargs="+", type=Path, metavar="SWEEP", help="folder of a sweep")
    command.set_defaults(run=compare)
    _add_conversion(commands, "merge", merge, "folder of a run or an adapter", "an adapter merged into its base model")
    _add_conversion(commands, "export", export, "folder of a run or an adapter", "an adapter as an exact plain LoRA")
    _add_conversion(
        commands, "import", import_, "its folder", "a checkpoint of the authors' released code as an adapter"
    )
    return parser


def _add_conversion(commands, name: str, run: Callable, source: str, help: str) -> None:
    """A subcommand that makes another folder of a folder."""
    command = commands.add_parser(name, help=help)
    command.add_argument("source", type=Path, metavar="FOLDER", help=source)
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    command.add_argument("--model", metavar="FOLDER_OR_ID", help="the base model [the one it was trained on]")
    command.set_defaults(run=run)


def plan(arguments: argparse.Namespace, console: Console) -> int:
    """Print what the launcher of a benchmark would do; 2 where it cannot, or does not fit."""
    from sora_hw.training import launch  # brings the libraries of training, which the doctor may find missing

    launch.silence()
    launch.plan(importlib.import_module(f"sora_hw.recipes.{arguments.benchmark}"), arguments.rest, arguments.hostfile)
    return 0


def compare(arguments: argparse.Namespace, console: Console) -> int:
    """Print the table of finished sweeps, as Markdown."""
    from sora_hw.finished.comparison import comparison

    console.print(comparison(arguments.sweeps), markup=False, highlight=False, soft_wrap=True)
    return 0


def merge(arguments: argparse.Namespace, console: Console) -> int:
    """Write the base model with an adapter merged into it."""
    from sora_hw.finished.merging import merge

    _work_quietly_in_host_memory()
    merge(arguments.source, arguments.output, arguments.model, console)
    return 0


def export(arguments: argparse.Namespace, console: Console) -> int:
    """Write an adapter as a plain LoRA, and tell what was folded into a copy of the base model."""
    from sora_hw.finished.exporting import export

    _work_quietly_in_host_memory()
    export(arguments.source, arguments.output, arguments.model, console)
    return 0


def import_(arguments: argparse.Namespace, console: Console) -> int:
    """Write the authors' checkpoint as an adapter, and tell how near it is to their formula."""
    from sora_hw.finished.importing import import_checkpoint

    _work_quietly_in_host_memory()
    import_checkpoint(arguments.source, arguments.output, arguments.model, console)
    return 0


def _work_quietly_in_host_memory() -> None:
    """Libraries keep their notes to themselves; DeepSpeed, which transformers imports to save a model, too."""
    from sora_hw.training import launch

    launch.silence()
    os.environ.setdefault("DS_ACCELERATOR", CPU.deepspeed_accelerator)


def doctor(arguments: argparse.Namespace, console: Console) -> int:
    """Print the facts of this machine; 0 where training can start, 1 where something is broken."""
    problems = []
    for section in examine():
        if section.table.row_count == 0:
            continue
        console.print(section.table)
        for note in section.notes:
            console.print(f"  {note}", markup=False, highlight=False, soft_wrap=True)
        console.print()
        problems += section.problems
    for problem in problems:
        console.print(f"broken: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if not problems:
        console.print(f"Ready: training can start on {' or '.join(ready())}.", style="green")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
