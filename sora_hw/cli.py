"""The command line `sora-hw`.

    sora-hw doctor      what this machine has, what is missing, and what to do about it
    sora-hw plan        what a launcher would do, whether it fits, and the variables for several machines
    sora-hw runs        the runs and adapters in a folder, a line each
    sora-hw generate    answers of a trained adapter
    sora-hw compare     runs and sweeps beside one another and beside the paper
    sora-hw spectrum    singular values of what runs have learned, and the paper's figures of them
    sora-hw report      a run, or several beside one another, as one HTML page
    sora-hw merge       an adapter merged into its base model: a plain model
    sora-hw export      an adapter as an exact plain LoRA
    sora-hw import      a checkpoint of the authors' released code as an adapter

A subcommand is a function `(arguments, console) -> exit code`, added by its `_add_`. Exit codes: 0 for success, 1 for a
finding that the subcommand exists to report, 2 for an error of the user's.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sora_hw import __version__
from sora_hw.devices.cpu import CPU
from sora_hw.devices.detect import BACKENDS
from sora_hw.doctor import examine, ready
from sora_hw.errors import Parser, UserError, one_line
from sora_hw.recipes import BENCHMARKS
from sora_hw.terminal import Console, print_anything


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; an error of the user's is one line on the standard error."""
    print_anything()
    try:
        arguments, rest = _parser().parse_known_args(argv)
        if rest and arguments.run is not plan:
            raise UserError(f"unrecognized arguments: {' '.join(rest)}; see --help")
        arguments.rest = rest
        return arguments.run(arguments, Console())
    except (UserError, OSError) as error:
        print("sora-hw:", one_line(error), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="sora-hw", description="Weight-conditioned adapters: tools beside training.")
    parser.add_argument("--version", action="version", version=f"sora-hw {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    looking = (_add_runs, _add_generate, _add_compare, _add_spectrum, _add_report)
    converting = (_add_merge, _add_export, _add_import)
    for add in (_add_doctor, _add_plan, *looking, *converting):
        add(commands)
    return parser


def _add_doctor(commands) -> None:
    command = commands.add_parser("doctor", help="what this machine has, what is missing, and what to do about it")
    command.set_defaults(run=doctor)


def _add_plan(commands) -> None:
    command = commands.add_parser(
        "plan", help="what a launcher would do: memory, steps, settings", epilog="Further flags are the launcher's."
    )
    command.add_argument("benchmark", choices=BENCHMARKS)
    command.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="plan for its machines, and write .deepspeed_env for them"
    )
    command.set_defaults(run=plan)


def _add_runs(commands) -> None:
    command = commands.add_parser("runs", help="the runs and adapters in a folder, a line each")
    command.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER", help="of runs [runs]")
    command.add_argument("--format", choices=("terminal", "json"), default="terminal", help="of the list [terminal]")
    command.set_defaults(run=runs)


def _add_generate(commands) -> None:
    command = commands.add_parser("generate", help="answers of a trained adapter")
    command.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    command.add_argument("questions", nargs="*", metavar="QUESTION", help="[the standard input is one]")
    command.add_argument("--backend", choices=BACKENDS, default="auto", help="device type to run on [auto]")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer in tokens [128]")
    _add_model(command)
    command.set_defaults(run=generate)


def _add_compare(commands) -> None:
    command = commands.add_parser("compare", help="runs and sweeps beside one another and beside the paper")
    command.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run or a sweep")
    command.add_argument(
        "--format", choices=("terminal", "markdown", "csv", "json"), default="terminal", help="of the tables [terminal]"
    )
    command.set_defaults(run=compare)


def _add_spectrum(commands) -> None:
    command = commands.add_parser("spectrum", help="singular values of what runs have learned, as table and figures")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a sweep")
    command.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for the figures; a single run's folder, otherwise runs/spectra"
    )
    _add_model(command)
    command.set_defaults(run=spectrum)


def _add_report(commands) -> None:
    command = commands.add_parser("report", help="a run, or several beside one another, as one HTML page")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of a sweep")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="the page [report.html, in the run's folder; of several, here]"
    )
    command.set_defaults(run=report)


def _add_merge(commands) -> None:
    _add_conversion(commands, "merge", merge, "folder of a run or an adapter", "an adapter merged into its base model")


def _add_export(commands) -> None:
    _add_conversion(commands, "export", export, "folder of a run or an adapter", "an adapter as an exact plain LoRA")


def _add_import(commands) -> None:
    about = "a checkpoint of the authors' released code as an adapter"
    _add_conversion(commands, "import", import_, "its folder", about)


def _add_conversion(commands, name: str, run: Callable, source: str, help: str) -> None:
    """A subcommand that makes another folder of a folder."""
    command = commands.add_parser(name, help=help)
    command.add_argument("source", type=Path, metavar="FOLDER", help=source)
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    _add_model(command)
    command.set_defaults(run=run)


def _add_model(command) -> None:
    command.add_argument("--model", metavar="FOLDER_OR_ID", help="the base model [the one it was trained on]")


def plan(arguments: argparse.Namespace, console: Console) -> int:
    """Print what the launcher of a benchmark would do; 2 where it cannot, or does not fit."""
    from sora_hw.training import launch  # brings the libraries of training, which the doctor may find missing

    launch.silence()
    launch.plan(importlib.import_module(f"sora_hw.recipes.{arguments.benchmark}"), arguments.rest, arguments.hostfile)
    return 0


def runs(arguments: argparse.Namespace, console: Console) -> int:
    """Print what lies in a folder of runs, the newest last."""
    from sora_hw.finished import listing

    found = listing.list_runs(arguments.folder)
    if arguments.format == "terminal":
        listing.print_list(found, console)
    else:
        print(listing.as_json(found), end="")
    return 0


def compare(arguments: argparse.Namespace, console: Console) -> int:
    """Print the tables of finished runs and sweeps."""
    from sora_hw.finished import comparison, tables

    found = comparison.compare(arguments.folders)
    if arguments.format == "terminal":
        tables.print_tables(found, console)
    else:
        print(tables.FORMATS[arguments.format](found), end="")
    return 0


def report(arguments: argparse.Namespace, console: Console) -> int:
    """Write the page and print where it lies."""
    from sora_hw.finished.report import write_report
    from sora_hw.finished.run import read_runs

    file = write_report(read_runs(arguments.runs), arguments.output)
    console.print(f"{file}")
    return 0


def spectrum(arguments: argparse.Namespace, console: Console) -> int:
    """Compute the spectra of finished runs into their folders, print a table and draw the figures."""
    from sora_hw.finished.spectra import show_spectra
    from sora_hw.training.ranks import silence

    silence()
    show_spectra(arguments.runs, arguments.output, console, arguments.model)
    return 0


def generate(arguments: argparse.Namespace, console: Console) -> int:
    """Print a trained adapter's answers, and nothing else, to the standard output."""
    from sora_hw.finished.generate import generate
    from sora_hw.training import launch

    launch.silence()
    questions = arguments.questions or [sys.stdin.read()]
    told = Console(stderr=True)
    limit, model = arguments.max_new_tokens, arguments.model
    show = console.print if sys.stdout.isatty() else print  # to a terminal a stranger's answer could be a command
    for answer in generate(arguments.folder, questions, arguments.backend, limit, told, model):
        show(answer)
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
        console.print(section.table, soft_wrap=False)
        for note in section.notes:
            console.print(f"  {note}")
        console.print()
        problems += section.problems
    for problem in problems:
        console.print(f"broken: {problem}", style="red")
    if not problems:
        console.print(f"Ready: training can start on {' or '.join(ready())}.", style="green")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
