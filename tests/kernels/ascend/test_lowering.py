"""Every call of a Triton-Ascend kernel, lowered to linalg for the 910B and the 910C by the compiler's own front end.

The calls are those of `sora_hw_kernels.npu`, made on CPU tensors under a driver that compiles and, in place of a
launch, notes the grid. It shows that the kernels parse, type-check and lower, that every tile is copied in one piece,
and how many programs would run. It does not show what the binary compiler makes of it: that one comes with CANN.
"""

import dataclasses
import itertools
import math
import re
import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.backends.ascend", reason="needs the environment that ci/ascend makes")
import triton
import triton.language as tl
from sora_hw_kernels.npu import row_norm, scale_rank, tiles
from triton.backends import backends
from triton.backends.ascend.compiler import _parse_linalg_metadata
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import MLIRCompilationError
from triton.runtime import driver

# A 910B and a 910C. This far down the compiler does not tell the models of either apart.
ARCHITECTURES = ("Ascend910B3", "Ascend910_9392")
AI_CORES = 24
# How often one and the same input may crash the compiler.
CRASHES = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The buffers of the matrix unit: the two operands of one product, and its result in float32.
OPERAND_BYTES, RESULT_BYTES = 64 * 1024, 128 * 1024
# (N, out, R): whole tiles; ragged; fewer tiles than cores; ranks of several tiles
SHAPES = [(2048, 1024, 16), (70, 300, 18), (1, 1, 1), (33, 129, 100)]


@dataclasses.dataclass(frozen=True)
class Launched:
    """A kernel as it would have been launched: its name, the number of programs, which cores, the lowered text."""

    name: str
    programs: int
    cores: str
    text: str


class LoweringDriver:
    """Compiles for one architecture as far as linalg and notes what would have been launched."""

    def __init__(self, architecture):
        self.target = GPUTarget("npu", architecture, 0)
        self.launched = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1, "num_aicore": AI_CORES},
            load_binary=lambda name, kernel, shared, device: (object(), None, 0, 0),
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        def note(programs, y, z, stream, function, *rest):
            assert (y, z) == (1, 1)
            cores = {"aiv": "vector", "mix": "matrix and vector"}[metadata.mix_mode]
            self.launched.append(Launched(metadata.kernel_name, programs, cores, self.texts[metadata.hash]))

        return note


@pytest.fixture(params=ARCHITECTURES)
def lowering(request, monkeypatch, tmp_path):
    """The driver, with the Ascend backend stopping at linalg: what follows needs CANN."""
    backend = backends["ascend"].compiler
    texts = {}

    def stages_up_to_linalg(self, stages, options, add_stages=backend.add_stages):
        add_stages(self, stages, options)
        del stages["npubin"]
        lower = stages["ttadapter"]

        def lower_and_parse(source, metadata):
            texts[metadata["hash"]] = lower(source, metadata)
            return _parse_linalg_metadata(texts[metadata["hash"]], metadata)[0]

        stages["ttadapter"] = lower_and_parse

    def init(self, target, init=backend.__init__):
        init(self, target)
        self.binary_ext = "ttadapter"

    def run_again_after_a_crash(*args, run=subprocess.run, **options):
        # The compiler's front end crashes on one input in a few hundred, and not on the same one again: it depends on
        # the addresses that the process was given. A verdict of its own is no crash and stands at once.
        for _ in range(CRASHES):
            try:
                return run(*args, **options)
            except subprocess.CalledProcessError as error:
                if -error.returncode not in (signal.SIGSEGV, signal.SIGABRT):
                    raise
        return run(*args, **options)

    monkeypatch.setattr(subprocess, "run", run_again_after_a_crash)
    monkeypatch.setattr(backend, "add_stages", stages_up_to_linalg)
    monkeypatch.setattr(backend, "__init__", init)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = (scale_rank.forward_kernel, scale_rank.backward_kernel, row_norm.row_norm_kernel, scattered_kernel)
    for kernel in kernels:  # what another test compiled knows that test's driver
        kernel.cache.clear()
    lowering = LoweringDriver(request.param)
    lowering.texts = texts
    driver.set_active(lowering)
    yield lowering
    driver.reset_active()


def inputs(dtype, n, out, r, scale=True, bias=True):
    vector = torch.ones(out)
    rows = torch.ones(n, out, dtype=dtype)
    return rows, vector if scale else None, rows.new_ones(n, r), torch.ones(out, r), vector if bias else None


SINGLE_ELEMENT = re.compile(r"\b(memref\.load|memref\.store|tensor\.extract|tensor\.insert|linalg\.generic) ")


def in_one_piece(launched):
    """Whether each load and store is of whole rows, their elements side by side, and none of a single element."""
    strides = re.findall(r"reinterpret_cast .*? strides: \[([^\]]*)\]", launched.text)
    beside = strides and all(stride.split(",")[-1].strip() == "1" for stride in strides)
    return bool(beside) and not SINGLE_ELEMENT.search(launched.text)


