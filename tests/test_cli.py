"""The command line, and what the doctor finds."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sora_hw
from sora_hw import cli, doctor, ops, versions
from sora_hw.devices import Check
from sora_hw.devices.cpu import CpuDevice
from sora_hw.devices.cuda import CudaDevice
from sora_hw.devices.npu import NpuDevice
from sora_hw.errors import UserError


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.delenv("SORA_HW_FALLBACK", raising=False)


@pytest.fixture
def examined(capsys):
    """Runs the doctor: its exit code and what it printed."""

    def run():
        code = cli.main(["doctor"])
        return code, capsys.readouterr().out

    return run


def _package(device_type, module="sora_hw_kernels.reference", error=None):
    return ops.KernelPackage(device_type, module, f"vendor-{device_type} 1.0", error)


def _needing(monkeypatch, device, expected):
    """A device with one good and two bad checks."""
    checks = [
        Check("cable", "plugged in"),
        Check("driver", "1.0", "the driver is too old: pip install 'driver[gpu]'"),
        Check("cards", "0", "every card is hidden"),
    ]
    monkeypatch.setattr(device, "checks", lambda self: iter(checks))
    monkeypatch.setattr(device, "is_expected", lambda self: expected)


def test_the_doctor_approves_of_this_machine(examined):
    code, out = examined()
    assert code == 0
    assert "Ready: training can start on cpu." in out
    assert re.search(rf"torch +│ {re.escape(torch.__version__)} +│ >=2.11,<2.14 .* ok", out)
    assert re.search(r"cpu .* GiB +│ gloo +│ ok", out)
    assert re.search(r"cpu +│ sora_hw [\d.]+ +│ sora_hw_kernels\.reference +│ \S*/reference +│ ok", out)
    assert re.search(r"commonsense +│ meta-llama/Meta-Llama-3-8B +│ ok", out)
    assert re.search(r"SORA_HW_FALLBACK +│ not set", out)


def test_an_unsupported_library_is_broken(examined, monkeypatch):
    verdict = versions.Verdict("peft", "0.1.0", "peft 0.1.0 is not supported: pip install 'peft>=0.21,<0.22'")
    monkeypatch.setattr(doctor, "verdicts", lambda: [verdict])
    code, out = examined()
    assert code == 1
    assert "broken: peft 0.1.0 is not supported: pip install 'peft>=0.21,<0.22'" in out
    assert "Ready" not in out


def test_a_device_that_is_not_usable_is_a_note_with_its_remedy(examined, monkeypatch):
    _needing(monkeypatch, CudaDevice, expected=False)
    code, out = examined()
    assert code == 0
    assert re.search(r"cuda +│ NVIDIA GPU +│ - +│ - +│ nccl +│ no", out)
    assert re.search(r"Needs of cuda.*cable +│ plugged in +│ ok.*driver +│ 1.0 +│ no", out, re.DOTALL)
    assert "cuda: the driver is too old: pip install 'driver[gpu]'" in out
    assert "hidden" not in out, "one remedy at a time where nobody waits for the device"


@pytest.mark.parametrize("device", [CudaDevice, NpuDevice])
def test_a_device_that_is_meant_to_be_used_and_fails_is_broken(examined, monkeypatch, device):
    _needing(monkeypatch, device, expected=True)
    code, out = examined()
    assert code == 1
    assert re.search(r"cable +│ plugged in +│ ok.*driver +│ 1.0 +│ broken", out, re.DOTALL)
    for problem in ("the driver is too old: pip install 'driver[gpu]'", "every card is hidden"):
        assert re.search(rf"broken: (cuda|npu): {re.escape(problem)}", out)


def test_the_environment_of_a_device_is_shown_with_who_sets_it(examined, monkeypatch):
    _, out = examined()
    assert "TASK_QUEUE_ENABLE" not in out, "nothing here is an NPU"
    _needing(monkeypatch, NpuDevice, expected=True)
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    monkeypatch.delenv("CPU_AFFINITY_CONF", raising=False)
    _, out = examined()
    assert re.search(r"npu +│ TASK_QUEUE_ENABLE +│ 1 +│ you", out)
    assert re.search(r"npu +│ CPU_AFFINITY_CONF +│ 1 +│ sora_hw", out)


def test_a_usable_device_is_shown_with_count_name_and_memory(examined, monkeypatch):
    monkeypatch.setattr(CudaDevice, "is_usable", lambda self: None)
    monkeypatch.setattr(CudaDevice, "count", lambda self: 4)
    monkeypatch.setattr(CudaDevice, "name", lambda self, index=0: "RTX 4090")
    monkeypatch.setattr(CudaDevice, "memory_bytes", lambda self, index=0: 24 << 30)
    monkeypatch.setattr(ops, "_packages", [_package("cpu")])
    code, out = examined()
    assert code == 0
    assert re.search(r"cuda +│ RTX 4090 +│ 4 +│ 24.0 GiB +│ nccl +│ ok", out)
    assert "no kernel package serves cuda (served: cpu)" in out


def test_no_kernels_for_the_cpu_is_broken(examined, monkeypatch):
    monkeypatch.setattr(ops, "_packages", [])
    code, out = examined()
    assert code == 1
    assert "broken: no kernel package serves cpu (served: none): install one" in out


def test_a_kernel_package_that_does_not_import_is_broken(examined, monkeypatch):
    monkeypatch.setattr(ops, "_packages", [_package("cpu"), _package("xpu", error="No module named 'x'")])
    code, out = examined()
    assert code == 1
    assert re.search(r"xpu +│ vendor-xpu 1.0 +│ .* │ broken", out)
    assert "broken: the kernels for xpu (sora_hw_kernels.reference): No module named 'x'" in out


def test_a_kernel_package_without_its_device_is_a_note(examined, monkeypatch):
    """As Triton's where only the CPU is meant: nothing here needs it."""
    monkeypatch.setattr(CudaDevice, "is_usable", lambda self: "no driver")
    monkeypatch.setattr(ops, "_packages", [_package("cpu"), _package("cuda", error="No module named 'triton'")])
    code, out = examined()
    assert code == 0
    assert re.search(r"cuda +│ vendor-cuda 1.0 +│ .* │ no", out)
    assert "the kernels for cuda (sora_hw_kernels.reference): No module named 'triton'" in out


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda base, scale, z, b: scale * base - z @ b.T, "scale_rank_update gives a wrong result"),
        (lambda base, scale, z, b: base.no_such_method(), "AttributeError: 'Tensor' object has no attribute"),
    ],
)
def test_kernels_that_compute_nonsense_are_broken(examined, monkeypatch, result, words):
    monkeypatch.setattr(ops, "scale_rank_update", result)
    code, out = examined()
    assert code == 1
    assert f"broken: the kernels for cpu (sora_hw_kernels.reference): {words}" in out


