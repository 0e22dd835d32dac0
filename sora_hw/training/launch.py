"""From the command line of a launcher to a plan, a run or a sweep."""

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from sora_hw.errors import UserError, one_line
from sora_hw.terminal import Console, print_anything
from sora_hw.training.arguments import parse
from sora_hw.training.dry_run import show_plan
from sora_hw.training.environment import rank, rank_here
from sora_hw.training.machines import needed_elsewhere, read_hostfile, write_deepspeed_env
from sora_hw.training.peers import LostPeer
from sora_hw.training.plan import make_plan
from sora_hw.training.ranks import leave, silence
from sora_hw.training.run import announce, check, train
from sora_hw.training.signals import Interrupted
from sora_hw.training.sweep import sweep
from sora_hw.versions import check_versions

USER_ERROR = UserError.code
INTERRUPTED = 130  # as a shell has it for a program that SIGINT has ended
FIRST_RANK_SPEAKS = 20  # seconds


def main(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Run the launcher of the recipes in `module`; its exit code: 0, 2 for an error of the user's, 75 where another
    rank is gone, 128 and the number of the signal that has ended it."""
    told = "interrupted; --resume goes on from the last checkpoint, a --sweep by itself"
    return exit_code(lambda: launch(module, argv), told)


def exit_code(program: Callable[[], None], if_interrupted: str) -> int:
    """Run a program of one or several ranks: its exit code, as `main` has it. `if_interrupted` is what Ctrl-C tells."""
    if not gc.isenabled():  # a launcher's before_torch has switched it off for the imports
        gc.freeze()
        gc.enable()
    silence()
    print_anything()
    try:
        program()
    except (UserError, OSError) as error:
        if rank_here() > 0 and not isinstance(error, LostPeer):
            time.sleep(FIRST_RANK_SPEAKS)  # every rank finds the same error; the launcher ends this one when it is told
        print("error:", one_line(error), file=sys.stderr)
        return getattr(error, "code", USER_ERROR)
    except (KeyboardInterrupt, Interrupted) as error:
        if rank_here() == 0:
            print(if_interrupted, file=sys.stderr)
        return error.code if isinstance(error, Interrupted) else INTERRUPTED
    return 0


def plan(module: ModuleType, argv: Sequence[str], hostfile: Path | None) -> None:
    """Show the plan of a launcher's command line, for the ranks of a hostfile's machines where one is given; then also
    write the file from which `deepspeed` takes the variables that the ranks on other machines need. Raises UserError.
    """
    machines = read_hostfile(hostfile) if hostfile else []
    request = parse(module, [*argv, "--dry-run"], ranks=sum(machine.slots for machine in machines) or None)
    check_versions()
    planned = make_plan(request, module)
    show_plan(request, planned, _console())
    if machines:
        variables = needed_elsewhere(planned.device, planned.profile, os.environ)
        file = write_deepspeed_env(variables, Path.cwd())
        print(f"{file} written, for `deepspeed --hostfile {hostfile}` started here", file=sys.stderr)


def _console() -> Console:
    return Console(quiet=rank() > 0)


def launch(module: ModuleType, argv: Sequence[str] | None) -> None:
    """Do what the command line asks for. Nothing is created before everything has been checked."""
    request = parse(module, argv)
    check_versions()
    console = _console()
    if request.sweep:
        sweep(request, module, console)
        leave()
        return
    plan = make_plan(request, module)
    if request.dry_run:
        show_plan(request, plan, console)
        return
    job = check(request, plan)
    announce(job, console)
    train(job, console)
    leave()
