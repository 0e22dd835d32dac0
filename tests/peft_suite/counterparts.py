"""What stands for LoRA's configuration in PEFT's tests: the same keywords, read as ours."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig

from sora_hw import ConditionedConfig
from sora_hw.conditioning import PRESETS

_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init_weights",
}
_SAME = {
    "r",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "bias",
    "task_type",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "ensure_weight_tying",
    "use_rslora",
    "fan_in_fan_out",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
}
_LORA_DEFAULTS = {"r": 8, "alpha": 8, "dropout": 0.0}

# Rows of PEFT's lists that have no counterpart, by the keyword that says so.
WITHOUT_COUNTERPART = {
    "alora_invocation_tokens": "a variant of LoRA (activated LoRA)",
    "layer_replication": "LoRA's way to repeat layers",
    "kasa_config": "a variant of LoRA (KaSA)",
    "lora_bias": "a bias of LoRA's B; the framework conditions weights",
    "monteclora_config": "a variant of LoRA (MonteCLoRA)",
    "use_bdlora": "a variant of LoRA (block-diagonal LoRA)",
    "velora_config": "a variant of LoRA (VeLoRA)",
    "target_parameters": "refused: a parameter without a layer of its own has no output that could be conditioned",
}


class NoCounterpart(Exception):
    """A keyword of LoRA that means nothing here, with the reason."""


def counterpart(keywords: Mapping[str, object]) -> dict[str, object]:
    """The keywords of `ConditionedConfig` that stand for those of `LoraConfig`.

    `use_dora=True` gives the method. Raises `NoCounterpart` for what is written down above, KeyError for the unknown.
    """
    ours: dict[str, object] = {}
    for name, value in keywords.items():
        if name == "use_dora":
            ours |= {"method": "dora"} if value else {}
        elif name in WITHOUT_COUNTERPART:
            if value:
                raise NoCounterpart(f"{name}: {WITHOUT_COUNTERPART[name]}")
        elif name == "init_lora_weights" and value == "mica":
            raise NoCounterpart("init_lora_weights='mica': a variant of LoRA (MiCA)")
        elif name in _NAMES:
            ours[_NAMES[name]] = value
        elif name in _SAME:
            ours[name] = value
        else:
            raise KeyError(f"{name} is neither translated nor written down as without a counterpart")
    if ours.get("bias") == "lora_only":
        ours["bias"] = "conditioned_only"
    return ours


def with_lora_defaults(ours: Mapping[str, object]) -> dict[str, object]:
    return {**_LORA_DEFAULTS, **ours}


def presets_of(ours: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Preset -> keywords: every preset, or the one that a row means."""
    methods = [ours["method"]] if "method" in ours else PRESETS
    return {method: {**ours, "method": method} for method in methods}


def given(config: LoraConfig) -> dict[str, object]:
    """The keywords that make a `LoraConfig` differ from the default one."""
    plain = vars(LoraConfig())
    keywords = {name: value for name, value in vars(config).items() if name in plain and value != plain[name]}
    for name in ("peft_type", "peft_version", "runtime_config"):
        keywords.pop(name, None)
    return {name: sorted(value) if isinstance(value, set) else value for name, value in keywords.items()}


def class_of(method: str) -> type[ConditionedConfig]:
    """A class of its own for a preset, for tests that are given a class and no keywords."""

    def __init__(self, *args, **keywords):
        ConditionedConfig.__init__(self, *args, **{"method": method, **keywords})

    return type(f"Conditioned_{method}", (ConditionedConfig,), {"__init__": __init__, "preset": method})


class LikeDora(dict):
    """Keywords of a row for which PEFT's tests should take the learning rate that they take for DoRA.

    Theirs for LoRA is too large for what scales the output features, and too small for the model `EmbConv1D`.
    """

    def get(self, key, default=None):
        return True if key == "use_dora" else super().get(key, default)


class _StandIn(type):
    """The class that a test module finds under the name `LoraConfig`; equal to ours, and made with LoRA's keywords."""

    method: str

    def __call__(cls, *args, **keywords):
        ours = {"method": cls.method, **with_lora_defaults(counterpart(keywords))}
        return ConditionedConfig(*args, **ours)

    def __instancecheck__(cls, instance):
        return isinstance(instance, ConditionedConfig)

    def __subclasscheck__(cls, subclass):
        return subclass is cls or (isinstance(subclass, type) and ConditionedConfig in subclass.__mro__)

    def __eq__(cls, other):
        return other is cls or other is ConditionedConfig

    def __hash__(cls):
        return hash(ConditionedConfig)

    def __getattr__(cls, name):
        return getattr(ConditionedConfig, name)


class StandIn(metaclass=_StandIn):
    """See `_StandIn`; `method` is the preset of the test that is running."""

    method = "sora"
