"""A rank that is lost is named by one that is left, in the time of the profile."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sora_hw.hardware import PROFILES

LAST = "look there for the reason (memory, a file system, the machine); --resume goes on from the last checkpoint"
ENDS = {"freezes": None, "dies": -9, "sleeps": 75}
CASES = [f"{how}-{victim}" for how in ENDS for victim in range(2)]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """By how a rank was lost and which: exit code and last words of both."""
    program, folder = Path(__file__).with_name("peers_program.py"), tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, program, folder, *CASES, "slow-1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    return {
        case: [(code, [line for line in text.splitlines() if line.startswith("error:")]) for code, text in both]
        for case, both in said.items()
    }


@pytest.mark.parametrize("case", CASES)
def test_a_lost_rank_is_named_once(ended, case):
    how, victim = case.split("-")
    lost, left = ended[case] if victim == "0" else reversed(ended[case])
    assert left[0] == 75 and lost[0] == ENDS[how]
    named = f"error: rank {victim} on {socket.gethostname()}"
    if how == "sleeps":
        line = f"{named} has stopped in micro-step 7, for which the others have waited for 4 s: {LAST}"
    else:
        line = f"{named} no longer answers: {LAST}"
    assert left[1] + lost[1] == [line]


def test_a_slow_rank_is_waited_for(ended):
    """It takes longer for all its steps than a rank may be silent."""
    assert ended["slow-1"] == [(0, []), (0, [])]


def test_profiles_wait_for_a_checkpoint_and_not_for_half_an_hour():
    assert all(60 <= profile.peer_timeout <= 600 for profile in PROFILES.values())
