"""The adapter on disk, as PEFT loads it."""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel


def save_adapter(model: PeftModel, folder: Path, zero_stage: int) -> None:
    """Write adapter_config.json and adapter_model.safetensors (float32) to `folder`, whole or not at all.

    Every rank must call it: each holds a part of the optimiser's float32 weights, which are what is saved, and of which
    the model holds rounded copies when it trains in bfloat16. Rank 0 writes, to a folder aside that is renamed at the
    end, and all ranks return when that is done.
    """
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    weights = {name: _full_precision(each, zero_stage) for name, each in trained.items()}
    if dist.get_rank() == 0:
        aside = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(str(aside), state_dict=weights)
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's form for a model card, with nothing filled in
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    dist.barrier()


def _full_precision(parameter: torch.nn.Parameter, zero_stage: int) -> torch.Tensor:
    if zero_stage == 0:
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param  # imported only after the ranks' environment stands

    return safe_get_full_fp32_param(parameter)


def trainable_rate(model: PeftModel) -> float:
    """Trained parameters over all parameters, in percent; under ZeRO-3 each counts whole."""
    sizes = [(getattr(each, "ds_numel", each.numel()), each.requires_grad) for each in model.parameters()]
    return 100 * sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)
