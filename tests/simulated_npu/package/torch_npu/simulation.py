"""What the tests ask of the stand-in, and the real torch_npu does not have: which operators ran where, and the state of
the device at the end.

Counted per process and by operator: calls on npu tensors of the operators of the namespaces `sora_hw` and `npu`, by the
kernel that served them, and every operator whatever its namespace that had no kernel and ran on the CPU.
"""

import atexit
import json
import os
from pathlib import Path

from torch_npu import _C, npu


def counts() -> dict[str, dict[str, int]]:
    """Calls so far by operator name, under the kernel that served them.

    Returns:
        "native": operators of ours with a kernel for PrivateUse1; "composite": operators of ours whose kernel is one
        for all devices; "cpu_fallback": all operators without a kernel.
    """
    return {"native": {}, "composite": {}, "cpu_fallback": {}} | _C.counts()


# What torch_npu, CANN and HCCL read.
VARIABLES = (
    *(
        "PYTORCH_NPU_ALLOC_CONF",
        "TASK_QUEUE_ENABLE",
        "CPU_AFFINITY_CONF",
        "HCCL_CONNECT_TIMEOUT",
        "INF_NAN_MODE_ENABLE",
    ),
)


def state() -> dict[str, object]:
    """The most bytes that this process has held on each device, its settings, and the variables of `VARIABLES`."""
    return {
        "peak_memory_bytes": [npu.max_memory_allocated(index) for index in range(npu.device_count())],
        "settings": {
            "jit_compile": npu.compile_mode.jit_compile,
            "allow_internal_format": npu.config.allow_internal_format,
            "allow_hf32": npu.matmul.allow_hf32,
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def reset() -> None:
    """Start counting again from zero."""
    _C.reset_counts()


def _write_log(folder: Path) -> None:
    rank = os.environ.get("RANK")
    name = f"process-{os.getpid()}" if rank is None else f"rank-{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"simulated": True, **counts(), **state()}, indent=1))


if "SIMULATED_NPU_LOG" in os.environ:
    atexit.register(_write_log, Path(os.environ["SIMULATED_NPU_LOG"]).absolute())