def test_a_vendor_s_device_that_we_have_no_record_of_is_listed(examined, monkeypatch):
    monkeypatch.setattr(ops, "_packages", [_package("cpu"), _package("xpu")])
    code, out = examined()
    assert code == 0
    assert re.search(r"xpu +│ vendor-xpu 1.0", out)


def test_which_kernels_of_a_package_serve_is_shown(examined):
    _, out = examined()
    words = r"composition of torch_npu operators \(Triton-Ascend is not installed\)|Triton-Ascend kernels"
    assert re.search(rf"npu +│ sora_hw [\d.]+ +│ sora_hw_kernels.npu: ({words})", out)


def test_the_fallback_is_shown(examined, monkeypatch):
    monkeypatch.setenv("SORA_HW_FALLBACK", "1")
    monkeypatch.setattr(ops, "_packages", [_package("cpu")])
    _, out = examined()
    assert re.search(r"npu +│ slow generic operators +│ - +│ - +│ SORA_HW_FALLBACK=1", out)
    assert re.search(r"SORA_HW_FALLBACK +│ 1", out)


def test_a_recipe_that_does_not_load_is_broken(examined, monkeypatch):
    def import_module(name):
        raise ImportError(f"{name} needs\n something")

    monkeypatch.setattr(importlib, "import_module", import_module)
    code, out = examined()
    assert code == 1
    assert (
        "broken: the recipe commonsense does not load: ImportError: sora_hw.recipes.commonsense needs something" in out
    )


@pytest.mark.parametrize("command", ["no-such-compiler", ""])
def test_no_compiler_is_a_note(examined, monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    code, out = examined()
    assert code == 0
    assert "C++ compiler: training runs without one" in out


def test_a_compiler_behind_a_wrapper_is_described(examined, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -I")
    _, out = examined()
    assert re.search(rf"C\+\+ compiler +│ Python {sys.version.split()[0]}", out)


def test_an_error_of_the_user_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def fail(*arguments):
        raise UserError("the disk is full: empty it")

    monkeypatch.setattr(cli, "examine", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "sora-hw: the disk is full: empty it\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND; see sora-hw --help"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["plan"], "required: benchmark; see sora-hw plan --help"),
        (["doctor", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, words, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("sora-hw: ") and error.count("\n") == 1


def test_a_wrong_plan_is_one_line_whatever_its_libraries_have_to_say():
    program = Path(sys.executable).parent / "sora-hw"
    answer = subprocess.run([program, "plan", "glue", "--nonsense"], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "sora-hw: unrecognized arguments: --nonsense; see launchers/glue.py --help\n"


def test_the_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert doctor._cores() == 3
    monkeypatch.setattr(os, "sched_getaffinity", None)
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert doctor._cores() == 7


def test_the_memory_is_the_machine_s(examined, monkeypatch):
    monkeypatch.setattr(CpuDevice, "memory_bytes", lambda self, index=0: 3 << 29)
    _, out = examined()
    assert re.search(r"memory +│ 1.5 GiB", out)


def test_the_installed_program_tells_its_version():
    program = Path(sys.executable).parent / "sora-hw"
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout == f"sora-hw {sora_hw.__version__}\n"
