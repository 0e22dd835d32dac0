"""The layer under FSDP2 on two ranks: losses, gradients, steps and the saved adapter are those of one process."""

import itertools
import json
import os
from pathlib import Path

import pytest

from sora_hw.conditioning import POST, PRE, PRESETS

PROGRAM = Path(__file__).with_name("fsdp2_program.py")
SOME = [
    *("+".join((*pair, "blocks")) for pair in PRESETS.values()),
    *("none+magnitude+layers", "diagonal+rotation+layers", "rotation+magnitude+layers"),
]


def run(warm, *cases):
    result = warm.run_ranks(2, [str(PROGRAM), *cases], Path.cwd(), os.environ)
    lines = [line.removeprefix("RESULT ") for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 1, result.stderr[-3000:]
    return json.loads(lines[0])


def check(compared, cases):
    assert compared.keys() == set(cases)
    for case, (loss, gradient, tensor) in compared.items():
        assert loss < 2e-6, (case, loss)
        assert gradient < 1e-4, (case, gradient)
        assert tensor < 1e-5, (case, tensor)


@pytest.fixture(scope="module")
def results(warm):
    return run(warm, *SOME)


def test_every_method_learns_what_it_learns_whole(results):
    check(results["compared"], SOME)


def test_a_rotated_grouped_convolution(results):
    assert max(results["convolutions"]) < 1e-5


def test_merging_and_summing_are_refused(results):
    assert len(results["refusals"]) == 3
    assert all("does not work on a model that FSDP has sharded" in words for words in results["refusals"])
    assert not any("\n" in words for words in results["refusals"])


@pytest.mark.full
def test_every_pair_sharded_either_way(warm):
    cases = [
        "+".join(case) for case in itertools.product(PRE, POST, ("blocks", "layers")) if "+".join(case) not in SOME
    ]
    check(run(warm, *cases)["compared"], cases)
