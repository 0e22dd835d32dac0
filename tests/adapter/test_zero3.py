"""The layer under ZeRO-3, where no weight lies whole on any rank: the same losses and gradients as in one process."""

import itertools
import os
from pathlib import Path

import pytest

from sora_hw.conditioning import POST, PRE

pytest.importorskip("deepspeed")

SOME = [("none", "magnitude"), ("rotation", "none"), ("diagonal", "rotation"), ("rotation", "magnitude")]
PROGRAM = Path(__file__).with_name("zero3_program.py")


def run(warm, pairs):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    result = warm.run_ranks(2, [str(PROGRAM), *map("+".join, pairs)], Path.cwd(), environment)
    lines = [line.split("RESULT ")[1].split() for line in result.stdout.splitlines() if "RESULT " in line]
    assert len(lines) == len(pairs), result.stderr[-3000:]
    return {(pre, post): (float(loss), float(gradient)) for pre, post, loss, gradient in lines}


def check(warm, pairs):
    for pair, (loss, gradient) in run(warm, pairs).items():
        assert loss < 2e-6, (pair, loss)
        assert gradient < 1e-3, (pair, gradient)


def test_magnitudes_and_rotations_of_linear_layers_and_of_a_grouped_convolution(warm):
    check(warm, [*SOME, ("convolution", "grouped")])


def test_a_start_from_the_base_weight(warm):
    check(warm, [("start", "pissa"), ("start", "olora")])


@pytest.mark.full
def test_every_other_pair(warm):
    check(warm, [pair for pair in itertools.product(PRE, POST) if pair not in SOME])
