"""Runs with a fault each, and what becomes of them: `python -m faults.campaign`, see `ci/faults --help`.

A fault is survived when the run ends by itself, in bounded time, with no process left, nothing half written that looks
whole and one line where there is something to say; and when the same command with `--resume auto` then ends with the
adapter, byte by byte, and with the losses of a run that nothing has happened to, having gone on from the newest
checkpoint that is whole. What is whole is checked here by hand, not by the code under test.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tiny import write_records, write_tiny_model
from warm import Warm, with_programs

from faults.faults import FAULTS, Fault

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
LAUNCHER = REPOSITORY / "launchers" / "commonsense.py"
STEPS, SAVE_STEPS = 6, 2
ARGUMENTS = [
    *("--backend", "cpu", "--model", "model", "--train-data", "records.jsonl", "--output", "run"),
    *("--max-steps", STEPS, "--save-steps", SAVE_STEPS, "--global-batch", 4, "--micro-batch", 1, "--warmup-steps", 2),
    *("--learning-rate", 5e-3, "--dropout", 0.2, "--validation-size", 0, "--rank", 4),
    *("--target-modules", "q_proj", "down_proj"),
]
LONGEST = 120  # seconds that a run may take; DeepSpeed's launcher gives its ranks 30 to end
SMALL_DISK = "8m"
BEGIN, END = "<!-- the fault campaign's table, by ci/faults --readme -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Ended:
    """A run that has ended: its exit code (None: it has not, in time), what it told, and the seconds it took."""

    code: int | None
    told: str
    seconds: float


@dataclass
class Outcome:
    """What became of a fault; it is survived where there are no `problems`. `missing` says why it was not tried."""

    fault: Fault
    code: int | None = None
    resumed_from: int | None = None
    lost: int | None = None
    identical: bool = False
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    missing: str | None = None


class Deepspeed:
    """The command `deepspeed` on two ranks, in processes that need not import anything (see `warm`) or as a user has
    it."""

    def __init__(self, warm: Warm):
        paths = (REPOSITORY, REPOSITORY / "kernels")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
        self.environment = with_programs(environment | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
        self.warm = warm

    def run(self, room: Path, arguments: list[object], variables: dict[str, str], cold: bool = False) -> Ended:
        """Run it in the folder `room`, until no process of it is left. One that does not end is ended."""
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
        command += ["--master_port", _free_port(), *map(str, arguments)]
        environment, began = self.environment | variables, time.monotonic()
        with tempfile.TemporaryDirectory() as said:
            if cold:
                with open(Path(said, "stdout"), "w") as out, open(Path(said, "stderr"), "w") as err:
                    begun = subprocess.Popen(
                        command, cwd=room, env=environment, stdout=out, stderr=err, start_new_session=True
                    )
                in_time = _wait_until_empty(begun.pid, began + LONGEST)
                code = begun.wait()
            else:
                process = self.warm.begin(command, room, environment, Path(said))
                in_time = _wait_until_empty(process, began + LONGEST)
                code = self.warm.end(process)
            told = "".join(Path(said, name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Ended(code if in_time else None, told, time.monotonic() - began)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _wait_until_empty(session: int, deadline: float) -> bool:
    """Whether all processes of a session have ended by then; those that have not are ended."""
    while living := [each.pid for each in psutil.process_iter() if _lives_in(each, session)]:
        if time.monotonic() > deadline:
            for number in living:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            return False
        time.sleep(0.1)
    return True


def _lives_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


class Campaign:
    """The faults, one after the other, each in a folder of its own with the model, the data and the run."""

    def __init__(self, folder: Path, warm: Warm):
        self.folder, self.deepspeed = folder, Deepspeed(warm)
        write_tiny_model(folder / "model")
        write_records(folder / "records.jsonl")
        self.undisturbed: dict[int, Path] = {}

    def reference(self, stage: int) -> Path:
        """The run's folder that one leaves which nothing happens to, under this ZeRO stage."""
        if stage not in self.undisturbed:
            room = self._furnish(self.folder / f"undisturbed-{stage}")
            ended = self.deepspeed.run(room, self._words(stage), {})
            if ended.code != 0:
                raise RuntimeError(f"the run without a fault ended with {ended.code}: {ended.told[-3000:]}")
            self.undisturbed[stage] = room / "run"
        return self.undisturbed[stage]

    def _furnish(self, room: Path) -> Path:
        room.mkdir(exist_ok=True)
        shutil.copytree(self.folder / "model", room / "model")
        shutil.copy(self.folder / "records.jsonl", room)
        return room

    @staticmethod
    def _words(stage: int) -> list[object]:
        return [LAUNCHER, *ARGUMENTS, "--zero-stage", stage]

    def attempt(self, fault: Fault) -> Outcome:
        """One fault from its beginning to the end of the run that has gone on."""
        outcome, began = Outcome(fault), time.monotonic()
        reference = self.reference(fault.stage)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="room-") as folder, _disk(folder, fault) as missing:
            if missing:
                outcome.missing = missing
            else:
                self._attempt(outcome, self._furnish(Path(folder)), reference)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _attempt(self, outcome: Outcome, room: Path, reference: Path) -> None:
        fault, problems = outcome.fault, outcome.problems
        words = self._words(fault.stage)
        again = [*words, "--resume", "auto"]
        notes = room.with_suffix(".notes")
        for number, injected in enumerate(fault.injected):
            variables = {"FAULT": json.dumps({**injected, "ranks": fault.ranks, "notes": str(notes)})}
            before = _happened(notes)
            ended = self.deepspeed.run(
                room, [HERE / "faulty.py", *(again if number else words)], variables, fault.cold and number == 0
            )
            outcome.code = ended.code
            if _happened(notes) == before:
                problems.append("the fault has not happened")
            problems += check_end(fault, ended) + check_left(room / "run", reference)
        if fault.survives:
            outcome.lost = 0
        else:
            (room / "ballast").unlink(missing_ok=True)
            problems += self._go_on(outcome, room, again, _steps_reached(notes))
        run = room / "run"
        outcome.identical = _same_files(run / "adapter", reference / "adapter")
        if not outcome.identical:
            problems.append("the adapter is another one")
        if _losses(run) != _losses(reference):
            problems.append("the losses are others")
        problems += _check_listing(run, reference)

    def _go_on(self, outcome: Outcome, room: Path, words: list[object], reached: int) -> list[str]:
        """Harm and refusals, and then the run that goes on."""
        fault, problems = outcome.fault, []
        if fault.refused:
            undo = fault.refused(room)
            ended = self.deepspeed.run(room, words, {})
            undo()
            problems += _check_refused(fault, ended)
        if fault.harm:
            fault.harm(room)
        expected = _newest_whole(room / "run")
        ended = self.deepspeed.run(room, words, {})
        if ended.code != 0:
            problems.append(f"going on ended with {ended.code}: {_last_lines(ended.told)}")
        if fault.harm and fault.names and fault.names not in ended.told:
            problems.append(f"the damage is not named ({fault.names})")
        outcome.resumed_from = _resumed_from(room / "run")
        outcome.lost = max(0, reached - (outcome.resumed_from or 0))
        if (outcome.resumed_from or 0) != expected:
            problems.append(f"went on from step {outcome.resumed_from}, but that of step {expected} is whole")
        if outcome.lost > SAVE_STEPS * (2 if fault.harm else 1):
            problems.append(f"{outcome.lost} steps lost")
        return problems


