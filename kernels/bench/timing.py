"""Paired timing: the peers run in turn, round after round, and each is compared with the first of the same round.

The machine's speed may drift; a ratio within a round does not. On an accelerator the time is that between two events on
its queue, on a processor that of the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

# Makes ready, and returns what is timed.
Step = Callable[[], Callable[[], object]]
WARM_UP = 2


def medians(steps: Mapping[str, Step], repeats: int, device: torch.device) -> tuple[dict[str, float], float]:
    """(median ratio of each step's time to the first's in the same round, median milliseconds of the first)."""
    rounds = [{name: milliseconds(step, device) for name, step in steps.items()} for _ in range(repeats + WARM_UP)]
    counted = rounds[WARM_UP:]
    first = next(iter(steps))
    ratios = {name: statistics.median(times[name] / times[first] for times in counted) for name in steps}
    return ratios, statistics.median(times[first] for times in counted)


def milliseconds(step: Step, device: torch.device) -> float:
    """Of what `step` returns. On an accelerator a call that takes less than its launch shows the launch."""
    timed = step()
    if device.type == "cpu":
        started = time.perf_counter()
        timed()
        return (time.perf_counter() - started) * 1e3
    begin, end = (torch.Event(device=device, enable_timing=True) for _ in range(2))
    begin.record()
    timed()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
