"""The layer on the simulated NPU: npu_checks.py, in a process that has the device."""

from pathlib import Path

from simulated_npu.building import run_checks


def test_every_method_on_the_simulated_npu(simulated_npu):
    assert run_checks(simulated_npu, Path(__file__).with_name("npu_checks.py")) > 30
