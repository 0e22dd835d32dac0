"""What every launch shares: its configuration, and the device that it is on."""

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


def on_device_of(t: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device_of(t)
