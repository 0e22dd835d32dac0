"""A launcher to which something happens: `deepspeed faulty.py LAUNCHER ...` runs LAUNCHER as it is, but for one fault.

The product has no place for faults. A function of it, or of a library that it calls, is put in a wrapper here, on one
rank or all, and what happens, happens when it is called. The variable FAULT says what, in JSON:

    ranks    those that it happens to
    target   MODULE:NAME of the function
    reached  the steps that must be finished before calls count
    call     which of the calls then
    holding  a word that one of its arguments must hold, or the call does not count
    action   one of ACTIONS, and `value`, which it takes
    half     to a function that writes a file: cut what it has written in half first
    patience seconds, in the place of the profile's `peer_timeout`, for which the others wait; null for those
    notes    the file for a line of each step that is finished, and one when it happens
"""

import errno
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path


def kill(function: Callable, given: tuple, named: dict, value: object) -> object:
    """As the kernel does when memory is short, or a machine that loses its current."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(function: Callable, given: tuple, named: dict, value: str) -> object:
    """The system says no: ENOSPC on a full disk, EROFS on one that has been made read-only. (A real read-only folder
    would not do: whoever runs this as root may write into it.)"""
    number = getattr(errno, value)
    raise OSError(number, os.strerror(number), *([] if value == "ENOSPC" else [str(given[-1])]))


def limit(function: Callable, given: tuple, named: dict, value: int) -> object:
    """No file grows beyond `value` bytes while the function runs: what writes really fails, in whatever language."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (value, before[1]))
    try:
        return function(*given, **named)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(function: Callable, given: tuple, named: dict, value: int) -> object:
    """The disk is full but for `value` bytes, and stays so; a small one, where the run has its folder."""
    room = os.statvfs(".")
    Path("ballast").write_bytes(bytes(room.f_bavail * room.f_frsize - value))
    return function(*given, **named)


def send(function: Callable, given: tuple, named: dict, value: tuple[str, str]) -> object:
    """A signal to this rank, to DeepSpeed's program that has started it, or to all processes of the run; `twice`: once
    more, when it cannot be the same request any longer."""
    number, to = getattr(signal, value[0]), value[1]
    if to == "launcher":
        os.kill(os.getppid(), number)
    elif to == "all":
        os.killpg(0, number)
    else:
        os.kill(os.getpid(), number)
    if to == "twice":
        time.sleep(3.5)
        os.kill(os.getpid(), number)
    return function(*given, **named)


def spoil(function: Callable, given: tuple, named: dict, value: str) -> object:
    """The result, or the loss in it, is `nan` or `inf`."""
    result = function(*given, **named)
    if hasattr(result, "loss"):
        result.loss = result.loss * float(value)
        return result
    return result * float(value)


def wait(function: Callable, given: tuple, named: dict, value: float) -> object:
    time.sleep(value)
    return function(*given, **named)


def freeze(function: Callable, given: tuple, named: dict, value: float | None) -> object:
    """This process stands still, and goes on after so many seconds, or never."""
    if value:
        subprocess.Popen(["sh", "-c", f"sleep {value}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    return function(*given, **named)


ACTIONS = {action.__name__: action for action in (kill, fail, limit, fill, send, spoil, wait, freeze)}
LASTING = ("fail",)  # a disk that is full stays so, for all calls that follow


def inject(fault: dict) -> None:
    """Put the wrapper in the place of the target, if it is to happen to this rank."""
    from sora_hw.training import run
    from sora_hw.training.peers import Peers
    from sora_hw.training.signals import StopOnSignal

    finished, calls = 0, 0

    def note(**facts: object) -> None:
        with open(fault["notes"], "a") as notes:
            notes.write(json.dumps({"rank": int(os.environ["RANK"]), **facts}) + "\n")

    on_step_end = StopOnSignal.on_step_end

    def count_steps(self, args, state, control, **named):
        nonlocal finished
        finished = state.global_step
        note(finished=finished)
        return on_step_end(self, args, state, control, **named)

    StopOnSignal.on_step_end = count_steps
    if fault["patience"]:
        run.Peers = lambda patience: Peers(fault["patience"])
    if int(os.environ["RANK"]) not in fault["ranks"]:
        return
    module, _, name = fault["target"].partition(":")
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for each in path:
        owner = getattr(owner, each)
    function, act = getattr(owner, name), ACTIONS[fault["action"]]

    @wraps(function)
    def wrapper(*given, **named):
        nonlocal calls
        words = [str(each) for each in (*given, *named.values()) if isinstance(each, str | Path)]
        counts = finished >= fault["reached"] and (not fault["holding"] or any(fault["holding"] in w for w in words))
        calls += counts
        if not counts or calls < fault["call"] or (calls > fault["call"] and fault["action"] not in LASTING):
            return function(*given, **named)
        if fault["half"]:
            function(*given, **named)
            written = next(Path(word) for word in words if Path(word).is_file())
            os.truncate(written, written.stat().st_size // 2)
        note(happened=True)
        return act(function, given, named, fault["value"])

    setattr(owner, name, wrapper)


if __name__ == "__main__":
    launcher = next(word for word in sys.argv[1:] if word.endswith(".py"))
    sys.argv.remove(launcher)
    sys.argv[0] = launcher
    sys.path[0] = str(Path(launcher).parent)
    import before_torch  # noqa: F401  (what follows imports torch)

    inject(json.loads(os.environ["FAULT"]))
    runpy.run_path(launcher, run_name="__main__")
