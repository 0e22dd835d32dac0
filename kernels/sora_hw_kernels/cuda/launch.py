"""What every launch shares: its configuration, the device that it is on, and how to start it quickly."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """One launch configuration.

    Attributes:
        rows: rows of (N, out) in a tile.
        features: columns of (N, out), or of (out, in), in a tile.
        rank: columns of the rank dimension in a tile.
        warps: warps a program.
        stages: depth of the software pipeline of loads.
        registers: the most that a thread may take, where the compiler would take more and leave too few programs.
    """

    rows: int
    features: int
    rank: int
    warps: int
    stages: int = 1
    registers: int | None = None


def on_device_of(t: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device_of(t)


# What a kernel was compiled for -> the kernel, and its constants in the order of its parameters.
_compiled: dict[tuple, tuple] = {}


def launch(
    kernel,
    programs: int,
    *args: Tensor | float | None,
    warps: int,
    stages: int = 1,
    registers: int | None = None,
    **constants,
) -> None:
    """`kernel[(programs,)](*args, **constants)` on the device of the first argument, a tensor.

    Triton's own call looks each argument over to find the variant of the kernel, 20 us for the kernels here: as long as
    a small one runs, and there are half a dozen in a layer. This one looks at the same facts, in 5 us.
    """
    with on_device_of(args[0]):
        key = (kernel, args[0].device, warps, stages, registers, *constants.values(), *map(_kind, args))
        if key not in _compiled:
            options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
            compiled = kernel[(programs,)](*args, **constants, **options)
            if compiled is not None:  # as it is in the interpreter
                _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]
            return
        compiled, ordered = _compiled[key]
        compiled[(programs, 1, 1)](*args, *ordered)


def _kind(argument: Tensor | float | None) -> object:
    """What Triton makes a variant of a kernel for: dtype and alignment; and ones and multiples of 16 among numbers."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int) and argument != 1:
        return argument % 16 == 0, argument >= 2**31
    return type(argument), argument == 1
