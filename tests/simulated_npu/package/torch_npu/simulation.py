"""What the tests ask of the stand-in, and the real torch_npu does not have: which operators ran where.

Counted per process and by operator: calls on npu tensors of the operators of the namespaces `sora_hw` and `npu`, by the
kernel that served them, and every operator whatever its namespace that had no kernel and ran on the CPU.
"""

import atexit
import json
import os
from pathlib import Path

from torch_npu import _C


def counts() -> dict[str, dict[str, int]]:
    """Calls so far by operator name, under the kernel that served them.

    Returns:
        "native": operators of ours with a kernel for PrivateUse1; "composite": operators of ours whose kernel is one
        for all devices; "cpu_fallback": all operators without a kernel.
    """
    return {"native": {}, "composite": {}, "cpu_fallback": {}} | _C.counts()


def reset() -> None:
    """Start counting again from zero."""
    _C.reset_counts()


def _write_log(folder: Path) -> None:
    rank = os.environ.get("RANK")
    name = f"process-{os.getpid()}" if rank is None else f"rank-{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"simulated": True, **counts()}, indent=1))


if "SIMULATED_NPU_LOG" in os.environ:
    atexit.register(_write_log, Path(os.environ["SIMULATED_NPU_LOG"]).absolute())
