"""A run that is planned and not started: what it would do, and whether it fits."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields

from sora_hw.analysis import Memory
from sora_hw.data.files import is_on_hub
from sora_hw.data.glue import TASKS
from sora_hw.errors import UserError
from sora_hw.recipes.recipe import Classification, Recipe
from sora_hw.terminal import Console
from sora_hw.training.arguments import Request
from sora_hw.training.base_model import is_local, shipped
from sora_hw.training.deepspeed_config import deepspeed_config
from sora_hw.training.forecast import Forecast, forecast
from sora_hw.training.objectives import objective_of
from sora_hw.training.plan import Plan
from sora_hw.training.report import print_sections
from sora_hw.training.run import check


def show_plan(request: Request, plan: Plan, console: Console) -> None:
    """Print what the run would be. Nothing is downloaded and nothing written.

    A model on the hub is planned with by its configuration, where that comes with this package, and its data by their
    known size. Raises UserError, after the plan, where it does not fit into the memory of a rank.
    """
    if is_local(plan.recipe.model):
        job = check(request, plan)
        found, steps, checked = job.base, job.data.steps, job.as_dict()
    else:
        found, steps = shipped(plan.recipe.model, objective_of(plan.recipe)), _known_steps(plan.recipe)
        checked = plan.as_dict() | {"deepspeed": deepspeed_config(plan, None)}
    expected = forecast(plan, found) if found else None
    outline = _outline(plan, steps, expected)
    if request.as_json:
        console.print(json.dumps(outline | checked, indent=2))
    else:
        for line in _lines(plan, outline):
            console.print(line)
        print_sections(checked, console)
    if expected and not expected.fits:
        raise UserError(_does_not_fit(expected))


def _outline(plan: Plan, steps: int | None, expected: Forecast | None) -> dict[str, object]:
    """What a reader looks for first, in JSON's types."""
    recipe = plan.recipe
    outline: dict[str, object] = {
        "model": recipe.model,
        "method": recipe.method,
        "trainable_percent": expected and expected.trainable_percent,
        "global_batch": recipe.global_batch,
        "steps": steps,
        "warmup_steps": recipe.warmup_steps,
        "learning_rate": recipe.learning_rate,
        "memory_bytes": None,
        "environment": plan.environment,
    }
    if expected:
        outline["memory_bytes"] = {**asdict(expected.memory), "total": expected.memory.total}
        outline["memory_bytes"] |= {"available": expected.available, "fits": expected.fits, "changes": expected.changes}
    return outline


def _lines(plan: Plan, outline: Mapping[str, object]) -> Iterator[str]:
    """The outline for people, a label and a value on each line."""
    recipe, batch, memory = plan.recipe, plan.batch, outline["memory_bytes"]
    unknown = f"not known: the configuration of {recipe.model} does not come with this package"
    yield f"model: {recipe.model}"
    yield f"method: {recipe.method}" + (f", rank {recipe.rank}, alpha {recipe.alpha:g}" if recipe.low_rank else "")
    yield f"trainable rate: {outline['trainable_percent']:.3f} %" if memory else f"trainable rate: {unknown}"
    yield (
        f"global batch: {batch.global_batch} = {batch.world_size} ranks x {batch.micro_batch} micro-batch x "
        f"{batch.accumulation} accumulation"
    )
    yield f"steps: {outline['steps'] or 'known when the data are read'}"
    yield f"warm-up: {recipe.warmup_steps} steps"
    yield f"learning rate: {recipe.learning_rate:g}, {recipe.schedule}"
    yield "environment: " + " ".join(f"{name}={value}" for name, value in plan.environment.items())
    if not memory:
        yield f"memory: {unknown}"
        return
    yield f"memory: {_gib(memory['total'])} of {_gib(memory['available'])} on each rank"
    for each in fields(Memory):
        yield f"memory, {each.name}: {_gib(memory[each.name])}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _known_steps(recipe: Recipe) -> int | None:
    """The steps of a run whose samples have not been made; None where they depend on data that are on the hub."""
    if not any(map(is_on_hub, recipe.train_data)):
        size = len(objective_of(recipe).training_records())
    elif isinstance(recipe, Classification):
        size = TASKS[recipe.task].training_records
    else:
        size = None
    if recipe.max_steps or size is None:
        return recipe.max_steps
    return recipe.steps(min(recipe.records or size, size) - recipe.validation_size)


def _does_not_fit(expected: Forecast) -> str:
    needed, available = _gib(expected.memory.total), _gib(expected.available)
    ways = "; or ".join(expected.changes) or "nothing here would help, a smaller model or a larger device would"
    return f"the run needs {needed} on each rank, which has {available}. What would make it fit: {ways}"
