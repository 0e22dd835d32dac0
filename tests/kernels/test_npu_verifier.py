"""Which of kernels, composition and reference serves a call on an NPU, and that importing the package needs neither."""

import subprocess
import sys
import types

import pytest
import torch
from sora_hw_kernels import npu
from sora_hw_kernels.npu import composition, launch, verifier
from sora_hw_kernels.reference import row_norm as reference_row_norm
from sora_hw_kernels.reference import scale_rank as reference_scale_rank

VECTOR, WEIGHT = torch.ones(4), torch.ones(4, 6)


@pytest.fixture
def kernels(monkeypatch):
    """Stands for the modules that call Triton-Ascend, which are not imported before there is one."""
    modules = {}
    for name in ("scale_rank", "row_norm"):
        modules[name] = types.ModuleType(f"sora_hw_kernels.npu.{name}")
        monkeypatch.setitem(sys.modules, f"sora_hw_kernels.npu.{name}", modules[name])
        monkeypatch.setattr(npu, name, modules[name], raising=False)
    monkeypatch.setattr(launch, "missing", lambda: None)
    return types.SimpleNamespace(**modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_serve_what_they_take(kernels, dtype):
    assert verifier.serving(torch.ones(3, 4, dtype=dtype), VECTOR, None) is kernels.scale_rank


def test_the_composition_serves_what_the_kernels_do_not_take(kernels):
    assert verifier.serving(torch.ones(3, 4), VECTOR.half()) is composition
    assert verifier.serving(torch.ones(3, 4), VECTOR.double()) is composition
    assert verifier.serving(torch.ones(0, 4), VECTOR) is composition


def test_the_composition_serves_where_there_is_no_triton_ascend(monkeypatch):
    monkeypatch.setattr(launch, "missing", lambda: "a reason")
    assert verifier.serving(torch.ones(3, 4), VECTOR) is composition


def test_the_reference_serves_float64(kernels):
    assert verifier.serving(torch.ones(3, 4).double(), VECTOR.double()) is reference_scale_rank
    rows, z, b = torch.randn(3, 4).double(), torch.randn(3, 2).double(), torch.randn(4, 2).double()
    assert torch.equal(verifier.forward(rows, None, z, b, None), torch.addmm(rows, z, b.t()))


def test_each_operator_reaches_what_serves_it(kernels):
    rows, z, b, a = torch.ones(3, 4), torch.ones(3, 2), torch.ones(4, 2), torch.ones(2, 4)
    given = {}
    for name in ("forward", "backward", "input_gradient"):
        setattr(kernels.scale_rank, name, lambda *args, name=name: given.setdefault(name, args))
    verifier.forward(rows, VECTOR, z, b, VECTOR)
    verifier.backward(rows, rows, VECTOR, z, b, VECTOR, False, True)
    verifier.input_gradient(rows, z, a, None, 2.0)
    assert given["forward"] == (rows, VECTOR, z, b, VECTOR)
    assert given["backward"] == (rows, rows, VECTOR, z, b, VECTOR, False, True)
    assert given["input_gradient"] == (rows, z, a, None, 2.0)


def test_the_row_norm(kernels, monkeypatch):
    kernels.row_norm.factored_row_norm = lambda *args: "kernel"
    monkeypatch.setattr(reference_row_norm, "factored_row_norm", lambda *args: "composition")

    def served(weight=WEIGHT, scale=VECTOR, r=2):
        return verifier.factored_row_norm(weight, VECTOR, scale, torch.ones(4, r), torch.ones(r, 6))

    assert served() == served(scale=None) == served(weight=WEIGHT.bfloat16()) == served(r=128) == "kernel"
    assert served(scale=VECTOR.double()) == served(weight=WEIGHT.double()) == served(r=129) == "composition"
    # Rows that do not lie one element beside the other would be read one element after the other.
    assert served(weight=torch.ones(6, 4).t()) == "composition"


@pytest.fixture
def asked_anew(monkeypatch):
    monkeypatch.delenv("SORA_HW_NPU_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_NPU_COMPILER_PATH", raising=False)
    launch.missing.cache_clear()
    yield
    launch.missing.cache_clear()


def describe_with(monkeypatch, installed=True, backend="npu", compiler="bishengir-compile"):
    """The description where Triton-Ascend is installed or not, its driver is that of `backend`, or fails."""

    class Active:
        def get_current_target(self):
            if backend is None:
                raise RuntimeError("0 active drivers")
            return types.SimpleNamespace(backend=backend)

    runtime = types.ModuleType("triton.runtime")
    runtime.driver = types.SimpleNamespace(active=Active())
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.runtime", runtime)
    monkeypatch.setattr(launch.shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.setattr(launch, "find_spec", lambda name: name if name == "triton" or installed else None)
    return npu.describe()


def test_what_serves_is_described(monkeypatch, asked_anew):
    assert describe_with(monkeypatch) == "Triton-Ascend kernels"


@pytest.mark.parametrize(
    ("lack", "reason"),
    [
        ({"installed": False}, "Triton-Ascend is not installed"),
        ({"backend": None}, "Triton-Ascend has no driver: RuntimeError: 0 active drivers"),
        ({"backend": "cuda"}, "Triton's driver is that of cuda"),
        ({"compiler": None}, "bishengir-compile, which comes with CANN, is not on the PATH"),
    ],
)
def test_why_the_composition_serves_is_described(monkeypatch, asked_anew, lack, reason):
    assert describe_with(monkeypatch, **lack) == f"composition of torch_npu operators ({reason})"


def test_the_kernels_can_be_switched_off(monkeypatch, asked_anew):
    monkeypatch.setenv("SORA_HW_NPU_KERNELS", "0")
    assert describe_with(monkeypatch) == "composition of torch_npu operators (SORA_HW_NPU_KERNELS=0)"


OPERATORS = (
    "scale_rank_update",
    "scale_rank_update_backward",
    "input_gradient",
    "factored_row_norm",
    "taylor_rotation",
    "taylor_rotation_backward",
)
# As it is on an NPU, where torch imports torch_npu, which renames the key, before anything of ours is imported.
PROGRAM = f"""
import sys, torch
sys.modules["triton"] = sys.modules["torch_npu"] = None
torch.utils.rename_privateuse1_backend("npu")
from sora_hw_kernels import npu
for name in {OPERATORS}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("sora_hw::" + name, "PrivateUse1"), name
print(npu.describe())
"""


def test_it_registers_without_triton_and_torch_npu():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("composition of torch_npu operators")


def test_it_registers_before_the_key_is_renamed():
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sora_hw::{name}", "PrivateUse1"), name
