"""The adapter on disk, as PEFT loads it."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import torch.distributed as dist
from peft import PeftModel


def save_adapter(model: PeftModel, folder: Path, zero_stage: int, main: bool) -> None:
    """Write adapter_config.json and adapter_model.safetensors to `folder`, whole or not at all.

    Every rank must call it: under ZeRO-3 the adapter's tensors are gathered first. Rank 0 (`main`) writes, to a folder
    aside that is renamed at the end, and all ranks return when that is done.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with _gathered(trained, zero_stage):
        if main:
            aside = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(str(aside))
            (aside / "README.md").unlink(missing_ok=True)  # PEFT's form for a model card, with nothing filled in
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    dist.barrier()


def _gathered(parameters, zero_stage: int):
    if zero_stage < 3:
        return nullcontext()
    from deepspeed import zero  # imported only after the ranks' environment stands

    return zero.GatheredParameters(parameters)


def trainable_rate(model: PeftModel) -> float:
    """Trained parameters over all parameters, in percent; under ZeRO-3 each counts whole."""
    sizes = [(getattr(each, "ds_numel", each.numel()), each.requires_grad) for each in model.parameters()]
    return 100 * sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)
