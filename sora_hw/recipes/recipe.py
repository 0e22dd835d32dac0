"""What a recipe says: everything that decides which adapter a run produces, and nothing about its hardware.

`Recipe` holds what every benchmark has; `LanguageModelling` and `Classification` are the two ways to learn.
"""

import math
from dataclasses import dataclass, field, fields

from sora_hw.conditioning import PRESETS
from sora_hw.data.glue import TASKS
from sora_hw.errors import UserError
from sora_hw.rotation import ROTATION_SCALES, ROTATIONS

MODEL, DATA, OPTIMISATION, RUN = "model and method", "data", "optimisation", "run"
EMBEDDED = "embedded"  # the model and the questions that come with this package
FULL, LORA_PLUS, OFT = "full", "lora_plus", "oft"  # what the paper compares with, beside the presets
METHODS = (*PRESETS, FULL, LORA_PLUS, OFT)


def value(group: str, help: str, **limits):
    """A recipe's field: its place in the launcher's --help and what it may be (`least`, `above`, `below`, `among`)."""
    return field(metadata={"group": group, "help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A fine-tuning recipe of either kind. The launcher has one flag for each field.

    Raises UserError, naming the launcher's flag, for a value outside its limits.
    """

    name: str
    model: str = value(MODEL, "base model: a folder, a model id of the Hugging Face hub, or `embedded`")
    method: str = value(MODEL, "how the base weights are conditioned, or a method to compare with", among=METHODS)
    target_modules: tuple[str, ...] = value(MODEL, "names of the linear layers to adapt, or one regular expression")
    modules_to_save: tuple[str, ...] = value(MODEL, "names of the layers that are trained whole beside the adapter")
    rank: int = value(MODEL, "rank of the low-rank update", least=1)
    alpha: float = value(MODEL, "scale of the low-rank update is alpha / rank", above=0)
    rotation_rank: int = value(MODEL, "rank of the rotation, for methods that have one", least=1)
    rotation: str = value(MODEL, "form of the rotation", among=tuple(ROTATIONS))
    rotation_scale: str = value(MODEL, "how the rotation's size is held small", among=tuple(ROTATION_SCALES))
    dropout: float = value(MODEL, "dropout on the low-rank path", least=0, below=1)

    train_data: tuple[str, ...] = value(DATA, f"files of records, an id of the Hugging Face hub, or `{EMBEDDED}`")
    records: int | None = value(DATA, "records drawn from the data by the seed; all where not given", least=1)
    max_length: int = value(DATA, "longest sample in tokens; longer ones are cut and counted", least=2)
    validation_size: int = value(DATA, "training records held out for a validation loss; 0 for none", least=0)

    global_batch: int = value(OPTIMISATION, "samples per optimiser step, over all ranks", least=1)
    epochs: float = value(OPTIMISATION, "passes over the data, where --max-steps is not given", above=0)
    max_steps: int | None = value(OPTIMISATION, "optimiser steps; goes before --epochs", least=1)
    warmup_steps: int = value(OPTIMISATION, "steps of linear warm-up", least=0)
    learning_rate: float = value(OPTIMISATION, "peak learning rate of AdamW", above=0)
    schedule: str = value(OPTIMISATION, "learning rate after the warm-up", among=("cosine", "linear", "constant"))
    beta1: float = value(OPTIMISATION, "AdamW's decay of the mean gradient", least=0, below=1)
    beta2: float = value(OPTIMISATION, "AdamW's decay of the mean squared gradient", least=0, below=1)
    weight_decay: float = value(OPTIMISATION, "AdamW's weight decay", least=0)
    max_grad_norm: float = value(OPTIMISATION, "gradients are clipped to this norm; 0 for no clipping", least=0)
    seed: int = value(OPTIMISATION, "decides initialisation, dropout, split and order of samples", least=0, below=2**32)

    log_steps: int = value(RUN, "steps between logged losses", least=1)
    save_steps: int = value(RUN, "steps between checkpoints", least=1)
    eval_steps: int = value(RUN, "steps between validation losses", least=1)
    keep_best: bool = value(RUN, "end with the checkpoint of the lowest validation loss instead of the last")

    def __post_init__(self):
        for item in fields(self):
            _check(item.name, getattr(self, item.name), item.metadata)
        if not self.target_modules:
            raise UserError("--target-modules: give at least one layer name")
        if self.keep_best and (not self.validation_size or self.save_steps % self.eval_steps):
            raise UserError(
                "--keep-best needs --validation-size above 0 and --save-steps that are a multiple of --eval-steps "
                f"(they are {self.validation_size}, {self.save_steps} and {self.eval_steps})"
            )

    @property
    def low_rank(self) -> bool:
        """Whether the method learns a low-rank update, so that the ranks mean something."""
        return self.method not in (FULL, OFT)

    @property
    def asks_embedded_questions(self) -> bool:
        """Whether the embedded question set is learned, and its held-out questions scored."""
        return self.train_data == (EMBEDDED,)

    def steps(self, training_size: int) -> int:
        """Optimiser steps of the whole run: `max_steps`, or as many as the Trainer takes for `epochs`."""
        return self.max_steps or math.ceil(self.epochs * math.ceil(training_size / self.global_batch))


@dataclass(frozen=True, kw_only=True)
class LanguageModelling(Recipe):
    """The next token is learned."""

    learn: str = value(DATA, "learn the whole text of a sample or its answer alone", among=("text", "answer"))


@dataclass(frozen=True, kw_only=True)
class Classification(Recipe):
    """The label of a sentence, or of a pair, is learned by a head on an encoder."""

    task: str = value(DATA, "which task of the benchmark", among=tuple(TASKS))
    test_data: tuple[str, ...] = value(DATA, "files of records that the trained model is scored on")


@dataclass(frozen=True)
class Grid:
    """What a sweep runs through: every rank with every learning rate and every seed.

    Where there are several learning rates, `validation_size` records are held out to choose among them.
    """

    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    ranks: tuple[int, ...]
    validation_size: int


def _check(name: str, given, limits) -> None:
    flag = "--" + name.replace("_", "-")
    if given is None:
        return
    if "among" in limits and given not in limits["among"]:
        raise UserError(f"{flag} {given}: choose one of {', '.join(limits['among'])}")
    if isinstance(given, float) and not math.isfinite(given):
        raise UserError(f"{flag} {given}: must be a finite number")
    if "least" in limits and given < limits["least"]:
        raise UserError(f"{flag} {given}: must be at least {limits['least']}")
    if "above" in limits and given <= limits["above"]:
        raise UserError(f"{flag} {given}: must be above {limits['above']}")
    if "below" in limits and given >= limits["below"]:
        raise UserError(f"{flag} {given}: must be below {limits['below']}")