def loaded_bytes(launched, *matrix_operands):
    """The bytes of all the tiles that are loaded, from the lowered text, but for those of the operands' shapes."""
    sizes = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1}
    tiles_of_launch = re.findall(r"memref\.alloc\(\) : memref<([\dx]+)x(\w+)>", launched.text)
    shapes = [(tuple(map(int, shape.split("x"))), kind) for shape, kind in tiles_of_launch]
    return sum(math.prod(shape) * sizes[kind] for shape, kind in shapes if shape not in matrix_operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_forward_kernel(lowering, dtype):
    for shape, (scale, bias) in itertools.product(SHAPES, [(True, True), (True, False), (False, True), (False, False)]):
        scale_rank.forward(*inputs(dtype, *shape, scale, bias))
    for shape, masked in itertools.product(SHAPES, (True, False)):
        n, features, r = shape
        grad, _, dz, _, _ = inputs(dtype, *shape)
        mask = torch.ones(n, features, dtype=torch.bool) if masked else None
        scale_rank.input_gradient(grad, dz, grad.new_ones(r, features), mask, 2.0)
    assert len(lowering.launched) == 6 * len(SHAPES)
    for launched in lowering.launched:
        assert (launched.name, launched.cores) == ("forward_kernel", "matrix and vector")
        assert launched.programs <= AI_CORES
        assert in_one_piece(launched)
        rank = int(re.search(r"linalg\.matmul .*?tensor<\d+x(\d+)xf32>", launched.text)[1])
        tile = tiles.forward_tiles(rank, dtype)
        # The factor (rank, features) may have the shape of the tile itself: then it is counted with it.
        loaded = loaded_bytes(launched, (tile.rows, rank))
        assert tiles.COPIES * loaded <= tile.bytes <= tiles.UNIFIED_BUFFER_BYTES
        assert tiles.COPIES * rank * max(tile.rows, tile.features) * 4 <= OPERAND_BYTES
        assert tiles.COPIES * tile.rows * tile.features * 4 <= RESULT_BYTES
    assert max(launched.programs for launched in lowering.launched) == AI_CORES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backward_kernel(lowering, dtype):
    flags = [True, False]
    for shape, scale, bias, saved_base, need_base in itertools.product(SHAPES, flags, flags, flags, flags):
        grad, c, z, b, bias_ = inputs(dtype, *shape, scale, bias)
        scale_rank.backward(grad, grad, c, z, b, bias_, saved_base, need_base)
    assert len(lowering.launched) == 3 * 4 * len(SHAPES)  # none where there is neither scale nor bias
    tile = tiles.backward_tiles(dtype)
    for launched in lowering.launched:
        assert (launched.name, launched.cores) == ("backward_kernel", "vector")
        assert launched.programs <= 2 * AI_CORES
        assert in_one_piece(launched)
        assert tiles.COPIES * loaded_bytes(launched) <= tile.bytes <= tiles.UNIFIED_BUFFER_BYTES
    assert max(launched.programs for launched in lowering.launched) == 2 * AI_CORES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_row_norm_kernel(lowering, dtype):
    shapes = [(2048, 1024, 16), (70, 300, 18), (1, 1, 1), (33, 129, 40), (64, 64, 100)]
    for (out, features, r), scale in itertools.product(shapes, (True, False)):
        vector = torch.ones(out)
        weight = torch.ones(out, features, dtype=dtype)
        row_norm.factored_row_norm(
            weight, vector, vector if scale else None, torch.ones(out, r), torch.ones(r, features)
        )
    assert len(lowering.launched) == 2 * len(shapes)
    for launched in lowering.launched:
        assert (launched.name, launched.cores) == ("row_norm_kernel", "matrix and vector")
        assert launched.programs <= AI_CORES
        assert in_one_piece(launched)
        rank = int(re.search(r"linalg\.matmul .*? outs\(\S+ : tensor<\d+x(\d+)xf32>", launched.text)[1])
        tile = tiles.row_norm_tiles(rank, dtype)
        loaded = loaded_bytes(launched, (tile.rows, tile.features), (tile.features, rank))
        assert tiles.COPIES * loaded <= tile.bytes <= tiles.UNIFIED_BUFFER_BYTES
        assert tiles.COPIES * tile.features * max(tile.rows, rank) * dtype.itemsize <= 2 * OPERAND_BYTES
        assert tiles.COPIES * tile.rows * rank * 4 <= RESULT_BYTES


@triton.jit
def indirect_kernel(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(tl.load(source + at).to(tl.pointer_type(tl.int64))))


def test_an_operation_that_cannot_be_lowered_is_seen(lowering):
    """Control: a load through pointers that are themselves loaded."""
    values = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(MLIRCompilationError, match="DiscreteMemAccess"):
        indirect_kernel[(1,)](values, values, SIZE=16)
    assert lowering.launched == []


@triton.jit
def scattered_kernel(source, target, index, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + tl.load(index + at)))


def test_a_load_of_one_element_after_the_other_is_seen(lowering):
    """Control: offsets that are themselves loaded."""
    scattered_kernel[(1,)](torch.zeros(16), torch.zeros(16), torch.zeros(16, dtype=torch.int32), SIZE=16)
    assert not in_one_piece(lowering.launched[0])


def test_a_tile_larger_than_the_unified_buffer_is_seen(lowering, monkeypatch):
    """Control: the forward kernel on a tile of eight times the rows that fit."""
    small = tiles.forward_tiles(16, torch.float32)
    large = dataclasses.replace(small, rows=8 * small.rows)
    monkeypatch.setattr(scale_rank, "forward_tiles", lambda rank, dtype: large)
    scale_rank.forward(*inputs(torch.float32, 256, 256, 16))
    assert tiles.COPIES * loaded_bytes(lowering.launched[0], (large.rows, 16)) > tiles.UNIFIED_BUFFER_BYTES
