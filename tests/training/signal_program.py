"""Trains once undisturbed, and once with a signal in each micro-step, resumed: which step was saved, and whether the
adapter is the same, [[micro-step, step or null, true or false]].

signal_program.py FOLDER ARGUMENT...: of a run of one rank
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console

import sora_hw.training.run
from sora_hw.recipes import commonsense
from sora_hw.training.arguments import parse
from sora_hw.training.checkpoints import newest
from sora_hw.training.peers import Peers
from sora_hw.training.plan import make_plan
from sora_hw.training.ranks import leave, silence
from sora_hw.training.run import check, train
from sora_hw.training.signals import Interrupted

room, given = Path(sys.argv[1]), sys.argv[2:]
sora_hw.training.run.leave = lambda: None  # the next run needs the ranks' group
forward_passes = Peers.step  # called at the end of each


def run(folder: Path, signal_in: int | None) -> bytes | None:
    """The adapter, where the run comes to its end."""
    taken = []

    def step(peers: Peers) -> None:
        forward_passes(peers)
        taken.append(1)
        if len(taken) == signal_in:
            os.kill(os.getpid(), signal.SIGTERM)

    Peers.step = step
    request = parse(commonsense, ["--backend", "cpu", *given, "--output", str(folder), "--resume"])
    with suppress(Interrupted):
        train(check(request, make_plan(request, commonsense)), Console(quiet=True))
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


silence()
undisturbed = run(room / "whole", None)
outcomes = []
for micro_step in range(1, 6):
    folder = room / f"signal-{micro_step}"
    assert run(folder, micro_step) is None
    saved = newest(folder)[0]
    step = int(saved.name.removeprefix("checkpoint-")) if saved else None
    outcomes.append([micro_step, step, run(folder, None) == undisturbed])
print(json.dumps(outcomes))
leave()
