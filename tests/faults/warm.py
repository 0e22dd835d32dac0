"""DeepSpeed's launcher in Python processes that need not import anything: a campaign of a hundred runs in minutes.

This program imports what a rank imports, once, and then forks a process for each run. In it the code of the command
`deepspeed` runs as it is, and so does that of its second program, which starts the ranks, waits for them, ends them and
passes on signals. Only where these start a Python process of their own, that is forked off here and not begun anew.
A rank has its own process, environment, arguments and signals, as it would have. Some faults of the campaign go without
this (`cold`), as a user's run does.

It reads a run (a line of JSON: arguments, variables, folder, log) and answers with the process, which leads a session
of its own, and then with its exit code.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TextIO

NEEDED = (  # by a rank on the processor, before it has read its arguments or later
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "deepspeed.runtime.zero.stage3"),
    *("sora_hw.training.launch", "sora_hw.recipes.commonsense", "transformers.models.llama.modeling_llama"),
    *("transformers.integrations.deepspeed", "matplotlib.pyplot", "datasets", "accelerate", "setuptools"),
)
START = subprocess.Popen


class Forked:
    """What DeepSpeed needs of subprocess.Popen, for a Python process that is forked and not begun."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            become(command, env)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            try:
                ended, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # somebody else has waited for it; Popen takes it for 0 as well
                ended, status = self.pid, 0
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        return self.poll(0)


def start(command: list[str], **options: object):
    """Takes the place of subprocess.Popen in DeepSpeed's launcher."""
    python = command[:2] == [sys.executable, "-u"]
    return Forked(command, options["env"]) if python else START(command, **options)


def become(command: list[str], environment: dict[str, str]) -> None:
    """Be the process of `python -u ...`, to its end."""
    code = 0
    try:
        os.environ.clear()
        os.environ.update(environment)
        program = command[2:]
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            subprocess.Popen = START
            sys.argv, sys.path[0] = program, str(Path(program[0]).parent)
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def begin(run: dict, answers: TextIO) -> int:
    """Fork the process of the command `deepspeed`, which answers as soon as it leads a session; its number."""
    number = os.fork()
    if number:
        return number
    os.setsid()
    print(json.dumps({"process": os.getpid()}), file=answers)
    os.chdir(run["folder"])
    log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (as long as the process)
    subprocess.Popen = start
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.runner", *run["arguments"]]
    become(command, {**os.environ, **run["variables"]})


def main() -> None:
    import deepspeed

    for name in NEEDED:
        importlib.import_module(name)
    deepspeed.ops.__compatible_ops__  # noqa: B018  (it looks for a compiler when it is first asked)
    gc.freeze()  # or every rank would walk through all of it in each collection
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps({"ready": os.getpid()}), file=answers)
    for line in sys.stdin:
        _, status = os.waitpid(begin(json.loads(line), answers), 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), file=answers)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "launchers"))
    sys.argv += ["--backend", "cpu"]
    import before_torch  # noqa: F401  (as every launcher does)

    main()
