"""What every launch shares: its configuration, the device that it is on, and how to start it quickly."""

from collections.abc import Sequence
from contextlib import nullcontext
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
    """

    rows: int
    features: int
    rank: int
    warps: int
    stages: int = 1


_HERE = nullcontext()


def on_device_of(t: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    index = t.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


class Launch:
    """A kernel with its constants, ready to start: `kernel[(programs,)](*tensors, *numbers, **constants)`.

    Triton's own call looks each argument over to find the variant of the kernel, 20 us for the kernels here: as long as
    a small one runs, and there are half a dozen in a layer. This one looks at the same facts in a quarter of the time.
    Make each once, in a function that keeps what it returns.
    """

    def __init__(self, kernel, warps: int, stages: int = 1, **constants):
        self._kernel = kernel
        self._options = {**constants, "num_warps": warps, "num_stages": stages}
        self._compiled: dict[tuple, object] = {}
        names = [name for name in kernel.arg_names if name in constants]
        self._constants = [constants[name] for name in names]  # the last parameters, in their order

    def __call__(self, programs: int, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> None:
        """On the device of the first tensor."""
        # What Triton makes a variant for: of tensors dtype and alignment, of integers size, ones and multiples of 16.
        key = (
            tensors[0].get_device(),
            *[None if t is None else (t.dtype, t.data_ptr() & 15 == 0) for t in tensors],
            *[(n == 1) + 2 * (n % 16 == 0) + 4 * (n >= 2**31) for n in numbers],
        )
        compiled = self._compiled.get(key)
        with on_device_of(tensors[0]):
            if compiled is not None:
                compiled[(programs, 1, 1)](*tensors, *numbers, *self._constants)
            else:
                self._compiled[key] = self._kernel[(programs,)](*tensors, *numbers, **self._options)
