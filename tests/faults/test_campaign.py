"""A few faults of the campaign, and that it would notice what it looks for. All of them: `ci/faults`."""

import json
import shutil

import pytest
from sealed import write_checkpoint

from faults.campaign import BEGIN, COLUMNS, END, Campaign, Ended, Outcome, check_end, check_left, write_readme
from faults.faults import FAULTS, FULL_DISK, Fault, at, flip, truncate

A_FAULT = Fault("SIGKILL", "in step 4", (at("os:rename"),), ranks=(0, 1), told=FULL_DISK)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, warm):
    return Campaign(tmp_path_factory.mktemp("faults"), warm)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.short], ids=lambda fault: fault.name)
def test_it_is_survived(campaign, fault):
    assert campaign.attempt(fault).problems == []


def test_no_two_faults_are_the_same():
    assert len({(fault.name, fault.ranks, fault.stage) for fault in FAULTS}) == len(FAULTS) >= 40


@pytest.fixture
def reference(tmp_path):
    """The folder of a run without a fault."""
    write_checkpoint(tmp_path / "undisturbed" / "checkpoint-4")
    shutil.copytree(tmp_path / "undisturbed" / "checkpoint-4" / "adapter", tmp_path / "undisturbed" / "adapter")
    (tmp_path / "undisturbed" / "run.json").write_text(json.dumps({"status": "finished"}))
    return tmp_path / "undisturbed"


HARMS = {
    "checkpoint-4 is not whole": lambda run: flip(run / "checkpoint-4" / "state-0.safetensors"),
    "an adapter was left that is not the right one": lambda run: truncate(run / "adapter" / "adapter_config.json"),
    "run.json says finished, but there is no adapter": lambda run: shutil.rmtree(run / "adapter"),
}


@pytest.mark.parametrize("problem", HARMS)
def test_what_a_run_must_not_leave_is_noticed(tmp_path, reference, problem):
    run = shutil.copytree(reference, tmp_path / "run")
    assert check_left(run, reference) == []
    HARMS[problem](run)
    assert check_left(run, reference) == [problem]


ENDS = {
    "had not ended": Ended(None, "", 120),
    "ended with 0": Ended(0, "error: No space left on device\n", 5),
    "no line of error says": Ended(2, "error: something else\nNo space left on device\n", 5),
    "a traceback": Ended(2, "Traceback (most recent call last):\nerror: No space left on device\n", 5),
}


@pytest.mark.parametrize("problem", ENDS)
def test_how_a_run_must_not_end_is_noticed(problem):
    assert check_end(A_FAULT, Ended(2, "error: run/adapter: No space left on device\n", 5)) == []
    assert [problem in each for each in check_end(A_FAULT, ENDS[problem])] == [True]


def test_the_table_takes_the_place_of_the_one_before(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    outcome = Outcome(A_FAULT, code=247, resumed_from=2, lost=1, identical=True)
    write_readme([outcome], readme)
    row = "| SIGKILL | in step 4 | 0 and 1 | 2 | 247 | checkpoint-2 | 1 | yes |"
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert row in lines and f"| {' | '.join(COLUMNS)} |" in lines
