"""Which changes to a step make it fit into a device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, product

from sora_hw.analysis.memory import Memory, Step


@dataclass(frozen=True)
class Change:
    """A change to a step, for people with the launcher's flag."""

    phrase: str
    field: str
    value: object


def changes_that_fit(
    step: Step,
    capacity: int,
    expect: Callable[[Step], Memory],
    micro_batches: Sequence[int],
    *,
    accepts: Callable[[Step], bool],
) -> list[str]:
    """What makes a step that is too large fit: every change that does alone, or where none does, every pair.

    Args:
        step: the step as planned.
        capacity: bytes of one rank's device.
        expect: the memory of a step: `expected_memory` of the model.
        micro_batches: those that divide a rank's share of the global batch; of the smaller ones the largest that fits
            is named.
        accepts: whether the launcher would take a step at all; one that it refuses is no way out.

    Returns:
        A phrase for each way, with the launcher's flags and what it takes; none where nothing helps.
    """
    expect = cache(expect)
    kinds = _changes(step, micro_batches)
    for size in (1, 2):
        ways = []
        for together in combinations(kinds, size):
            for changes in product(*together):
                changed = _changed(step, changes)
                if accepts(changed) and (total := expect(changed).total) <= capacity:
                    ways.append(f"{' and '.join(change.phrase for change in changes)}: {total / 2**30:.1f} GiB")
                    break
        if ways:
            return ways
    return []


def _changes(step: Step, micro_batches: Sequence[int]) -> list[list[Change]]:
    """The kinds of change that the step has not made yet, cheapest first; of each kind its values, best first."""
    smaller = sorted((size for size in micro_batches if size < step.micro_batch), reverse=True)
    one_each = [
        Change("recompute activations (--gradient-checkpointing)", "gradient_checkpointing", True),
        Change("fuse the loss with the output layer (--fused-loss)", "fused_loss", True),
        Change("shard the parameters (--zero-stage 3)", "zero_stage", 3),
        Change("keep the optimiser in the host's memory (--offload)", "offload", True),
        Change("pack the base model to four bits (--load-in-4bit)", "four_bit", True),
    ]
    useless = {"zero_stage": step.world_size == 1}  # shards of a single rank are the whole
    kinds = [[Change(f"a smaller micro-batch (--micro-batch {size})", "micro_batch", size) for size in smaller]]
    kinds += [
        [each] for each in one_each if getattr(step, each.field) != each.value and not useless.get(each.field, False)
    ]
    return [kind for kind in kinds if kind]


def _changed(step: Step, changes: Sequence[Change]) -> Step:
    changed = replace(step, **{change.field: change.value for change in changes})
    return replace(changed, accumulation=step.accumulation * step.micro_batch // changed.micro_batch)
