"""Ascend NPUs: Triton-Ascend kernels where they can be launched, else a composition of the vendor's operators.

Registered under PrivateUse1, the key that torch_npu renames to "npu". Importing this imports neither torch_npu nor
triton: both are looked for when a tensor on an NPU calls.
"""

import torch

from sora_hw_kernels.npu import composition, verifier
from sora_hw_kernels.npu.launch import describe
from sora_hw_kernels.reference import rotation

__all__ = ["describe"]

torch.library.impl("sora_hw::scale_rank_update", "privateuseone", verifier.forward)
torch.library.impl("sora_hw::scale_rank_update_backward", "privateuseone", verifier.backward)
torch.library.impl("sora_hw::input_gradient", "privateuseone", verifier.input_gradient)
torch.library.impl("sora_hw::dropout", "privateuseone", composition.dropout)
torch.library.impl("sora_hw::factored_row_norm", "privateuseone", verifier.factored_row_norm)
# Small tensors only: the products of PyTorch are the vendor's here.
torch.library.impl("sora_hw::taylor_rotation", "privateuseone", rotation.forward)
torch.library.impl("sora_hw::taylor_rotation_backward", "privateuseone", rotation.backward)
