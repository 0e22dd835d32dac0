"""Launchers in processes that need not import anything: most of a short run's time is the import of what it uses.

A server (this file, as a program) imports what a rank on the processor imports, once, and forks a process for each
launcher. That process has its own arguments, environment, folder, session and end, and runs the launcher's file, or the
command `deepspeed`, as it is; where DeepSpeed starts a Python process of its own, that is forked off as well. What such
a run cannot show is what happens while Python and the libraries start: the tests of that start their programs cold.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

LAUNCHERS = Path(__file__).resolve().parents[1] / "launchers"
LIBRARIES = (  # of a rank, before it has read its arguments or later
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "deepspeed.runtime.zero.stage3"),
    *("transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert"),
    *("transformers.integrations.deepspeed", "matplotlib.backends.backend_agg", "datasets", "accelerate"),
    *("setuptools", "sora_hw.training.launch", "sora_hw.recipes"),
)
POPEN = subprocess.Popen


class Warm:
    """The tests' end of the server, which starts with the first program."""

    def __init__(self):
        self.server = None

    def begin(self, program: Sequence[str], folder: Path, environment: Mapping[str, str], said: Path) -> int:
        """Begin a Python file with its arguments; its process, which leads a session. What it says goes into the files
        stdout and stderr of the folder `said`."""
        if self.server is None:
            before = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.server = POPEN([sys.executable, __file__], env=before, **pipes)
        request = {"program": list(program), "folder": str(folder), "environment": dict(environment), "said": str(said)}
        return self._ask(request)

    def end(self, process: int) -> int:
        """Wait for a process that was begun; its exit code."""
        return self._ask({"end": process})

    @contextmanager
    def begun(self, program: Sequence[str], folder: Path, environment: Mapping[str, str], said: Path) -> Iterator[int]:
        """What `begin` begins, for a block that ends it; where the block fails, no process of it is left."""
        process = self.begin(program, folder, environment, said)
        try:
            yield process
        except BaseException:  # the test's time is over, say
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            if self.server:
                self.server.kill()  # it may be waiting for another program
            self.close()
            raise

    def run(
        self, program: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python file with its arguments to its end."""
        with tempfile.TemporaryDirectory() as said, self.begun(program, folder, environment, Path(said)) as process:
            code = self.end(process)
            told = [Path(said, name).read_text(errors="replace") for name in ("stdout", "stderr")]
            return subprocess.CompletedProcess(program, code, *told)

    def run_ranks(
        self, ranks: int, program: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """The same on several ranks of DeepSpeed's launcher."""
        return self.run([*by_deepspeed(ranks), *program], folder, with_programs(environment))

    def _ask(self, request: dict) -> int:
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def close(self) -> None:
        if self.server:
            self.server.stdin.close()
            self.server.wait()
            self.server = None


def by_deepspeed(ranks: int) -> list[str]:
    """The command that starts a program on so many ranks of this machine, on a port that no other worker takes."""
    command = Path(sys.executable).with_name("deepspeed")
    return [str(command), "--num_accelerators", str(ranks), "--master_port", str(20000 + os.getpid() % 20000)]


def with_programs(environment: Mapping[str, str]) -> dict[str, str]:
    """With the programs of this Python's environment in the path, of which DeepSpeed starts some."""
    return {**environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"}


class Forked:
    """What DeepSpeed's launcher needs of subprocess.Popen, for a Python process that is forked and not begun."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]):
        self.args, self.returncode = words, None
        self.pid = os.fork()
        if self.pid == 0:
            become(words, environment)

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, options)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        return self.poll(0)


def start(command: Sequence[str], *rest: object, **options: object):
    """In the place of subprocess.Popen in DeepSpeed's launcher."""
    if command[:2] == [sys.executable, "-u"]:
        return Forked(command[2:], options["env"])
    return POPEN(command, *rest, **options)


def become(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Be the process of `python -u` and these words, to its end."""
    code = 0
    try:
        os.environ.clear()
        os.environ.update(environment)
        deepspeeds_own = words[0] == "-m" or Path(words[0]).name == "deepspeed"
        subprocess.Popen = start if deepspeeds_own else POPEN
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(words), str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def begin(request: dict, answers: TextIO) -> None:
    """Fork the process of a program, which answers with its number once it leads a session of its own."""
    if os.fork():
        return
    os.setsid()
    print(os.getpid(), file=answers)
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(request["said"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (as long as the process)
    become(request["program"], request["environment"])


def serve() -> None:
    import deepspeed

    for name in LIBRARIES:
        importlib.import_module(name)
    deepspeed.ops.__compatible_ops__  # noqa: B018  (it looks for a compiler when it is first asked)
    del sys.modules["before_torch"]  # each launcher decides anew, by its own arguments
    gc.freeze()  # or every process would walk through all of it, and so copy it, in each collection
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "end" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["end"], 0)[1]), file=answers)
        else:
            begin(request, answers)


if __name__ == "__main__":
    sys.path.insert(0, str(LAUNCHERS))
    sys.argv += ["--backend", "cpu"]
    import before_torch  # noqa: F401  (as every launcher does)

    serve()
