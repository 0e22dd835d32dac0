"""What a planned run will take: its trained share of the parameters, and its memory on each rank."""

import copy
from dataclasses import dataclass, fields, replace
from functools import partial

import psutil
import torch
from torch import nn

from sora_hw.analysis import Memory, Step, changes_that_fit, expected_memory
from sora_hw.devices.cpu import CPU
from sora_hw.errors import UserError
from sora_hw.hardware import Profile
from sora_hw.training.base_model import BaseModel, skeleton
from sora_hw.training.deepspeed_config import BUCKET
from sora_hw.training.environment import whole_number
from sora_hw.training.methods import add_method
from sora_hw.training.objectives import objective_of
from sora_hw.training.plan import Plan, check_profile
from sora_hw.training.saving import trainable_rate


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run.

    Attributes:
        trainable_percent: trained parameters over all, as the paper counts them.
        memory: of one rank at its peak, in bytes.
        available: bytes of one rank.
        changes: where it does not fit, what would make it fit.
    """

    trainable_percent: float
    memory: Memory
    available: int
    changes: list[str]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available


def forecast(plan: Plan, base: BaseModel) -> Forecast:
    """Track the run's memory on the meta device: nothing of the size of the model is allocated."""
    build = partial(_build, plan, base)
    with torch.device("meta"):
        whole = build(base.config.num_hidden_layers)
    trained = sum(each.numel() for each in whole.parameters() if each.requires_grad)
    on_host = plan.device.type == CPU.type
    expect = partial(
        expected_memory,
        build,
        base.config.num_hidden_layers,
        bucket=min(BUCKET, trained) if on_host else BUCKET,
        process=_process_bytes() if on_host else 0,
    )
    step, available = _step(plan, base), _available(plan)
    memory = expect(step)
    changes = []
    if memory.total > available:
        changes = changes_that_fit(step, available, expect, _micro_batches(plan), accepts=partial(_accepts, plan))
    return Forecast(trainable_rate(whole), memory, available, changes)


def _build(plan: Plan, base: BaseModel, layers: int) -> nn.Module:
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = layers
    model = skeleton(BaseModel(base.name, base.source, config, base.auto_class))
    return add_method(model, plan.recipe, objective_of(plan.recipe).task_type)


def _step(plan: Plan, base: BaseModel) -> Step:
    positions = getattr(base.config, "max_position_embeddings", None) or plan.recipe.max_length
    return Step(
        micro_batch=plan.batch.micro_batch,
        sequence_length=min(plan.recipe.max_length, positions),
        dtype=plan.profile.dtype,
        gradient_checkpointing=plan.profile.gradient_checkpointing,
        zero_stage=plan.profile.zero_stage,
        world_size=plan.batch.world_size,
        accumulation=plan.batch.accumulation,
        fused_loss=plan.profile.fused_loss,
        offload=plan.profile.offload,
        four_bit=plan.profile.four_bit,
    )


def _accepts(plan: Plan, step: Step) -> bool:
    """Whether the plan could be made with the step's settings instead of its own."""
    names = {each.name for each in fields(Profile)} & {each.name for each in fields(Step)}
    profile = replace(plan.profile, **{name: getattr(step, name) for name in names})
    try:
        check_profile(profile, plan.device, plan.recipe)
    except UserError:
        return False
    return True


def _micro_batches(plan: Plan) -> list[int]:
    """Those that the global batch can be made of on these ranks."""
    share = plan.batch.global_batch // plan.batch.world_size
    return [size for size in range(1, share + 1) if share % size == 0]


def _available(plan: Plan) -> int:
    """Bytes of one rank: the profile's device, or the one that is here; ranks on one processor share its memory."""
    if plan.profile.memory_gib_per_rank is not None:
        return int(plan.profile.memory_gib_per_rank * 2**30)
    memory = plan.device.memory_bytes()
    if plan.device.type != CPU.type:
        return memory
    return memory // (whole_number("LOCAL_SIZE", least=1) or plan.batch.world_size)


def _process_bytes() -> int:
    """What this process holds with its libraries and without a model, which a run's process holds as well."""
    return psutil.Process().memory_info().rss
