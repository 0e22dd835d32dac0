"""Making the method known to PEFT, which has no entry point for methods from outside.

One umbrella type covers the whole framework: a PeftModel has one tuner class, so with a type per method LoRA and SORA
could not be adapters of the same model.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from sora_hw.adapter.transformers_loader import check_what_it_loads

PEFT_TYPE = "CONDITIONED"


def add_peft_type() -> PeftType:
    """The member `PeftType.CONDITIONED`, added to the enumeration where it is not there yet.

    PEFT looks types up by attribute, by value and by iteration, so all of the enumeration's tables get the member.
    """
    if PEFT_TYPE in PeftType.__members__:
        return PeftType[PEFT_TYPE]
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    member.__objclass__ = PeftType
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    # Enum forbids assigning members through its own metaclass; before 3.12 attribute look-ups go through the map.
    type.__setattr__(PeftType, PEFT_TYPE, member)
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Register the method, with PEFT and transformers' loader of adapters; does nothing when it is registered already.

    Raises:
        ImportError: if PEFT itself has come to ship a method of this name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PEFT_TYPE)
    if registered is config_cls:
        return
    if registered is not None:
        raise ImportError(
            f"PEFT already has a method of type {PEFT_TYPE} ({registered.__module__}): install the peft version that "
            "sora_hw supports, or a newer sora_hw"
        )
    add_peft_type()
    check_what_it_loads(model_cls)
    register_peft_method(name=PEFT_TYPE.lower(), config_cls=config_cls, model_cls=model_cls)
