"""What runs on devices as one kernel and on meta tensors not at all: stand-ins that hold the same memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

ATTENTION = "sora_hw_fused_attention"


class _FusedAttention(torch.autograd.Function):
    """Keeps what every fused attention keeps: q, k, v, its output, and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, tokens, _ = q.shape
        # Laid out token by token, as the kernels do, so that the model's transpose costs no copy.
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention(module, query, key, value, attention_mask, **kwargs):
    """transformers' attention interface. With a mask, as a padded batch has one, transformers gives torch's attention
    a key and a value for each head of the query; without, grouped ones serve."""
    if attention_mask is not None:
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) if groups > 1 else each for each in (key, value))
    out = _FusedAttention.apply(query, key, value)
    return out.transpose(1, 2).contiguous(), None


def _mask(batch_size, q_length, kv_length, device, **kwargs):
    """A mask of a padded batch; one sample alone is not padded, and transformers then leaves the mask out."""
    if batch_size == 1:
        return None
    return torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device)


def fuse_attention(model: PreTrainedModel) -> None:
    """Let a model that has an interface for attention (most have; DeBERTa has not) use a fused one."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
    if model._supports_sdpa:
        model.set_attn_implementation(ATTENTION)


class _FusedLoss(torch.autograd.Function):
    """Liger's fused linear cross-entropy (liger_kernel/ops/fused_linear_cross_entropy.py, 0.8.5), allocation by
    allocation: the gradients are made in the forward pass, from logits of a few tokens at a time."""

    @staticmethod
    def forward(ctx, hidden, weight):
        tokens, width = hidden.shape
        chunk = fused_loss_chunk(tokens, width, weight.shape[0])
        gradient = torch.empty_like(hidden)
        weight_gradient = torch.empty_like(weight) if weight.requires_grad else None
        losses = hidden.new_empty(tokens, dtype=torch.float32)
        logits = hidden.new_empty(chunk, width) @ weight.t()  # the loss is written over it, as is its gradient
        if weight_gradient is not None:
            weight_gradient.addmm_(logits.t(), hidden[:chunk])
        del logits
        ctx.save_for_backward(gradient, weight_gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors  # scaled in place


def fused_loss_chunk(tokens: int, width: int, vocabulary: int) -> int:
    """The tokens whose logits Liger holds at a time: about as much memory as the hidden states, up to a power of 2."""
    parts = -(-vocabulary // width)
    return min(1 << (-(-tokens // parts) - 1).bit_length(), tokens)


class FusedLossHead(nn.Module):
    """In the place of the output embeddings: hidden states (..., width) -> the loss, a scalar."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return _FusedLoss.apply(hidden.flatten(0, -2), self.weight)