@contextmanager
def _disk(folder: str, fault: Fault) -> Iterator[str | None]:
    """A small disk at `folder` where the fault needs one; why there is none."""
    if not fault.disk:
        yield None
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        yield "no right to mount a small disk here"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", folder], check=True)


def _notes(notes: Path) -> list[dict]:
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []


def _happened(notes: Path) -> int:
    return sum("happened" in note for note in _notes(notes))


def _steps_reached(notes: Path) -> int:
    return max((note["finished"] for note in _notes(notes) if "finished" in note), default=0)


def check_end(fault: Fault, ended: Ended) -> list[str]:
    """How a run with a fault has ended."""
    if ended.code is None:
        return [f"it had not ended after {LONGEST} s, with all its processes"]
    if fault.survives:
        return [] if ended.code == 0 else [f"ended with {ended.code}: {_last_lines(ended.told)}"]
    problems = ["ended with 0, as if nothing had happened"] if ended.code == 0 else []
    if fault.told:
        problems += _check_told(fault.told, ended)
    return problems


def _check_told(told: str, ended: Ended) -> list[str]:
    """One line of error that says it, and no traceback."""
    errors = {line for line in ended.told.splitlines() if line.startswith("error: ")}
    problems = [] if any(re.search(told, line) for line in errors) else [f"no line of error says {told!r}: {errors}"]
    if "Traceback" in ended.told:
        problems.append(f"a traceback: {_last_lines(ended.told)}")
    return problems


def _check_refused(fault: Fault, ended: Ended) -> list[str]:
    if ended.code in (0, None):
        return [f"{fault.when}: was not refused, but ended with {ended.code}"]
    return _check_told(re.escape(fault.names), ended)


def _last_lines(told: str) -> str:
    """The end of what a run told, without DeepSpeed's own notes."""
    lines = [line.strip() for line in told.splitlines() if line.strip() and not re.match(r"\[\d{4}-", line)]
    return " | ".join(lines[-4:])[-600:]


def check_left(run: Path, reference: Path) -> list[str]:
    """What an ended run has left must be whole, or bear a name that nobody takes for it."""
    problems = [f"{each.name} is not whole" for each in _checkpoints(run) if not _is_whole(each)]
    if (run / "adapter").exists() and not _same_files(run / "adapter", reference / "adapter"):
        problems.append("an adapter was left that is not the right one")
    if (run / "run.json").exists():
        status = json.loads((run / "run.json").read_text())["status"]
        if status == "finished" and not (run / "adapter").exists():
            problems.append("run.json says finished, but there is no adapter")
    return problems


