"""A stand-in for torch_npu: the device `npu` in host memory, so that code for Ascend NPUs runs on any machine.

It is a real device to torch (PrivateUse1): tensors with storage on several device indices, streams, events, random
state, pinned memory, autocast, the communication backend `hccl` and a few operators of `torch.ops.npu`. Operators on
storage run natively, all others on the CPU, through a boxed fallback like torch_npu's own.

Only the tests load it: `tests/simulated_npu/building.py` builds the extension and puts the package on PYTHONPATH with
the entry point through which torch loads device extensions, so every process of a run has it and nothing is patched.

    csrc/device.cpp     memory with real counters, current device, streams and events, random state
    csrc/operators.cpp  the operators on storage, the fallback, autocast, and the count of what ran where
    csrc/autograd.cpp   autograd's threads, at the end of the process
    csrc/hccl.cpp       the communication backend: gloo over the same memory
    npu/                the module `torch.npu`
    operators.py        `torch.ops.npu`, with torch_npu's schemas; one line for each
    simulation.py       what tests ask the stand-in, and it alone: the counts

What a run on it shows: dispatch, formulas, placement, launchers, configuration, checkpoints. What it cannot show:
numerics, speed and memory of an NPU, asynchronous streams, HCCL.

    SIMULATED_NPU_COUNT        devices of the machine (default 8)
    ASCEND_RT_VISIBLE_DEVICES  those of them that a process sees; not in strictly ascending order: none, as on the NPU
    SIMULATED_NPU_LOG          folder into which every process writes its counts when it ends
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist

from torch_npu import _C, npu

__version__ = torch.__version__.partition("+")[0]


def _autoload() -> None:
    """Called by torch at the end of its own import, which is done by then: everything happens at the import of this."""


def _hccl(store, rank, size, timeout):
    return _C.ProcessGroupHCCL(dist.ProcessGroupGloo(store, rank, size, timeout))


torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
dist.Backend.register_backend("hccl", _hccl, devices=["npu"])

atexit.register(_C.wait_for_autograd)  # what has been registered first runs last: no backward pass comes after it

if os.environ.get("RANK", "0") == "0":  # one rank says it for all
    print("simulated NPU: host memory, no Ascend hardware", file=sys.stderr)

from torch_npu import simulation  # noqa: E402, F401
from torch_npu.operators import *  # noqa: E402, F403
