"""What trains: an adapter of ours, one of PEFT's that the paper compares with, or the whole model."""

from collections.abc import Iterator

import torch
from peft import LoraConfig, OFTConfig, PeftConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import PreTrainedModel, set_seed

from sora_hw import ConditionedConfig
from sora_hw.recipes.recipe import FULL, LORA_PLUS, OFT, Recipe

MODULES_TO_SAVE = ".modules_to_save."  # in the names of what PEFT trains whole
LORA_PLUS_RATIO = 16  # how much faster B learns than A: the value that LoRA+ (Hayou et al., 2024) recommends
# No block size gives the 0.58 % of the paper's Table 4 on Gemma-7B; of those that divide its layers this is the nearest
# (0.57 %).
OFT_BLOCK_SIZE = 96


def add_method(model: PreTrainedModel, recipe: Recipe, task_type: str, zero_stage: int = 0) -> nn.Module:
    """`model` ready to learn by the recipe's method, initialised by its seed.

    task_type: PEFT's name for the objective.
    zero_stage: DeepSpeed's, which gives a model one dtype and keeps what trains in float32 beside it. Under stage 3 it
        leaves the dtype to whoever makes the model, so that an adapter has to be made in that of the base.
    """
    set_seed(recipe.seed)
    if recipe.method == FULL:
        return model.requires_grad_(True)
    return get_peft_model(model, peft_config(recipe, task_type), autocast_adapter_dtype=zero_stage < 3)


def peft_config(recipe: Recipe, task_type: str) -> PeftConfig:
    """The recipe's method as PEFT knows it; there is none for full fine-tuning."""
    common = {
        "target_modules": _targets(recipe),
        "modules_to_save": list(recipe.modules_to_save) or None,
        "task_type": task_type,
    }
    if recipe.method == OFT:
        return OFTConfig(r=0, oft_block_size=OFT_BLOCK_SIZE, module_dropout=recipe.dropout, **common)
    if recipe.method == LORA_PLUS:
        return LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, **common)
    return ConditionedConfig(
        method=recipe.method,
        r=recipe.rank,
        alpha=recipe.alpha,
        dropout=recipe.dropout,
        rotation_rank=recipe.rotation_rank,
        rotation=recipe.rotation,
        rotation_scale=recipe.rotation_scale,
        **common,
    )


def _targets(recipe: Recipe) -> list[str] | str:
    """As PEFT takes them: names, or one regular expression."""
    names = recipe.target_modules
    return names[0] if len(names) == 1 and is_expression(names[0]) else list(names)


def is_expression(target: str) -> bool:
    """Whether a target is a regular expression, and no name of layers."""
    return not all(part.isidentifier() or part.isdecimal() for part in target.split("."))


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What the method itself trains: not the layers that are trained whole beside an adapter."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and MODULES_TO_SAVE not in name:
            yield parameter


def optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer | None:
    """The optimiser of a method that needs one of its own; None for the Trainer's AdamW."""
    if recipe.method != LORA_PLUS:
        return None
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=recipe.learning_rate,
        loraplus_lr_ratio=LORA_PLUS_RATIO,
        loraplus_weight_decay=recipe.weight_decay,
        betas=(recipe.beta1, recipe.beta2),
    )