def _check_listing(run: Path, reference: Path) -> list[str]:
    """The folder of a run that has gone on holds what one without a fault does. Its checkpoints may be of other steps,
    where it was asked to end, and more, where it was killed before it had deleted the last old one."""
    found, wanted = ({each.name for each in folder.iterdir()} for folder in (run, reference))
    whole = [each for each in _checkpoints(run) if _is_whole(each)]
    found -= {each.name for each in whole}
    wanted -= {each.name for each in _checkpoints(reference)}
    problems = [f"the folder holds too much or too little: {sorted(found ^ wanted)}"] if found != wanted else []
    return problems + ([] if len(whole) in (2, 3) else [f"the folder holds {len(whole)} checkpoints"])


def _checkpoints(run: Path) -> list[Path]:
    return [each for each in run.glob("checkpoint-*") if each.name.removeprefix("checkpoint-").isdecimal()]


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file has the checksum of the seal, none is missing, and the step is that of the name."""
    try:
        sums = json.loads((checkpoint / "checkpoint.json").read_text())["sha256"]
        found = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in sums}
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        return False
    return found == sums and checkpoint.name == f"checkpoint-{step}"


def _newest_whole(run: Path) -> int:
    """The step of the newest checkpoint that is whole, 0 where there is none."""
    return max((int(each.name.removeprefix("checkpoint-")) for each in _checkpoints(run) if _is_whole(each)), default=0)


def _resumed_from(run: Path) -> int | None:
    """The step from which the run has gone on, as run.json has it."""
    with suppress(OSError):
        checkpoint = json.loads((run / "run.json").read_text())["resumed_from"]
        return int(checkpoint.rpartition("-")[2]) if checkpoint else None
    return None


def _same_files(folder: Path, other: Path) -> bool:
    contents = [
        {str(file.relative_to(each)): file.read_bytes() for file in each.rglob("*") if file.is_file()}
        for each in (folder, other)
    ]
    return bool(contents[1]) and contents[0] == contents[1]


def _losses(run: Path) -> list[float]:
    with suppress(OSError, ValueError):
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]
    return []


COLUMNS = ("fault", "when", "rank", "ZeRO", "exit", "resumed from", "steps lost", "adapter identical")


def cells(outcome: Outcome) -> tuple[str, ...]:
    """A row of the table."""
    fault = outcome.fault
    ranks = " and ".join(map(str, fault.ranks))
    when = fault.when + (" *" if fault.cold else "")
    if outcome.missing:
        return fault.what, when, ranks, str(fault.stage), outcome.missing, "", "", ""
    resumed = "its start" if outcome.resumed_from is None else f"checkpoint-{outcome.resumed_from}"
    code, lost = ("-" if value is None else str(value) for value in (outcome.code, outcome.lost))
    identical = "yes" if outcome.identical else "**no**"
    return fault.what, when, ranks, str(fault.stage), code, "-" if fault.survives else resumed, lost, identical


def show(outcomes: list[Outcome], console: Console) -> None:
    table = Table(*COLUMNS, title="faults")
    for outcome in outcomes:
        table.add_row(*cells(outcome), style="red" if outcome.problems else None)
    console.print(table)
    for outcome in outcomes:
        for problem in outcome.problems:
            console.print(f"[red]{outcome.fault.name}:[/red]", end=" ")
            console.print(problem, markup=False)


def write_readme(outcomes: list[Outcome], readme: Path) -> None:
    """Put the table between its marks in the README."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, outcomes)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def main() -> int:
    """Run the campaign; 1 where a fault is not survived."""
    parser = argparse.ArgumentParser(prog="ci/faults", description="Runs that are killed, starved, damaged, stopped.")
    parser.add_argument("--only", metavar="TEXT", help="faults whose name holds TEXT")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.only or arguments.only in fault.name]
    console, outcomes, began = Console(highlight=False, width=max(120, Console().width)), [], time.monotonic()
    transformers.logging.disable_progress_bar()
    with (
        tempfile.TemporaryDirectory(prefix="sora-hw-faults-") as folder,
        closing(Warm()) as warm,
        Progress(console=console) as progress,
    ):
        campaign = Campaign(Path(folder), warm)
        bar = progress.add_task("faults", total=len(chosen))
        for fault in chosen:
            progress.update(bar, description=fault.name[:60])
            outcome = campaign.attempt(fault)
            outcomes.append(outcome)
            became = outcome.missing or ("NOT SURVIVED: " + "; ".join(outcome.problems) if outcome.problems else "ok")
            progress.console.print(f"{fault.name}: {became} ({outcome.seconds:.0f} s)", markup=False, soft_wrap=True)
            progress.advance(bar)
    show(outcomes, console)
    survived = sum(not outcome.problems for outcome in outcomes)
    console.print(f"{survived} of {len(outcomes)} survived, {(time.monotonic() - began) / 60:.0f} minutes")
    if arguments.readme:
        write_readme(outcomes, REPOSITORY / "README.md")
    return int(survived < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
