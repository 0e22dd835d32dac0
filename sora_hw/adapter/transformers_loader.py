"""transformers' own loader of adapters, which is to load ours as a whole or not at all.

`model.load_adapter(folder)`, and `AutoModel.from_pretrained(folder)` by it, ask no method about tensors: what is
missing stays at its start values, and a report is logged. There is no hook, so the public method is wrapped, and what
it returns is checked.
"""

from __future__ import annotations

import functools
import re

from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin

from sora_hw.adapter.checkpoint import check_tensors


def check_what_it_loads(model_cls: type) -> None:
    """Make `load_adapter` raise ValueError where a tensor of an adapter of `model_cls`'s type is missing or foreign.

    The adapter is then taken out of the model again.
    """
    load = PeftAdapterMixin.load_adapter

    @functools.wraps(load)
    def load_adapter(self: PreTrainedModel, peft_model_id=None, adapter_name: str | None = None, *args, **kwargs):
        info = load(self, peft_model_id, adapter_name, *args, **kwargs)
        name = adapter_name or "default"
        if self.peft_config[name].peft_type.lower() + "_" == model_cls.prefix:
            own = re.compile(
                rf".*\.({model_cls.prefix}\w+|modules_to_save|trainable_tokens_delta)\.{re.escape(name)}\b.*"
            )
            parameters = {key for key, _ in self.named_parameters()}  # each once, also where layers are tied
            missing = {key for key in info.missing_keys & parameters if own.fullmatch(key)}
            try:
                check_tensors(missing, info.unexpected_keys, model_cls.known_names(self, name))
            except ValueError:
                self.delete_adapter(name)
                raise
        return info

    PeftAdapterMixin.load_adapter = load_adapter
