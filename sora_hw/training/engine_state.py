"""What DeepSpeed's engine has learned, as plain tensors by the parameters' names, whatever ZeRO stage and ranks.

DeepSpeed's own checkpoints are pickles, bound to a number of ranks and a stage. Here each trained parameter is gathered
whole in float32, with its two moments of Adam, so that any number of ranks and any stage can go on from it, bit by bit
what was there. Nothing of the base model is gathered.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What the optimiser changes, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def full_precision(parameter: nn.Parameter, stage: int) -> Tensor:
    """The optimiser's float32 weight, of which the model holds a rounded copy when it trains in bfloat16, whole. Every
    rank must call it."""
    if stage == 0:
        return parameter.detach()
    from deepspeed.utils import safe_get_full_fp32_param  # imported only after the ranks' environment stands

    return safe_get_full_fp32_param(parameter)


def read_engine(engine) -> Iterator[tuple[str, Tensor]]:
    """NAME for each trained parameter and NAME/exp_avg, NAME/exp_avg_sq: its moments; float32, whole, one at a time.

    Every rank must take all of them: each holds a part.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    stage = engine.zero_optimization_stage()
    _link(engine)
    for name, parameter in trained(engine.module):
        yield name, full_precision(parameter, stage)
        for moment in MOMENTS:
            if stage == 0:
                yield f"{name}/{moment}", engine.optimizer.state[parameter][moment]
            else:
                yield f"{name}/{moment}", safe_get_full_optimizer_state(parameter, moment)


def check_shapes(engine, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises KeyError or ValueError unless there is a weight and its moments for each trained parameter."""
    for name, parameter in trained(engine.module):
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 holds a part of it
        for tensor in (name, *(f"{name}/{moment}" for moment in MOMENTS)):
            if shapes[tensor] != shape:
                raise ValueError(f"{tensor} is of the shape {shapes[tensor]}, the model's is {shape}")


def write_weights(engine, value: Callable[[str], Tensor]) -> None:
    """Set each trained parameter NAME to `value(NAME)`, float32 and whole. Every rank must call it."""
    from deepspeed.utils import safe_set_full_fp32_param

    stage = engine.zero_optimization_stage()
    for name, parameter in trained(engine.module):
        new = value(name).to(parameter.device)
        if stage > 0:
            safe_set_full_fp32_param(parameter, new)
        with _whole(parameter, stage), torch.no_grad():
            parameter.copy_(new)


def write_moments(engine, value: Callable[[str], Tensor], steps: int) -> None:
    """Set the moments NAME/exp_avg and NAME/exp_avg_sq to what `value` gives, and the count of the optimiser's `steps`.
    Every rank must call it."""
    from deepspeed.utils import safe_set_full_optimizer_state

    stage = engine.zero_optimization_stage()
    _begin(engine, steps)
    for name, parameter in trained(engine.module):
        for moment in MOMENTS:
            new = value(f"{name}/{moment}").to(parameter.device)
            if stage == 0:
                engine.optimizer.state[parameter][moment].copy_(new)
            else:
                safe_set_full_optimizer_state(parameter, new, moment)


def steps_taken(engine) -> int:
    """How many steps the optimiser counts."""
    return int(_adam(engine).state[_partitions(engine)[0]]["step"])


def _begin(engine, steps: int) -> None:
    """Make the states that the optimiser otherwise makes in its first step. DeepSpeed's optimiser for the processor
    counts in whole numbers, PyTorch's in tensors."""
    inner = _adam(engine)
    for weights in _partitions(engine):
        count = torch.tensor(float(steps)) if isinstance(inner, torch.optim.AdamW) else steps
        inner.state[weights] = {"step": count} | {moment: torch.zeros_like(weights) for moment in MOMENTS}
    _link(engine)


def _link(engine) -> None:
    """Where parameters find their parts of the moments under ZeRO-1 and 2. DeepSpeed does it once, after the first step
    of its first group of parameters, when the groups after it (those without weight decay) have no moments yet."""
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _adam(engine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _partitions(engine) -> list[Tensor]:
    """What the optimiser of this rank works on."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _whole(parameter: nn.Parameter, stage: int):
    """Where the parameter may be written to: under ZeRO-3 gathered, and taken from rank 0 when it is let go."""
    if stage < 3:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)
