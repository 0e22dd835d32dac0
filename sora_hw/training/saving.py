"""What was trained, on disk: an adapter as PEFT loads it, or the whole model as transformers does."""

import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sora_hw import ConditionedConfig
from sora_hw.errors import UserError
from sora_hw.hardware import Profile
from sora_hw.storage import check_regular, read_json, sync_folder
from sora_hw.training.base_model import BaseModel, load_model
from sora_hw.training.checkpoints import sync, together
from sora_hw.training.divergence import check_finite
from sora_hw.training.engine_state import full_precision, trained
from sora_hw.training.methods import MODULES_TO_SAVE
from sora_hw.training.patterns import check_patterns

ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_trained(model: nn.Module, folder: Path, zero_stage: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write an adapter (adapter_config.json and adapter_model.safetensors) or, of full fine-tuning, the model with its
    tokenizer to `folder`, in float32, whole or not at all.

    Every rank must call it: each holds a part of the optimiser's float32 weights, which are what is saved, and of which
    the model holds rounded copies when it trains in bfloat16. Rank 0 writes, to a folder aside that is renamed at the
    end, and all ranks return when that is done. Raises UserError, on every rank, where it cannot.
    """
    writes = dist.get_rank() == 0
    weights = {}
    for name, parameter in trained(model):
        whole = full_precision(parameter, zero_stage)
        check_finite(name, whole)
        weights[name] = whole.cpu() if writes else None
    with together(folder):
        if writes:
            aside = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(str(aside), state_dict=weights)
            if not isinstance(model, PeftModel):
                tokenizer.save_pretrained(str(aside))
            else:
                (aside / "README.md").unlink()  # PEFT's form for a model card, with nothing filled in
                if isinstance(model.active_peft_config, ConditionedConfig):
                    model.active_peft_config.write_card(aside)
            sync(aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            sync_folder(folder.parent)


def load_trained(base: BaseModel, plain: PreTrainedModel, folder: Path, profile: Profile) -> nn.Module:
    """What `save_trained` wrote to `folder`: an adapter around `plain`, the base model, or a model by itself.

    Raises UserError where it is damaged, or belongs to another model.
    """
    if (folder / ADAPTER_CONFIG).exists():
        return load_adapter(plain, folder)
    return load_model(BaseModel(base.name, str(folder), base.config, base.auto_class), profile)


def load_adapter(plain: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter in `folder` around `plain`: from safetensors alone, for a pickle may hold a program.

    Raises UserError where it is not there or damaged, or belongs to another model.
    """
    for name in (ADAPTER_CONFIG, WEIGHTS):
        try:
            check_regular(folder / name)
        except OSError as error:
            raise UserError(
                f"{folder / name}: {error.strerror}; an adapter is loaded from {ADAPTER_CONFIG} and {WEIGHTS}, never "
                "from a pickle (.bin)"
            ) from None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            check_patterns(read_json(folder / ADAPTER_CONFIG), (name for name, _ in plain.named_modules()))
            return PeftModel.from_pretrained(plain, str(folder))
    except Exception as error:  # each method of PEFT's fails in its own ways at what a file may hold
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: the adapter cannot be loaded onto this model ({reason})") from None


def trainable_rate(model: nn.Module) -> float:
    """Trained parameters over all parameters, in percent; under ZeRO-3 each counts whole.

    As the paper counts them: layers that are trained whole beside an adapter are no part of what it adds.
    """
    sizes = [
        (getattr(each, "ds_numel", each.numel()), each.requires_grad)
        for name, each in model.named_parameters()
        if MODULES_TO_SAVE not in name
    ]
    return 100 * sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)
