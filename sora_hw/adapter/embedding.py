"""The conditioned embedding: a linear map of one-hot rows, so its input is looked up instead of multiplied."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sora_hw.adapter.config import ConditionedConfig
from sora_hw.adapter.layer import ConditionedLinear, LowRankPath, without_autocast


class ConditionedEmbedding(ConditionedLinear):
    """`torch.nn.Embedding` with weight-conditioned adapters: `y = W'^T[ids]`, `W' = post(pre(W0) + s B A)`.

    The weight is stored as (ids, features), which is `W0^T`. A rotation reads the embedding's output. Dropout does
    not act here: a token has no features before its lookup. The scale of an embedding that has one (Gemma's
    `embed_scale`) applies to what the adapter adds as well.
    """

    sample_dims = 0
    is_linear_layer = False

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ConditionedConfig):
        super().__init__(base_layer, adapter_name, config, fan_in_fan_out=True)

    def _features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        return base.num_embeddings, base.embedding_dim

    def _reset_low_rank(self, a: Tensor, b: Tensor, identity: bool) -> None:
        """As PEFT's LoRA starts an embedding: `B` is random and `A` zero, for a one-hot row reads one column of `A`."""
        nn.init.normal_(b)
        if identity:
            nn.init.zeros_(a)
        else:
            nn.init.normal_(a, std=0.1)

    def _low_rank_path(self, adapter_name: str, x: Tensor) -> tuple[Tensor, LowRankPath]:
        base, p = self.get_base_layer(), self.adapter_parameters(adapter_name)
        with without_autocast(x.device.type):
            linear = self._linear_map(adapter_name, p)
            scaling = self.scaling[adapter_name]
            if (scale := self._get_embed_scale()) is not None:
                scaling = scaling * scale
            rows = F.embedding(
                x, p["A"].t(), base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq, sparse=base.sparse
            )
        keep = self.keeping.keep(adapter_name, linear.c, p.values())
        return x, LowRankPath(linear, scaling * rows, None, linear.q is not None, keep)
