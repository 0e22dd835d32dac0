"""The conditioned convolution: a linear map of every patch of the input, so its low-rank part is a convolution, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_hw.adapter.layer import ConditionedLinear, LowRankPath, compute_dtype, without_autocast

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConditionedConvolution(ConditionedLinear):
    """A convolution with weight-conditioned adapters, `W' = post(pre(W0) + s B A)` of its weight as a matrix.

    The matrix is (out, in), `out` the channels of the output and `in` the entries of a patch: channels of a group times
    the kernel. The rows of `A` are filters, `B`, the diagonal and the rotation act on the output's channels.

    In a grouped convolution every row of the matrix meets the patch of its own group. `A` and what a rotation reads,
    `Q^T W0`, are filters that every group applies to its own channels; so the forward is that of the merged weight.
    """

    is_linear_layer = False

    def _features(self) -> tuple[int, int]:
        base = self.get_base_layer()
        kernel = torch.Size(base.kernel_size).numel()
        return base.in_channels // base.groups * kernel, base.out_channels

    @property
    def sample_dims(self) -> int:
        return 1 + len(self.get_base_layer().kernel_size)

    def _as_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def _as_stored(self, matrix: Tensor) -> Tensor:
        base = self.get_base_layer()
        return matrix.reshape(-1, base.in_channels // base.groups, *base.kernel_size)

    def _filtered(self, x: Tensor, rows: Tensor) -> Tensor:
        """The input (N, channels, ...) under filters `rows` (R, in), of each group: (N, groups * R, ...)."""
        base = self.get_base_layer()
        filters = self._as_stored(rows.to(x.dtype))
        return base._conv_forward(x, filters.repeat(base.groups, *[1] * (filters.dim() - 1)), None)

    def _low_rank_path(self, adapter_name: str, x: Tensor) -> tuple[Tensor, LowRankPath]:
        p = self.adapter_parameters(adapter_name)
        source = x.to(compute_dtype(x))
        with without_autocast(x.device.type):
            linear = self._linear_map(adapter_name, p)
            dropped = self.conditioned_dropout[adapter_name](source)
            z = self._filtered(dropped, self.scaling[adapter_name] * p["A"])
            reads_output = linear.q is not None and self.get_base_layer().groups == 1
            if linear.q is not None and not reads_output:
                with self._base_weight() as weight:
                    turned = self._filtered(source, linear.q.t().to(weight.dtype) @ weight)
                by_group = [t.unflatten(1, (self.get_base_layer().groups, -1)) for t in (z, turned)]
                z = torch.cat(by_group, dim=2).flatten(1, 2)
            bias = self._missing_bias(adapter_name, linear, reads_output)
        keep = self.keeping.keep(adapter_name, linear.c, p.values())
        return x, LowRankPath(linear, z, bias, reads_output, keep)

    def _output(self, path: LowRankPath, base: Tensor) -> Tensor:
        if self.get_base_layer().groups > 1:
            return self._grouped_output(path, base)
        result = path._replace(z=path.z.movedim(1, -1)).output(base.movedim(1, -1)).movedim(-1, 1)
        return result.contiguous() if base.is_contiguous() else result

    def _grouped_output(self, path: LowRankPath, base: Tensor) -> Tensor:
        """`c * base + z B'^T + bias`, every group with its own rows of `B'`."""
        base_layer = self.get_base_layer()
        pointwise = [1] * len(base_layer.kernel_size)
        with without_autocast(base.device.type):
            c, b, _ = path.linear
            filters = b.to(path.z.dtype).reshape(*b.shape, *pointwise)
            result = _POINTWISE[len(pointwise)](path.z, filters, groups=base_layer.groups)
            result = result + (base if c is None else base * c.view(-1, *pointwise))
            if path.bias is not None:
                result = result + path.bias.view(-1, *pointwise)
            return result.to(base.dtype)
