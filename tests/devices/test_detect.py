"""Which device a run gets, and what a user is told who names one that cannot be used."""

import builtins
import ctypes
import importlib.util
import logging
import os
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from types import SimpleNamespace

import pytest
import torch

from sora_hw import ops
from sora_hw.devices import detect, npu
from sora_hw.devices.cpu import CPU
from sora_hw.devices.cuda import CUDA
from sora_hw.devices.npu import NPU
from sora_hw.errors import UserError


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch):
    monkeypatch.delenv(detect.FALLBACK_VARIABLE, raising=False)


@pytest.fixture
def cuda_build(monkeypatch):
    """A torch that is built with CUDA, on a machine where it finds nothing."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def loadable(monkeypatch):
    """The set of shared libraries that load; every other one does not."""
    names = set()

    def load(name, *arguments, **options):
        if name not in names:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", load)
    return names


@pytest.fixture
def npu_machine(monkeypatch, loadable, tmp_path):
    """A machine set up for the NPU, step by step, by the test; `imported` tells whether torch_npu was imported."""
    version = torch.__version__.partition("+")[0]
    machine = SimpleNamespace(version=version, import_error=None, count=2, imported=False)
    loadable.update(npu.CANN_LIBRARIES)
    (tmp_path / "davinci0").touch()
    (tmp_path / "davinci_manager").touch()  # there without any device, too
    find_spec, import_module, version_of = PathFinder.find_spec, builtins.__import__, metadata.version

    def find(name, *arguments):
        return machine.version if name == "torch_npu" else find_spec(name, *arguments)

    def importing(name, *arguments, **options):
        if name != "torch_npu":
            return import_module(name, *arguments, **options)
        if sys.modules.get("torch_npu", machine) is None:
            raise ModuleNotFoundError("import of torch_npu halted; None in sys.modules")
        machine.imported = True
        if machine.import_error:
            raise machine.import_error
        sys.modules["torch_npu"] = SimpleNamespace()
        return sys.modules["torch_npu"]

    monkeypatch.setattr(PathFinder, "find_spec", find)
    monkeypatch.setattr(metadata, "version", lambda name: machine.version if name == "torch_npu" else version_of(name))
    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(npu, "DEVICE_NODES", tmp_path)
    seen = SimpleNamespace(is_available=lambda: machine.count > 0, device_count=lambda: machine.count)
    monkeypatch.setattr(torch, "npu", seen, raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # to be put back as it was
    del sys.modules["torch_npu"]
    monkeypatch.setattr(npu, "_import_errors", [])
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    machine.libraries, machine.nodes = loadable, tmp_path
    return machine


class TestCuda:
    def test_a_build_without_cuda(self, monkeypatch):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
        reason = CUDA.is_usable()
        assert f"torch {torch.__version__} is built without CUDA" in reason
        assert "install a CUDA build" in reason

    def test_no_driver(self, cuda_build, loadable):
        reason = CUDA.is_usable()
        assert reason.startswith("the NVIDIA driver is missing (libcuda.so.1 does not load)")

    def test_no_gpu_behind_the_driver(self, cuda_build, loadable):
        loadable.add("libcuda.so.1")
        assert CUDA.is_usable().startswith("the NVIDIA driver shows no usable GPU")

    @pytest.mark.parametrize("hidden", ["", "-1"])
    def test_gpus_that_the_user_hides(self, cuda_build, loadable, monkeypatch, hidden):
        loadable.add("libcuda.so.1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert CUDA.is_usable().startswith("CUDA_VISIBLE_DEVICES hides every GPU")

    def test_usable(self, cuda_build, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert CUDA.is_usable() is None


class TestNpu:
    def test_usable_when_every_step_succeeds(self, npu_machine):
        assert NPU.is_usable() is None
        assert npu_machine.imported
        assert [check.what for check in NPU.checks()] == [
            *("torch", "torch_npu", "CANN", "ASCEND_HOME_PATH", "ASCEND_RT_VISIBLE_DEVICES", "devices", "NPUs")
        ]

    def test_a_cuda_build_of_torch(self, npu_machine, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        reason = NPU.is_usable()
        assert "is built for CUDA 13.0" in reason and "a CPU build of torch" in reason
        assert not npu_machine.imported

    def test_package_missing(self, npu_machine):
        npu_machine.version = None
        assert NPU.is_usable().startswith("torch_npu is not installed")
        assert not npu_machine.imported

    @pytest.mark.parametrize("version", ["2.5.1.post1", "9.13.0"])
    def test_a_package_for_another_torch(self, npu_machine, version):
        npu_machine.version = version
        wanted = ".".join(torch.__version__.split(".")[:2])
        reason = NPU.is_usable()
        assert reason.startswith(f"torch_npu {version} does not fit torch {torch.__version__.partition('+')[0]}")
        assert f"pip install 'torch-npu=={wanted}.*'" in reason
        assert not npu_machine.imported

    @pytest.mark.parametrize("library", npu.CANN_LIBRARIES)
    def test_cann_missing(self, npu_machine, library):
        npu_machine.libraries.remove(library)
        reason = NPU.is_usable()
        assert reason.startswith(f"CANN is missing ({library} does not load)")
        assert "set_env.sh" in reason and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in reason
        assert not npu_machine.imported

    @pytest.mark.parametrize(
        ("home", "state"), [(None, "is not set"), ("", "is not set"), ("/no/such", "/no/such is no folder")]
    )
    def test_cann_s_environment_missing(self, npu_machine, monkeypatch, home, state):
        monkeypatch.delenv("ASCEND_HOME_PATH")
        if home is not None:
            monkeypatch.setenv("ASCEND_HOME_PATH", home)
        assert NPU.is_usable().startswith(f"ASCEND_HOME_PATH {state}") and "set_env.sh" in NPU.is_usable()
        assert not npu_machine.imported

    @pytest.mark.parametrize(
        ("devices", "proposal"),
        [("1,0", "0,1"), ("0,0,2", "0,2"), ("a,3", "3"), ("3,", "3"), ("0 ,1", "1"), ("", ""), ("-1", ""), ("0-3", "")],
    )
    def test_device_numbers_that_do_not_ascend(self, npu_machine, monkeypatch, devices, proposal):
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", devices)
        reason = NPU.is_usable()
        assert "\n" not in reason and reason.startswith(f"ASCEND_RT_VISIBLE_DEVICES={devices} hides every NPU")
        assert f"set it to {proposal or 'a list as 0,1,2,3'}, or unset it" in reason
        assert not npu_machine.imported

    @pytest.mark.parametrize("devices", ["0", "0,1", "4,5,12"])
    def test_device_numbers_that_ascend(self, npu_machine, monkeypatch, devices):
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", devices)
        assert NPU.is_usable() is None

    def test_device_node_missing(self, npu_machine):
        (npu_machine.nodes / "davinci0").unlink()
        assert NPU.is_usable().startswith("there is no NPU (/dev/davinci*)")
        assert not npu_machine.imported

    @pytest.mark.parametrize("error", [ImportError("libop.so:\n not found"), RuntimeError("two\n accelerators")])
    def test_import_that_fails_in_any_way(self, npu_machine, error):
        npu_machine.import_error = error
        reason = NPU.is_usable()
        assert f"torch_npu does not import ({' '.join(str(error).split())})" in reason
        assert "\n" not in reason

    def test_no_npu_visible(self, npu_machine):
        npu_machine.count = 0
        assert NPU.is_usable().startswith("torch_npu sees no NPU; look at npu-smi info")

    def test_a_number_that_no_npu_has(self, npu_machine, monkeypatch):
        npu_machine.count = 0
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "99")
        assert "ASCEND_RT_VISIBLE_DEVICES=99 names none that exists" in NPU.is_usable()

    def test_a_loaded_torch_npu_needs_no_libraries_and_nodes(self, npu_machine, monkeypatch):
        """torch loads it while it is imported itself: the steps that guard the import are then behind us."""
        npu_machine.libraries.clear()
        (npu_machine.nodes / "davinci0").unlink()
        monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace())
        assert NPU.is_usable() is None

    def test_a_machine_is_meant_for_it_by_its_package_or_its_devices(self, npu_machine):
        assert NPU.is_expected()
        (npu_machine.nodes / "davinci0").unlink()
        assert NPU.is_expected()
        npu_machine.version = None
        assert not NPU.is_expected()
        (npu_machine.nodes / "davinci7").touch()
        assert NPU.is_expected()


class TestLoadingOrHiding:
    """A torch_npu that would break the import of torch and of transformers is hidden from both."""

    def test_a_sound_one_is_loaded(self, npu_machine):
        npu.load_or_hide()
        assert npu_machine.imported and sys.modules["torch_npu"] is not None
        assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1", "as the user has set it, for processes started later"

    def test_one_without_cann_is_hidden_and_its_fault_still_told(self, npu_machine):
        npu_machine.libraries.clear()
        npu.load_or_hide()
        assert not npu_machine.imported
        assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0" and sys.modules["torch_npu"] is None
        assert importlib.util.find_spec("torch_npu") is None
        assert NPU.is_usable().startswith("CANN is missing") and NPU.is_expected()

    def test_one_that_fails_in_its_import_is_hidden_and_its_fault_still_told(self, npu_machine):
        npu_machine.import_error = ImportError("libgraph.so:\n not found")
        npu.load_or_hide()
        assert npu_machine.imported and sys.modules["torch_npu"] is None
        assert NPU.is_usable().startswith("torch_npu does not import (libgraph.so: not found): install the CANN")

    def test_one_that_the_launcher_hides_stays_hidden(self, npu_machine):
        sys.modules["torch_npu"] = None
        npu.load_or_hide()
        assert not npu_machine.imported and sys.modules["torch_npu"] is None

    def test_none_is_no_fault(self, npu_machine):
        npu_machine.version = None
        npu.load_or_hide()
        assert "torch_npu" not in sys.modules


def _usable(monkeypatch, *devices):
    for device in detect.DEVICES.values():
        reason = None if device in devices else f"no {device.type} here"
        monkeypatch.setattr(type(device), "is_usable", lambda self, reason=reason: reason)
        monkeypatch.setattr(type(device), "is_expected", lambda self: False)


def _served(monkeypatch, **errors):
    """Kernel packages by device type: None where the package works, else why it does not import."""
    packages = [
        ops.KernelPackage(name, f"kernels_{name}", f"vendor-{name} 1.0", error) for name, error in errors.items()
    ]
    monkeypatch.setattr(ops, "_packages", packages)


class TestSelect:
    def test_auto_takes_the_best_that_is_usable_and_served(self, monkeypatch):
        _served(monkeypatch, cpu=None, cuda=None, npu=None)
        for usable, chosen in (((CPU, CUDA, NPU), NPU), ((CPU, CUDA), CUDA), ((CPU,), CPU)):
            _usable(monkeypatch, *usable)
            assert detect.select("auto") is chosen

    def test_auto_says_what_it_passes_over(self, monkeypatch, caplog):
        _usable(monkeypatch, CPU, CUDA)
        _served(monkeypatch, cpu=None)
        with caplog.at_level(logging.WARNING):
            assert detect.select("auto") is CPU
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith("--backend auto passes over the NVIDIA GPU: no kernel package serves cuda")

    def test_auto_says_what_is_broken(self, monkeypatch, caplog):
        _usable(monkeypatch, CPU)
        _served(monkeypatch, cpu=None)
        monkeypatch.setattr(type(NPU), "is_expected", lambda self: True)
        with caplog.at_level(logging.WARNING):
            assert detect.select("auto") is CPU
        assert caplog.messages == ["--backend auto passes over the Ascend NPU: no npu here"]

    def test_auto_without_any_kernels(self, monkeypatch):
        _usable(monkeypatch, CPU)
        _served(monkeypatch)
        with pytest.raises(UserError, match=r"no device can be used \(npu: no npu here; cuda: no cuda here; cpu: no k"):
            detect.select("auto")

    @pytest.mark.parametrize("name", ["cpu", "cuda", "npu"])
    def test_a_named_device_that_is_ready(self, monkeypatch, name):
        _usable(monkeypatch, CPU, CUDA, NPU)
        _served(monkeypatch, **{name: None})
        assert detect.select(name).type == name

    def test_a_named_device_that_is_not_usable(self, monkeypatch):
        _usable(monkeypatch, CPU)
        _served(monkeypatch, cpu=None, cuda=None)
        with pytest.raises(UserError) as caught:
            detect.select("cuda")
        assert str(caught.value) == "--backend cuda cannot be used: no cuda here"

    def test_a_usable_device_without_kernels(self, monkeypatch):
        _usable(monkeypatch, CPU, NPU)
        _served(monkeypatch, cpu=None)
        with pytest.raises(UserError) as caught:
            detect.select("npu")
        message = str(caught.value)
        assert message.startswith("--backend npu cannot be used: no kernel package serves npu (served: cpu)")
        assert "SORA_HW_FALLBACK=1" in message and "\n" not in message

    def test_kernels_that_do_not_import(self, monkeypatch):
        _usable(monkeypatch, CPU, CUDA)
        _served(monkeypatch, cpu=None, cuda="no module named triton")
        with pytest.raises(
            UserError, match=r"kernels_cuda \(vendor-cuda 1.0\) does not import \(no module named triton\)"
        ):
            detect.select("cuda")

    @pytest.mark.parametrize(("value", "allowed"), [("1", True), ("0", False), ("", False)])
    def test_the_fallback_is_opt_in(self, monkeypatch, value, allowed):
        _usable(monkeypatch, CPU, CUDA)
        _served(monkeypatch, cpu=None)
        monkeypatch.setenv("SORA_HW_FALLBACK", value)
        if allowed:
            assert detect.select("cuda") is CUDA
        else:
            with pytest.raises(UserError):
                detect.select("cuda")

    def test_an_unknown_name(self):
        with pytest.raises(UserError, match="--backend tpu is unknown: choose one of auto, cpu, cuda, npu"):
            detect.select("tpu")

    def test_this_machine_runs_on_its_cpu(self):
        assert detect.select("cpu") is CPU
