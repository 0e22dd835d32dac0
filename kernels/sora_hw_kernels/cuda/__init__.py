"""Triton kernels for NVIDIA GPUs. What they do not take, such as float64, the plain PyTorch of `reference` computes."""

import torch

from sora_hw_kernels.cuda import rotation, row_norm, scale_rank

torch.library.impl("sora_hw::scale_rank_update", "cuda", scale_rank.forward)
torch.library.impl("sora_hw::scale_rank_update_backward", "cuda", scale_rank.backward)
torch.library.impl("sora_hw::input_gradient", "cuda", scale_rank.input_gradient)
torch.library.impl("sora_hw::factored_row_norm", "cuda", row_norm.factored_row_norm)
torch.library.impl("sora_hw::taylor_rotation", "cuda", rotation.forward)
torch.library.impl("sora_hw::taylor_rotation_backward", "cuda", rotation.backward)
