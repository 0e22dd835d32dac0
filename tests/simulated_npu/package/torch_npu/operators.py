"""`torch.ops.npu`: operators of torch_npu that kernels for the NPU call, computed on the host; and the operators of
torch whose results differ there.

To add one, write its schema as it stands in torch_npu's csrc/aten/*.yaml and its formula over CPU tensors, which is
what the formula gets. Sums are in float32, as on the NPU, and rounded once at the end.
"""

import torch
from torch.nn.functional import gelu
from torch.utils._pytree import tree_map_only

from torch_npu import _C

__all__ = []


def fused_matmul(x1, x2, *, bias=None, x3=None, fused_op_type=""):
    """`x1 @ x2 + bias`, then the epilogue that `fused_op_type` names; refuses what aclnnFusedMatmul refuses.

    CANN's documentation lists aclnnFusedMatmul for the Ascend 950 alone, not for 910B and 910C.
    """
    half = x1.dtype in (torch.float16, torch.bfloat16)
    _check(half or (x1.dtype == torch.float32 and torch.npu.matmul.allow_hf32), f"{x1.dtype} (float32 needs HF32)")
    _check(x1.dtype == x2.dtype, f"x1 in {x1.dtype} and x2 in {x2.dtype}")
    _check(x1.dim() == x2.dim(), f"x1 with {x1.dim()} dimensions and x2 with {x2.dim()}")
    _check((x3 is not None) == (fused_op_type in ("add", "mul")), f"x3 with fused_op_type {fused_op_type!r}")
    y = x1.float() @ x2.float()
    if bias is not None:
        _check(fused_op_type in ("", "relu", "add", "mul"), f"a bias with fused_op_type {fused_op_type!r}")
        y += bias.float()
    if x3 is not None:
        fits = x3.dim() <= y.dim() <= 3 and x3.shape[-2:] == y.shape[-2:]
        _check(fits and x3.dtype == x1.dtype, f"x3 of shape {tuple(x3.shape)} in {x3.dtype}")
    epilogue = {
        "": lambda: y,
        "relu": lambda: torch.relu(y),
        "add": lambda: y + x3.float(),
        "mul": lambda: y * x3.float(),
        "gelu_erf": lambda: gelu(y),
        "gelu_tanh": lambda: gelu(y, approximate="tanh"),
    }
    _check(fused_op_type in epilogue, f"fused_op_type {fused_op_type!r}")
    return epilogue[fused_op_type]().to(x1.dtype)


def _check(allowed, what):
    if not allowed:
        raise RuntimeError(f"simulated npu_fused_matmul: does not take {what}")


def fusion_attention(*args, **kwargs):
    """transformers imports the operator wherever there is an NPU, and calls it for flash attention alone."""
    raise NotImplementedError("simulated npu_fusion_attention: has no formula here; use attn_implementation='sdpa'")


def native_dropout(x, p, train):
    """torch's operator as torch_npu has it: the mask in bits, eight to a byte, in blocks of 128."""
    kept = torch.rand(x.shape, device=x.device) >= (p if train else 0.0)
    bits = torch.zeros(-(-kept.numel() // 128) * 16, 8, dtype=torch.uint8, device=x.device)
    bits.view(-1)[: kept.numel()] = kept.flatten()
    return x * kept * _dropout_scale(p), (bits << torch.arange(8, device=x.device)).sum(1).to(torch.uint8)


def native_dropout_backward(gradient, mask, scale):
    """Of the mask in bits."""
    bits = (mask[:, None] >> torch.arange(8, device=mask.device)) & 1
    return gradient * bits.flatten()[: gradient.numel()].view(gradient.shape) * scale


def _dropout_scale(p):
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


OF_TORCH = {"native_dropout": native_dropout, "native_dropout_backward": native_dropout_backward}

OPERATORS = {
    "npu_fused_matmul(Tensor x1, Tensor x2, *, Tensor? bias=None, Tensor? x3=None, str fused_op_type='') -> Tensor": (
        fused_matmul
    ),
    (
        "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
        "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
        "bool sync=False, str softmax_layout='', Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, "
        "int offset=0) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
    ): fusion_attention,
}


def _on_host(formula):
    def kernel(*args, **kwargs):
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        args, kwargs = tree_map_only(torch.Tensor, _C.host_view, (args, kwargs))
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), formula(*args, **kwargs))

    return kernel


_library = torch.library.Library("npu", "DEF")
for _schema, _formula in OPERATORS.items():
    _name = _library.define(_schema)
    _library.impl(_name, _on_host(_formula), "PrivateUse1")
    globals()[_name] = getattr(torch.ops.npu, _name)
    __all__.append(_name)

_of_torch = torch.library.Library("aten", "IMPL")
for _name, _formula in OF_TORCH.items():
    _of_torch.impl(_name, _formula, "PrivateUse1")  # on the device, whose random state is another than the host's
