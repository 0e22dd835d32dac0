"""Every operator of torch_npu that the composition calls, held to torch_npu's own schemas and shape functions.

Both are read from the wheel, which cannot be imported without CANN: the schemas from the lists that its code is made
of, the shape functions from the file that registers them. The calls are those of the composition itself, on tensors
that have shapes and dtypes and no data.
"""

import ast
import itertools
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton.backends.ascend", reason="needs the environment that ci/ascend makes")
import yaml
from sora_hw_kernels.npu import composition, verifier

WHEEL = next(Path(sys.prefix).glob("wheels/torch_npu-*.whl"))
SCHEMAS = ("torch_npu/csrc/aten/npu_native_functions.yaml", "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml")
SHAPE_FUNCTIONS = "torch_npu/op_plugin/meta/_meta_registrations.py"
STUBS = ("torch_npu", "torch_npu.utils", "torch_npu.utils._error_code")
STUBS += ("torch_npu.npu", "torch_npu.npu.utils", "torch_npu.npu._backends")
SOURCES = sorted(Path(verifier.__file__).parent.glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def vendor_operators():
    """`torch.ops.npu`, with the schemas and the shape functions of the wheel."""
    library = torch.library.Library("npu", "FRAGMENT")
    with zipfile.ZipFile(WHEEL) as wheel:
        schemas = {
            entry["func"]
            for path in SCHEMAS
            for entry in yaml.safe_load(wheel.read(path))["custom"]
            if isinstance(entry, dict)
        }
        shape_functions = wheel.read(SHAPE_FUNCTIONS)
    for schema in sorted(schemas):
        library.define(schema)
    # What the file imports for its error messages, and for branches of operators that are not called here.
    modules = {name: types.ModuleType(name) for name in STUBS}
    modules["torch_npu.utils._error_code"].ErrCode = types.SimpleNamespace(TYPE="type", VALUE="value")
    modules["torch_npu.utils._error_code"].ops_error = lambda code: f" ({code})"
    modules["torch_npu.npu.utils"].get_cann_version = modules["torch_npu.npu._backends"].get_soc_version = None
    namespace = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it replaces shape functions of torch's own operators
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        exec(compile(shape_functions, SHAPE_FUNCTIONS, "exec"), namespace)
    yield
    for registered in (library, namespace["m"], namespace["m_aten"]):
        registered._destroy()


class Recorder(TorchDispatchMode):
    """The names of the vendor's operators that were called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "npu":
            self.called.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def call_everything():
    """Every function that is registered, with every option and dtype; returns the vendor's operators it called."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    flags = [True, False]
    with Recorder() as recorder:
        for dtype, r in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1, 18, 200)):
            n, out = 70, 300
            rows, z, b = empty(n, out, dtype=dtype), empty(n, r, dtype=dtype), empty(out, r)
            for scale, bias in itertools.product((empty(out), None), (empty(out), None)):
                y = verifier.forward(rows, scale, z, b, bias)
                assert (y.shape, y.dtype) == (rows.shape, dtype)
                for saved_base, need_base in itertools.product(flags, flags):
                    verifier.backward(rows, rows, scale, z, b, bias, saved_base, need_base)
                norm = verifier.factored_row_norm(empty(out, 80, dtype=dtype), empty(out), scale, b, empty(r, 80))
                assert (norm.shape, norm.dtype) == ((out,), torch.float32)
            for mask in (empty(n, out, dtype=torch.bool), None):
                dx = verifier.input_gradient(rows, z, empty(r, out, dtype=dtype), mask, 1.25)
                assert (dx.shape, dx.dtype) == (rows.shape, dtype)
    return recorder.called


def named_in(source):
    """The vendor's operators that a source names, as `torch.ops.npu.X` or `torch_npu.X`."""
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) in ("torch.ops.npu", "torch_npu")}


def test_every_call_has_the_arguments_dtypes_and_shapes_that_the_vendor_asks_for(monkeypatch):
    called = set()
    for fused in (True, False):
        monkeypatch.setattr(composition, "has_fused_matmul", lambda fused=fused: fused)
        called |= call_everything()
    assert called == set().union(*(named_in(path.read_text()) for path in SOURCES)) == {"npu_fused_matmul"}


def test_an_operator_that_is_only_named_is_seen():
    """Control for the comparison above."""
    assert named_in("import torch_npu\nx = torch_npu.npu_linear\ny = torch.ops.npu.npu_bmmV2(z)") == {
        "npu_linear",
        "npu_bmmV2",
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda op, dz, a, grad: op(dz, a, x3=grad, fused_op="add"), "fused_op"),
        (lambda op, dz, a, grad: op(dz, a, grad, "add"), "positional"),
        (lambda op, dz, a, grad: op(dz, a, fused_op_type="add"), "must have x3"),
        (lambda op, dz, a, grad: op(dz, a.float(), x3=grad, fused_op_type="add"), "type not same"),
        (lambda op, dz, a, grad: op(dz, a.t(), x3=grad, fused_op_type="add"), "ka and kb"),
        (lambda op, dz, a, grad: op(dz[0], a, x3=grad, fused_op_type="add"), "dim num"),
    ],
    ids=["keyword", "positional", "missing", "dtype", "shape", "dimensions"],
)
def test_a_wrong_call_is_seen(monkeypatch, wrong, message):
    """Controls: the composition as it is, but for this call."""

    def input_gradient(grad, dz, a, mask, mask_scale):
        return wrong(torch.ops.npu.npu_fused_matmul, dz.bfloat16(), a.bfloat16(), grad.bfloat16()).to(grad.dtype)

    monkeypatch.setattr(composition, "input_gradient", input_gradient)
    with pytest.raises(RuntimeError, match=message):
        call_everything()


def test_an_operator_that_does_not_exist_is_seen(monkeypatch):
    """Control: a name that torch_npu does not have."""
    monkeypatch.setattr(composition, "input_gradient", lambda *args: torch.ops.npu.npu_lora(*args))
    with pytest.raises(AttributeError, match="npu_lora"):
        call_everything()
