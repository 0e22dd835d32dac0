"""The configuration of a weight-conditioned adapter."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from sora_hw.adapter.checkpoint import FORMAT_VERSION, HOW_TO_LOAD, check_version, write_card
from sora_hw.adapter.registration import add_peft_type
from sora_hw.adapter.starting import STARTS
from sora_hw.conditioning import PRESETS, Conditioning
from sora_hw.rotation import ROTATION_SCALES, ROTATIONS

_DEFAULT_METHOD = "sora"


@dataclass
class ConditionedConfig(PeftConfig):
    """Configuration of a weight-conditioned adapter, `W' = post(pre(W0) + s B A)`.

    Give `method`, the name of a preset, or the two placements `pre` and `post`; nothing at all is SORA. After
    construction all three are filled in (`method` is None for a pair without a name), so they are saved with the
    adapter and a contradiction is noticed on loading.

    Args:
        method: lora, dora, post_diag, prediag, pre_ortho, post_ortho or sora.
        pre: transformation before the low-rank update: none, diagonal or rotation.
        post: transformation after it: none, diagonal, rotation or magnitude.
        r: rank of the low-rank update.
        alpha: its scale; `s = alpha / r`, with `use_rslora` `alpha / sqrt(r)`.
        dropout: probability for the input of the low-rank path while training.
        rotation_rank: `rp`, the columns of the rotation's factors.
        rotation: taylor (the paper), cayley or exp.
        rotation_scale: bounded (the paper's Theorem 2) or reference (the authors' released code).
        rotation_eps: the bound on `||s_p J||_F` under `bounded`.
        condition_bias: scale and rotate the base layer's bias as well, as the authors' released layer does.
        use_rslora: see `alpha`.
        init_weights: start as the identity (True), at a random point (False; for tests), or from the base weight:
            "pissa" or "olora" take the principal part out of it and train that, so that base and adapter together
            are at first what the base was, and the base alone is not.
        target_modules: names or a regular expression of the layers to adapt, or "all-linear"; None takes PEFT's
            choice for LoRA on known model types.
        exclude_modules: names or a regular expression of layers to leave out.
        layers_to_transform: indices of the layers to adapt; all by default.
        layers_pattern: name of the module list that `layers_to_transform` indexes.
        fan_in_fan_out: the base weight is stored as (in, out), as in GPT-2's Conv1D; set by itself for known layers.
        bias: which biases train: none, all or conditioned_only.
        modules_to_save: further modules to train and save whole, such as a classification head.
        rank_pattern: name or regular expression of a layer -> its own `r`.
        alpha_pattern: name or regular expression of a layer -> its own `alpha`.
        trainable_token_indices: rows of the input embedding to train beside the adapter, or name of an embedding ->
            rows.
        ensure_weight_tying: train tied modules of `modules_to_save` and `trainable_token_indices` as one.
        target_parameters: refused, see `ConditionedConfig._check_values`.
        format_version: of the saved adapter; not to be given.
        how_to_load: what a reader of the saved configuration must know; not to be given.

    Raises:
        ValueError: for unknown names, ranks below 1, numbers that are not finite, a dropout outside [0, 1), a
            `method` that contradicts `pre` and `post`, or a format_version of another sora_hw.
    """

    method: str | None = field(default=None, metadata={"help": "Preset: " + ", ".join(PRESETS) + "."})
    pre: str | None = field(default=None, metadata={"help": "Transformation before the low-rank update."})
    post: str | None = field(default=None, metadata={"help": "Transformation after the low-rank update."})
    r: int = field(default=16, metadata={"help": "Rank of the low-rank update."})
    alpha: float = field(default=32, metadata={"help": "Scale of the low-rank update, s = alpha / r."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of the low-rank path."})
    rotation_rank: int = field(default=1, metadata={"help": "Columns of the rotation's factors."})
    rotation: str = field(default="taylor", metadata={"help": "taylor, cayley or exp."})
    rotation_scale: str = field(default="bounded", metadata={"help": "bounded or reference."})
    rotation_eps: float = field(default=1.0, metadata={"help": "Bound on the rotation under the bounded scale."})
    condition_bias: bool = field(default=False, metadata={"help": "Scale and rotate the bias as well."})
    use_rslora: bool = field(default=False, metadata={"help": "s = alpha / sqrt(r)."})
    init_weights: bool | str = field(default=True, metadata={"help": "Start: True, False, pissa or olora."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "The base weight is stored as (in, out)."})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or conditioned_only."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Layer -> its own r."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Layer -> its own alpha."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of the embedding to train beside the adapter."}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Train tied modules as one."})
    target_parameters: None = field(default=None, metadata={"help": "Not supported: only layers are conditioned."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Format of the saved adapter."})
    how_to_load: str = field(default=HOW_TO_LOAD, repr=False, metadata={"help": "A note in the saved configuration."})

    def __post_init__(self):
        super().__post_init__()
        check_version(self.format_version)
        self.how_to_load = HOW_TO_LOAD
        self.peft_type = add_peft_type()
        self._resolve_method()
        self._check_values()
        self.target_modules = set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str. Give a list of names.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    @property
    def conditioning(self) -> Conditioning:
        """What conditions the weight, and how."""
        return Conditioning(self.pre, self.post, self.rotation, self.rotation_scale, self.rotation_eps)

    @property
    def scaling(self) -> float:
        """`s`, the factor of the low-rank update."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def at(self, name: str) -> ConditionedConfig:
        """The configuration of the layer of this name: itself, or with the rank and alpha of its patterns."""
        own = {}
        for key, pattern in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            found = get_pattern_key(pattern or (), name)
            if pattern and found in pattern:
                own[key] = pattern[found]
        return replace(self, **own) if own else self

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write adapter_config.json, and the model card that says how to load it."""
        super().save_pretrained(save_directory, **kwargs)
        self.write_card(Path(save_directory))

    def write_card(self, folder: Path) -> None:
        """Write the model card into the folder of the saved adapter, or on top of the one that it has."""
        write_card(folder, self, self._facts())

    def _facts(self) -> dict[str, object]:
        """What decides the adapter's output, for its card."""
        method = self.method or "a pair without a name"
        facts = {"method": method, "pre": self.pre, "post": self.post, "r": self.r, "alpha": self.alpha}
        if "rotation" in (self.pre, self.post):
            facts["rotation"] = f"{self.rotation}, rank {self.rotation_rank}, scale {self.rotation_scale}"
        if self.condition_bias:
            facts["bias"] = "scaled and rotated as well"
        return facts | {"base model": self.base_model_name_or_path or "unknown", "format version": self.format_version}

    def _resolve_method(self) -> None:
        if self.method is None and self.pre is None and self.post is None:
            self.method = _DEFAULT_METHOD
        if self.method is None:
            self.pre, self.post = self.pre or "none", self.post or "none"
            self.method = next((name for name, pair in PRESETS.items() if pair == (self.pre, self.post)), None)
            return
        if self.method not in tuple(PRESETS):  # which may be of any type
            raise ValueError(f"method={self.method!r} is unknown: choose one of {', '.join(PRESETS)}")
        pre, post = PRESETS[self.method]
        for name, given, preset in (("pre", self.pre, pre), ("post", self.post, post)):
            if given not in (None, preset):
                raise ValueError(
                    f"method={self.method!r} means {name}={preset!r}, which contradicts {name}={given!r}: "
                    "give the method or the placements"
                )
        self.pre, self.post = pre, post

    def _check_values(self) -> None:
        if self.target_parameters:
            raise ValueError(
                "target_parameters is not supported: a parameter that is not a layer's own, such as the experts of a "
                "mixture, has no output of its own to condition; choose target_modules"
            )
        Conditioning(self.pre, self.post)
        for name in ("r", "rotation_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        for name, known in (
            ("rotation", ROTATIONS),
            ("rotation_scale", ROTATION_SCALES),
            ("bias", ("none", "all", "conditioned_only")),
            ("init_weights", (True, False, *STARTS)),
        ):
            if getattr(self, name) not in tuple(known):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(map(str, known))}"
                )
        for name in ("alpha", "dropout", "rotation_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
                raise ValueError(f"{name}={value!r} must be a finite number")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, list) and not all(isinstance(each, str) for each in value):
                raise ValueError(f"{name}={value!r} must be names")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1")
        if not self.rotation_eps > 0:
            raise ValueError(f"rotation_eps={self.rotation_eps!r} must be above 0")
