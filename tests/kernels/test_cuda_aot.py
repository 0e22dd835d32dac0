"""Every CUDA kernel compiled ahead of time, without a GPU, for the RTX 4090 (sm_89) and the H100 / H200 (sm_90).

Held to what makes or breaks a kernel there: it compiles, it fits into shared memory, nothing spills from registers, but
for what a measurement allows.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from sora_hw_kernels.cuda import rotation, row_norm, scale_rank  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# What one block may use: the RTX 4090's 99 KiB is the smaller of the two, and every kernel is to run there.
SHARED_BYTES = 99 * 1024
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

FLAGS = {
    scale_rank.forward_kernel: ("HAS_SCALE", "HAS_BIAS", "HAS_MASK"),
    scale_rank.backward_kernel: ("HAS_RANK", "HAS_SCALE", "NEED_BASE", "SUBTRACT_BIAS", "SUM_GRAD"),
    scale_rank.sums_kernel: ("HAS_RANK", "HAS_SCALE", "SUBTRACT_RANK", "SUM_GRAD"),
    row_norm.row_norm_kernel: ("HAS_SCALE",),
    rotation.forward_sums_kernel: ("TURNS_B",),
    rotation.forward_kernel: ("TURNS_B", "HAS_SCALE", "BOUNDED"),
    rotation.backward_sums_kernel: ("TURNS_B",),
    rotation.backward_kernel: ("TURNS_B", "HAS_SCALE", "BOUNDED"),
}
# Bytes a thread that may spill. On half rows the backward kernel's tile was among the fastest of those measured on an
# H200 although it spills a little where there is a bias (kernels/bench/RESULTS.md).
SPILLED_BYTES = {(scale_rank.backward_kernel, dtype): 16 for dtype in (torch.bfloat16, torch.float16)}
SPILLED_BYTES[scale_rank.sums_kernel, torch.float32] = 8  # by Triton 3.6
# What a launch passes None for where the flag is off: the compiler refuses a load from it.
ABSENT = {
    "HAS_RANK": ("dz_parts", "db_parts"),
    "HAS_SCALE": ("scale", "product_parts"),
    "HAS_BIAS": ("bias",),
    "SUM_GRAD": ("bias", "grad_parts"),
    "HAS_MASK": ("mask",),
}
# Tensors in the dtype of the rows; every other tensor is in float32.
ROWS = {"base", "z", "y", "grad", "saved", "dz", "dbase", "weight"}
# Arguments that are one in every launch, and so constants to Triton.
ONES = ("STEPS", "a_stride_i")
# Sizes and strides that are multiples of 16 in most launches.
ALIGNED = ("OUT", "IN", "CHUNK", "a_stride_r", "base_stride", "grad_stride", "saved_stride")


def label(kernel, dtype, tiles, constants, fixed):
    flags = [f"{name}={value}" for name, value in fixed.items()]
    return "-".join(
        [kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__, NAMES[dtype], f"rank{tiles.rank}", *flags]
    )


def tile_constants(tiles, *names):
    return dict(zip(names, (tiles.rows, tiles.features, tiles.rank), strict=True))


def cases():
    for dtype in NAMES:
        for rank in (16, 32, 33):
            tiles = scale_rank.forward_tiles(rank, dtype)
            constants = tile_constants(tiles, "TILE_N", "TILE_O", "TILE_R") | {"STAGES": tiles.stages}
            yield scale_rank.forward_kernel, dtype, tiles, constants, {"ONE_RANK_TILE": rank <= tiles.rank}
            if rank > scale_rank.LARGEST_ONE_READ_RANK:
                continue
            tiles = scale_rank.backward_tiles(rank, dtype)
            constants = tile_constants(tiles, "TILE_N", "TILE_O", "TILE_R") | {"STAGES": tiles.stages}
            yield scale_rank.backward_kernel, dtype, tiles, constants, {"HAS_RANK": True}
        yield scale_rank.backward_kernel, dtype, tiles, constants, {"HAS_RANK": False}
        for rank, with_rank in ((16, True), (32, True), (32, False)):
            tiles = scale_rank.Tiles(rows=scale_rank.SUMS["TILE"], features=0, rank=rank, warps=scale_rank.SUMS_WARPS)
            constants = scale_rank.SUMS | {"TILE_R": rank}
            yield scale_rank.sums_kernel, dtype, tiles, constants, {"HAS_RANK": with_rank}
        for rank in (16, 32, 64, 128):
            tiles = row_norm.row_norm_tiles(rank, dtype)
            yield row_norm.row_norm_kernel, dtype, tiles, tile_constants(tiles, "TILE_O", "TILE_I", "TILE_R"), {}
    for rank in (1, 32, 64, rotation.LARGEST_RANK):
        for kernels, of_rank, parts in (
            ((rotation.forward_sums_kernel, rotation.backward_sums_kernel), rotation.sums_tiles(rank), {}),
            ((rotation.forward_kernel, rotation.backward_kernel), rotation.tiles(rank), {"PARTS": rotation.PARTS}),
        ):
            warps = of_rank.pop("warps")
            tiles = scale_rank.Tiles(rows=of_rank["TILE_O"], features=0, rank=of_rank["TILE_R"], warps=warps)
            for kernel in kernels:
                yield kernel, torch.float32, tiles, of_rank | parts, {}


def compiled(kernel, dtype, tiles, constants, arch):
    def kind(name):
        if name in constants:
            return "constexpr"
        if name in ROWS:
            return f"*{NAMES[dtype]}"
        if name == "mask":
            return "*i1"
        if name in ("mask_scale", "eps"):
            return "fp32"
        sizes = name.isupper() or "stride" in name
        return "i32" if sizes else "*fp32"

    constants = constants | {name: 1 for name in ONES if name in kernel.arg_names}
    absent = [name for flag, names in ABSENT.items() if constants.get(flag) is False for name in names]
    constants |= {name: None for name in absent if name in kernel.arg_names}
    # As the launch sees them on aligned tensors: pointers and row strides divisible by 16.
    aligned = [(index,) for index, name in enumerate(kernel.arg_names) if kind(name).startswith("*") or name in ALIGNED]
    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in kernel.arg_names},
        constexprs=constants,
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    # A kernel that takes STAGES gives its own loop that depth.
    stages = 1 if "STAGES" in constants else tiles.stages
    options = {"num_warps": tiles.warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(binary, folder):
    """Registers a thread and bytes of stack a thread: a spilled register lies on the stack."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report.stdout).groups()
    return int(registers), int(stack) + int(local)


