"""Trains once, and again from every checkpoint of that: how many end with the same adapter.

resume_program.py RECIPE FOLDER STEPS ARGUMENT...
"""

import sys
from pathlib import Path

from rich.console import Console

from sora_hw.recipes import commonsense, glue
from sora_hw.training import checkpoints
from sora_hw.training.arguments import parse
from sora_hw.training.plan import make_plan
from sora_hw.training.ranks import leave, silence
from sora_hw.training.run import check, train

checkpoints.KEPT = 1000
recipe = {"commonsense": commonsense, "glue": glue}[sys.argv[1]]
room, steps, given = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]


def adapter(folder: Path, *more: object) -> bytes:
    """What a run into `folder` leaves."""
    flags = ["--backend", "cpu", *given, "--max-steps", steps, "--save-steps", 1, *more]
    request = parse(recipe, [*map(str, flags), "--output", str(folder)])
    train(check(request, make_plan(request, recipe)), Console(quiet=True))
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


silence()
whole = room / "whole"
undisturbed = adapter(whole)
again = [adapter(room / "before the first", "--resume")]
again += [adapter(room / f"from-{step}", "--resume", whole / f"checkpoint-{step}") for step in range(1, steps)]
print(f"{again.count(undisturbed)} of {len(again)}")
leave()
