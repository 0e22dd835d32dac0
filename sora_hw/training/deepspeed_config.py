"""DeepSpeed's configuration for a plan, and the proof after start-up that it is in force."""

import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sora_hw.devices.cpu import CPU
from sora_hw.errors import UserError
from sora_hw.recipes.recipe import FULL
from sora_hw.training.methods import adapter_parameters
from sora_hw.training.plan import Plan

# Gradients are those of the adapter alone: DeepSpeed's default buffer of 5e8 elements would be a gigabyte of nothing.
BUCKET = 50_000_000


def deepspeed_config(plan: Plan, largest_tensor: int | None) -> dict[str, object]:
    """DeepSpeed's JSON. `largest_tensor` is the number of elements of the adapter's largest tensor, None where the
    model has not been looked at."""
    recipe, batch = plan.recipe, plan.batch
    zero: dict[str, object] = {"stage": plan.profile.zero_stage, "reduce_bucket_size": BUCKET}
    if plan.profile.zero_stage == 3:
        # Adapters stay whole on every rank: gathering each of their small tensors is what makes LoRA slow with ZeRO-3.
        zero["stage3_param_persistence_threshold"] = largest_tensor or "auto"
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if plan.profile.offload:
        zero["offload_optimizer"] = {"device": CPU.type, "pin_memory": True}
        if plan.profile.zero_stage == 3:
            zero["offload_param"] = {"device": CPU.type, "pin_memory": True}
    return {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": recipe.max_grad_norm,
        "bf16": {"enabled": plan.profile.dtype == "bfloat16"},
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }


def check_loaded(model: PreTrainedModel, plan: Plan) -> None:
    """Assert that ZeRO-3 has loaded the model in shards.

    Where it has not, DeepSpeed shards the model later, without a word: after every rank has held all of it, for which
    one device may be too small. Raises UserError.
    """
    if plan.profile.zero_stage == 3 and plan.batch.world_size > 1 and not any(map(_is_sharded, model.parameters())):
        raise UserError("ZeRO-3 has not sharded the model while it was loaded; use --zero-stage 2 if it fits a device")


def check_engine(engine, plan: Plan) -> None:
    """Assert that DeepSpeed trains as planned: each of these has been seen to go wrong without a word.

    Raises UserError for another number of ranks, a missing engine, another ZeRO stage or batch, bfloat16 where float32
    is planned or the reverse, parameters of another dtype or on another device, and under ZeRO-3 for a base model that
    every rank holds whole, or an adapter that it does not.
    """
    world_size = dist.get_world_size()
    if world_size != plan.batch.world_size:
        raise UserError(f"{world_size} ranks started instead of {plan.batch.world_size}; launch with `deepspeed`")
    if not hasattr(engine, "zero_optimization_stage"):
        raise UserError("the Trainer runs without DeepSpeed; install the versions that `sora-hw doctor` shows")
    found = engine.zero_optimization_stage(), engine.train_batch_size(), engine.gradient_accumulation_steps()
    wanted = plan.profile.zero_stage, plan.batch.global_batch, plan.batch.accumulation
    if found != wanted:
        raise UserError(f"DeepSpeed runs with (ZeRO stage, global batch, accumulation) = {found} instead of {wanted}")
    parameters = [p for p in engine.module.parameters() if p.is_floating_point()]  # the others are packed weights
    dtypes = {str(p.dtype).removeprefix("torch.") for p in parameters}
    if dtypes != {plan.profile.dtype} or engine.bfloat16_enabled() != (plan.profile.dtype == "bfloat16"):
        raise UserError(
            f"the model trains in {' and '.join(sorted(dtypes))}, DeepSpeed's bf16 being "
            f"{'on' if engine.bfloat16_enabled() else 'off'}, instead of {plan.profile.dtype}; install the versions "
            "that `sora-hw doctor` shows"
        )
    elsewhere = {p.device.type for p in engine.module.parameters()} - {plan.device.type}
    if elsewhere:
        raise UserError(
            f"the model is on {', '.join(sorted(elsewhere))} instead of {plan.device.type}; set DS_ACCELERATOR="
            f"{plan.device.deepspeed_accelerator}, and look for another program that chooses a device"
        )
    if plan.profile.zero_stage == 3 and world_size > 1 and not any(map(_is_sharded, engine.module.parameters())):
        raise UserError("ZeRO-3 shards nothing: every rank holds the whole model; use --zero-stage 2 if that is fine")
    if plan.recipe.method != FULL and not all(map(_stays_whole, adapter_parameters(engine.module))):
        raise UserError(
            "ZeRO-3 gathers the adapter's tensors one by one in every layer, which is slow; install the versions that "
            "`sora-hw doctor` shows, or use --zero-stage 2"
        )


def release(engine) -> None:
    """Give the memory of a finished run back: hooks of DeepSpeed's, which the garbage collector cannot see through,
    would keep its weights beside the next run's. And tell transformers that models are no longer loaded in shards, as
    after a run under ZeRO-3 even those would be of which only the shapes are looked at."""
    unset_hf_deepspeed_config()
    engine.destroy()
    for parameter in engine.module.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                tensor.data = tensor.new_empty(0)


def _stays_whole(parameter) -> bool:
    return getattr(parameter, "ds_persist", True)


def _is_sharded(parameter) -> bool:
    return hasattr(parameter, "ds_tensor") and parameter.ds_tensor.numel() < parameter.ds_numel
