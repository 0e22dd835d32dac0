"""Plain PyTorch: the truth that every other kernel is held against, and the implementation for CPU.

With `SORA_HW_FALLBACK=1` in the environment it also serves, slowly, every device that has no kernels of its own.
"""

import logging
import os

import torch

from sora_hw_kernels.reference import rotation, row_norm, scale_rank

_IMPLEMENTATIONS = {
    "sora_hw::scale_rank_update": scale_rank.forward,
    "sora_hw::scale_rank_update_backward": scale_rank.backward,
    "sora_hw::input_gradient": scale_rank.input_gradient,
    "sora_hw::factored_row_norm": row_norm.factored_row_norm,
    "sora_hw::taylor_rotation": rotation.forward,
    "sora_hw::taylor_rotation_backward": rotation.backward,
}

for name, implementation in _IMPLEMENTATIONS.items():
    torch.library.impl(name, "cpu", implementation)

if os.environ.get("SORA_HW_FALLBACK") == "1":
    logging.getLogger(__name__).warning(
        "SORA_HW_FALLBACK=1: devices without kernels of their own run the plain PyTorch reference, which is slow"
    )
    _library = torch.library.Library("sora_hw", "IMPL", "CompositeExplicitAutograd")
    for name, implementation in _IMPLEMENTATIONS.items():
        _library.impl(name.removeprefix("sora_hw::"), implementation)
