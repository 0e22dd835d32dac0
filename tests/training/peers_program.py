"""Runs of two ranks that meet in every step, until one of them freezes, dies or falls asleep: how both have ended.

peers_program.py FOLDER CASE...: one run for each HOW-VICTIM, all at once; prints {CASE: [[exit code, what it said on
the standard error] of rank 0, of rank 1]}, the code None for the one that had to be killed when the other had ended.
"""

import json
import os
import signal
import socket
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from sora_hw.training.peers import LostPeer, Peers

PATIENCE, STEPS, TURN = 4, 12, 6  # seconds, steps, the step that something happens in


def run(rank: int, victim: int, how: str, port: int, file: Path) -> None:
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        with Peers(PATIENCE) as peers:
            for step in range(STEPS):
                if rank == victim:
                    happen(how, step)
                peers.step()
                dist.all_reduce(torch.ones(1))
    except LostPeer as error:
        print("error:", error, file=sys.stderr)
        sys.exit(error.code)
    dist.barrier()


def happen(how: str, step: int) -> None:
    if how == "slow":
        time.sleep(1)
    elif step == TURN:
        time.sleep(1.5)  # its signs of life have told where it is
        if how == "sleeps":
            time.sleep(600)
        os.kill(os.getpid(), {"freezes": signal.SIGSTOP, "dies": signal.SIGKILL}[how])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


folder, cases = Path(sys.argv[1]), [case.rpartition("-") for case in sys.argv[2:]]
fork = get_context("fork")
started = []
for how, _, victim in cases:
    port = free_port()
    given = [(rank, int(victim), how, port, folder / f"{how}-{victim}-{rank}") for rank in range(2)]
    ranks = [fork.Process(target=run, args=each) for each in given]
    for each in ranks:
        each.start()
    started.append((f"{how}-{victim}", ranks))
ended = {}
for case, ranks in started:
    first = next(rank for rank in ranks if case.endswith("-0") == (rank is ranks[1]))
    first.join(60)
    codes = []
    for each in ranks:
        each.join(10)
        codes.append(each.exitcode)
        if each.is_alive():
            each.kill()
            each.join()
    ended[case] = [[code, (folder / f"{case}-{rank}").read_text()] for rank, code in enumerate(codes)]
print(json.dumps(ended))
