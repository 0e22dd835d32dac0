"""How long a run of a million records takes to its first step, and how much memory: `python kernels/bench/records.py`.

Runs the launcher on the processor with the embedded model, on one rank and on two. The records are the embedded
questions, over and over, each with an id of its own. What counts is the start, so a run makes one step.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sora_hw.data.embedded import train_records

LAUNCHER = Path(__file__).parents[2] / "launchers" / "commonsense.py"
FIRST_STEP = "step 1/1"


def write_records(file: Path, count: int) -> None:
    """Write `count` records of about 280 bytes each as jsonl."""
    questions = train_records()
    with open(file, "w", encoding="utf-8") as opened:
        for number in range(count):
            question = questions[number % len(questions)]
            opened.write(json.dumps({**vars(question), "id": f"record/{number}"}) + "\n")


def start(ranks: int, file: Path) -> tuple[float, float]:
    """(seconds from the command to the end of the first step, processor seconds of all ranks to their end)."""
    programs = Path(sys.executable).parent
    command = [sys.executable] if ranks == 1 else [programs / "deepspeed", "--num_accelerators", str(ranks)]
    command += [LAUNCHER, "--backend", "cpu", "--train-data", file, "--max-steps", "1", "--validation-size", "0"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=file.parent, env=environment, stdout=subprocess.PIPE, text=True) as run:
        seconds = next(time.monotonic() - started for line in run.stdout if line.startswith(FIRST_STEP))
        run.stdout.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sora-hw-") as folder:
        file = Path(folder, "records.jsonl")
        write_records(file, arguments.records)
        print(f"{arguments.records:,} records, {file.stat().st_size / 2**20:.0f} MiB")
        print("| ranks | seconds to the first step | processor seconds, whole run | peak memory of a rank, GiB |")
        print("|---|---|---|---|")
        for ranks in arguments.ranks:
            seconds, processor = start(ranks, file)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # the largest of all so far
            print(f"| {ranks} | {seconds:.0f} | {processor:.0f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
