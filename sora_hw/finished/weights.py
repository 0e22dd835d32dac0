"""The weights of a model as they lie on the disk, read one layer at a time: a model need not fit into memory."""

from __future__ import annotations

from tempfile import TemporaryDirectory

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sora_hw.hardware import Profile
from sora_hw.training.base_model import BaseModel, linear_layers, load_model


class StoredModel:
    """A model whose layers have their weights on the disk. To be closed.

    transformers finds each weight in the checkpoint, whatever its files are called, however they are divided and
    whichever names they give the layers. A checkpoint that is not of safetensors is copied to a temporary folder.

    Raises UserError where the model cannot be loaded.
    """

    def __init__(self, base: BaseModel, profile: Profile):
        """profile: its dtype is that of the weights as they are read."""
        self._folder = TemporaryDirectory(prefix="sora-hw-")
        try:
            self.model: PreTrainedModel = load_model(
                base, profile, device_map={"": "disk"}, offload_folder=self._folder.name
            )
        except BaseException:
            self.close()
            raise

    def layers(self) -> list[str]:
        """The full names of the linear layers, in the order of the model."""
        return list(linear_layers(self.model))

    def size(self, layer: str) -> int:
        """The number of weights of a linear layer."""
        return self.model.get_submodule(layer).weight.numel()

    def weight(self, layer: str) -> Tensor:
        """The weight (out, in) of a linear layer, read anew. Layers of different names may be read at the same time."""
        module = self.model.get_submodule(layer)
        with torch.no_grad(), align_module_device(module, torch.device("cpu")):
            weight = module.weight.data
        return weight.T if isinstance(module, Conv1D) else weight

    def close(self) -> None:
        self._folder.cleanup()

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
