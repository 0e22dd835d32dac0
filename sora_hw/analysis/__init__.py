"""What can be said about a model or a run without training: the memory that a step takes."""

from sora_hw.analysis.fitting import changes_that_fit
from sora_hw.analysis.memory import Memory, Step, expected_memory

__all__ = ["Memory", "Step", "changes_that_fit", "expected_memory"]
