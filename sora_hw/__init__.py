"""Weight-conditioned adapters for language models, on CPU, CUDA and Ascend NPU.

Importing the package registers the method with PEFT, so that `get_peft_model` and `PeftModel.from_pretrained` know it,
and loads the kernel packages that are installed.
"""

import logging

from sora_hw.devices import load_or_hide

load_or_hide()  # before the first of the imports below that imports torch

# PEFT imports bitsandbytes, which then warns of kernels that it can do without. The one line of an error of `sora-hw`
# should stand alone; what bitsandbytes has to say later is said.
_bitsandbytes = logging.getLogger("bitsandbytes")
_level = _bitsandbytes.level
_bitsandbytes.setLevel(logging.ERROR)

from sora_hw.adapter import ConditionedConfig, ConditionedLinear, ConditionedModel, register  # noqa: E402
from sora_hw.ops import load_kernel_packages  # noqa: E402

_bitsandbytes.setLevel(_level)

__version__ = "0.1.0"
__all__ = ["ConditionedConfig", "ConditionedLinear", "ConditionedModel", "__version__"]

register(ConditionedConfig, ConditionedModel)
load_kernel_packages()
