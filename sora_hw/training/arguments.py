"""The launcher's command line: one flag for every value of the recipe, and what a run needs besides."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

from sora_hw.devices.detect import BACKENDS
from sora_hw.errors import Parser, UserError, without_secrets
from sora_hw.hardware import HARDWARE as SETUPS
from sora_hw.recipes.recipe import DATA, MODEL, OPTIMISATION, RUN, Recipe

HARDWARE = "hardware"
NEWEST = "auto"  # --resume without a path
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `recipe` and `profile` hold only the values that it gives, `ranks` those of the
    machines that a plan is made for, where they are named."""

    backend: str
    hardware: str
    recipe: Mapping[str, object]
    profile: Mapping[str, object]
    output: Path | None
    resume: str | None
    overwrite: bool
    sweep: bool
    dry_run: bool
    as_json: bool
    report_to: str
    ranks: int | None
    argv: tuple[str, ...]


def parse(module: ModuleType, argv: Sequence[str] | None = None, ranks: int | None = None) -> Request:
    """The request of `argv` (default: the command line) for the recipes in `module`.

    Raises UserError for flags and values that do not exist.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = vars(_parser(module).parse_args(argv))
    if given["sweep"] and (given["resume"] or given["overwrite"] or given["dry_run"]):
        raise UserError("--sweep goes on with what its folder holds: give it without --resume, --overwrite, --dry-run")
    if given["resume"] and given["overwrite"]:
        raise UserError("--resume continues a run and --overwrite deletes it: give one of them")
    if given["json"] and not given["dry_run"]:
        raise UserError("--json prints the plan of a --dry-run: give both")
    return Request(
        backend=given["backend"],
        hardware=given["hardware"],
        recipe=_given(given, "recipe."),
        profile=_given(given, "profile."),
        output=given["output"],
        resume=given["resume"],
        overwrite=given["overwrite"],
        sweep=given["sweep"],
        dry_run=given["dry_run"],
        as_json=given["json"],
        report_to=given["report_to"],
        ranks=ranks,
        argv=tuple(map(without_secrets, argv)),
    )


def _given(values: Mapping[str, object], prefix: str) -> dict[str, object]:
    named = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in named.items() if value is not None
    }


def _parser(module: ModuleType) -> argparse.ArgumentParser:
    program = f"launchers/{module.__name__.rpartition('.')[2]}.py"
    parser = Parser(prog=program, description=module.DESCRIPTION, allow_abbrev=False, add_help=False)
    groups = {title: parser.add_argument_group(title) for title in (RUN, MODEL, DATA, OPTIMISATION, HARDWARE)}
    _add_run_flags(groups[RUN])
    recipe = module.recipe()
    _add_recipe_flags(groups, recipe, module.embedded() if hasattr(module, "embedded") else recipe)
    _add_hardware_flags(groups[HARDWARE])
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from DeepSpeed's launcher
    return parser


def paper_recipe(module: ModuleType, given: Mapping[str, object]) -> Recipe:
    """The paper's recipe in `module`, for the task that is given where the benchmark has several."""
    return module.recipe(given["task"]) if "task" in given else module.recipe()


def path(text: str) -> Path:
    """A flag's value as a path. Raises UserError for an address, which may hold a password."""
    if "://" in text:
        raise UserError(f"{text} is an address: give a folder of this machine")
    return Path(text).expanduser()


def _add_run_flags(group) -> None:
    group.add_argument("-h", "--help", action="help", help="show this and stop")
    group.add_argument("--output", type=path, metavar="FOLDER", help="folder of the run [runs/RECIPE-METHOD-NUMBER]")
    group.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="CHECKPOINT",
        help=f"continue from this checkpoint folder, or with `{NEWEST}` from the newest in the output folder",
    )
    group.add_argument("--overwrite", action="store_true", help="delete the run that the output folder holds")
    group.add_argument(
        "--sweep",
        action="store_true",
        help="one run for each learning rate, seed and rank of the paper's grid; a value that is given stays fixed",
    )
    group.add_argument(
        "--report-to",
        choices=("none", TENSORBOARD),
        default="none",
        help="where the log also goes, beside trainer_state.json [none]",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check model, data and output, print the plan, write nothing; of a model on the hub only the plan",
    )
    group.add_argument("--json", action="store_true", help="print the plan of a --dry-run as JSON")


def _add_recipe_flags(groups: Mapping[str, argparse._ArgumentGroup], recipe: Recipe, embedded: Recipe) -> None:
    for field in fields(recipe):
        if "group" not in field.metadata:
            continue
        value, tiny = _shown(getattr(recipe, field.name)), _shown(getattr(embedded, field.name))
        where = "on the CPU" if field.name == "model" else "for the embedded model"
        defaults = value if value == tiny else f"{value}; {tiny} {where}"
        options: dict = {"dest": f"recipe.{field.name}", "default": None}
        options["help"] = f"{field.metadata['help']} [{defaults}]".replace("%", "%%")
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.type == tuple[str, ...]:
            options.update(nargs="+", metavar="FILE" if field.name.endswith("_data") else "NAME")
        else:
            kind = int if field.type == int | None else field.type
            options.update(type=kind, choices=field.metadata.get("among"))
            if "among" not in field.metadata:
                options["metavar"] = {int: "N", float: "X", str: "NAME"}[kind]
        groups[field.metadata["group"]].add_argument("--" + field.name.replace("_", "-"), **options)


def _shown(value: object) -> str:
    return (" ".join(value) or "none") if isinstance(value, tuple) else str(value)


def _add_hardware_flags(group) -> None:
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="device type to train on [auto]")
    group.add_argument(
        "--hardware",
        choices=SETUPS,
        default="auto",
        help="set-up that decides what follows [auto]; a real one selects the paper's model",
    )
    group.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), dest="profile.zero_stage", help="DeepSpeed ZeRO")
    group.add_argument(
        "--micro-batch", type=int, metavar="N", dest="profile.micro_batch", help="samples at a time per rank"
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), dest="profile.dtype", help="number format of the model"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        dest="profile.gradient_checkpointing",
        help="recompute activations in the backward pass to save memory",
    )
    group.add_argument(
        "--fused-loss",
        action=argparse.BooleanOptionalAction,
        dest="profile.fused_loss",
        help="compute the loss in pieces, by Liger, to save memory",
    )
    group.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        dest="profile.offload",
        help="keep optimiser states, with ZeRO-3 also the base model, in the host's memory",
    )
    group.add_argument(
        "--load-in-4bit",
        action=argparse.BooleanOptionalAction,
        dest="profile.four_bit",
        help="hold the frozen base model in 4 bits",
    )
