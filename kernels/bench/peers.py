"""What a user would pick instead of sora_hw, and sora_hw itself: modules that adapt one frozen linear layer.

Beside PEFT's methods stand two layers written here: a LoRA in the fastest published style (autograd by hand, the
vendor's products, `addmm` in place), and the composition of SORA that the formula of its paper suggests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn

import sora_hw

ALPHA = 32
METHODS = ("lora", "prediag", "dora", "sora")
FROZEN = "frozen linear"


class _ByHand(torch.autograd.Function):
    """`x W0^T + s (x A^T) B^T`; the update and its gradient are added to the vendor's products in place."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        rows = x.flatten(0, -2)
        z = rows @ a.t()
        ctx.save_for_backward(rows, z, weight, a, b)
        ctx.s = s
        return (rows @ weight.t()).addmm_(z, b.t(), alpha=s).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, z, weight, a, b = ctx.saved_tensors
        dy = grad.flatten(0, -2)
        dz = ctx.s * (dy @ b)
        dx = (dy @ weight).addmm_(dz, a)
        return dx.view(*grad.shape[:-1], -1), None, dz.t() @ rows, ctx.s * (dy.t() @ z), None


class LoraByHand(nn.Module):
    """LoRA as unsloth and its kin write it; the adapter in the dtype of the rows."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features, device=base.weight.device) / rank)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.s = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        return _ByHand.apply(x, self.base.weight, self.a.to(x.dtype), self.b.to(x.dtype), self.s)


class SoraByFormula(nn.Module):
    """`u = d * base(x) + s B A x`, `y = u + s_p ((u C) D^T - (u D) C^T)`, `s_p = min(1, 1 / (||C|| + ||D||))`."""

    def __init__(self, base: nn.Linear, rank: int, rotation_rank: int):
        super().__init__()
        out, on = base.out_features, {"device": base.weight.device}
        self.base, self.s = base, ALPHA / rank
        self.a = nn.Parameter(torch.randn(rank, base.in_features, **on) / rank)
        self.b = nn.Parameter(torch.zeros(out, rank, **on))
        self.diagonal = nn.Parameter(torch.ones(out, **on))
        self.c = nn.Parameter(torch.randn(out, rotation_rank, **on) / out**0.5)
        self.d = nn.Parameter(self.c.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        s_p = (1 / (self.c.norm() + self.d.norm() + 1e-6)).clamp(max=1).to(x.dtype)
        a, b, diagonal, c, d = (t.to(x.dtype) for t in (self.a, self.b, self.diagonal, self.c, self.d))
        u = diagonal * self.base(x) + self.s * (x @ a.t() @ b.t())
        return u + s_p * ((u @ c) @ d.t() - (u @ d) @ c.t())


def adapted_linears(
    inputs: int, outputs: int, rank: int, rotation_rank: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, nn.Module]:
    """Every peer around a frozen linear layer of random weights; dropout 0, adapters in each library's default dtype.

    In half precision PEFT computes a float32 adapter in float32; its all-half form, which is faster, runs as well.
    `compiled` adds ours under `torch.compile`.
    """

    def base() -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device).requires_grad_(False)

    def by_peft(config, **kwargs) -> nn.Module:
        return get_peft_model(nn.Sequential(base()), config, **kwargs)

    def lora(**kwargs) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["0"], **kwargs)

    def ours(method: str) -> nn.Module:
        config = {"r": rank, "alpha": ALPHA, "dropout": 0.0, "rotation_rank": rotation_rank, "target_modules": ["0"]}
        return by_peft(sora_hw.ConditionedConfig(method=method, **config))

    modules: dict[str, Callable[[], nn.Module]] = {
        FROZEN: base,
        "PEFT LoRA": lambda: by_peft(lora()),
        "PEFT DoRA": lambda: by_peft(lora(use_dora=True)),
        "PEFT OFT": lambda: by_peft(OFTConfig(r=0, oft_block_size=32, target_modules=["0"], module_dropout=0.0)),
        "LoRA by hand": lambda: LoraByHand(base(), rank),
        "SORA by formula": lambda: SoraByFormula(base(), rank, rotation_rank),
    }
    if dtype != torch.float32:
        modules["PEFT LoRA, half adapter"] = lambda: by_peft(lora(), autocast_adapter_dtype=False)
        modules["PEFT DoRA, half adapter"] = lambda: by_peft(lora(use_dora=True), autocast_adapter_dtype=False)
    modules |= {f"sora_hw {method}": lambda method=method: ours(method) for method in METHODS}
    if compiled:
        # All share the code of PEFT's model; beyond the limit dynamo would run them uncompiled and say nothing.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        modules |= {
            f"sora_hw {method}, compiled": lambda method=method: torch.compile(ours(method), fullgraph=True)
            for method in METHODS
        }
    made = {name: make() for name, make in modules.items()}
    for module in made.values():
        start_from_a_trained_point(module)
    return made


def start_from_a_trained_point(module: nn.Module) -> None:
    """Move every trainable parameter a little, so that no peer multiplies by zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