@pytest.mark.parametrize("arch", [89, 90])
@pytest.mark.parametrize("everything", [True, False], ids=["all-options", "no-option"])
@pytest.mark.parametrize(
    ("kernel", "dtype", "tiles", "constants", "fixed"),
    [pytest.param(*case, id=label(*case)) for case in cases()],
)
def test_fits_and_spills_nothing(kernel, dtype, tiles, constants, fixed, everything, arch, tmp_path):
    constants = constants | dict.fromkeys(FLAGS[kernel], everything) | fixed
    if "PRECISION" in kernel.arg_names:
        constants["PRECISION"] = scale_rank.precision(dtype)
    binary = compiled(kernel, dtype, tiles, constants, arch)
    registers, stack = resources(binary, tmp_path)
    assert binary.metadata.shared <= SHARED_BYTES
    assert stack <= SPILLED_BYTES.get((kernel, dtype), 0)
    assert registers * 32 * tiles.warps <= 65536  # at least one program a multiprocessor


def test_a_spill_would_be_seen(tmp_path):
    """The forward kernel on a tile far too large for its threads."""
    tiles = scale_rank.Tiles(rows=128, features=256, rank=32, warps=4)
    constants = tile_constants(tiles, "TILE_N", "TILE_O", "TILE_R") | dict.fromkeys(
        FLAGS[scale_rank.forward_kernel], True
    )
    constants |= {"PRECISION": "tf32", "ONE_RANK_TILE": True, "STAGES": 1}
    binary = compiled(scale_rank.forward_kernel, torch.bfloat16, tiles, constants, 89)
    assert resources(binary, tmp_path)[1] > 0
