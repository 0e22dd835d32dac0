"""What the environment variables of a launcher say about this process."""

import os

from sora_hw.errors import UserError

SET_BY_ACCELERATE = "ACCELERATE_DYNAMO_BACKEND"  # by every `accelerate launch`, and by nothing else here


def rank() -> int:
    """This process's number, 0 where no launcher has numbered it."""
    return whole_number("RANK", least=0) or 0


def rank_here() -> int:
    """This process's number among those of its machine, 0 where no launcher has numbered it."""
    return whole_number("LOCAL_RANK", least=0) or 0


def number_of_ranks() -> int | None:
    """How many processes a launcher has started for this run; None where there is no launcher.

    Raises UserError under `accelerate launch` where that starts one process, as it does on processors, whatever its
    --num_processes says, which it tells the process nothing about.
    """
    if "WORLD_SIZE" not in os.environ and SET_BY_ACCELERATE in os.environ:
        raise UserError(
            "`accelerate launch` has started a single process, whatever its --num_processes says: start by "
            "deepspeed --num_accelerators N or torchrun --nproc_per_node N, or by python for one rank"
        )
    return whole_number("WORLD_SIZE", least=1)


def whole_number(variable: str, least: int) -> int | None:
    """An environment variable that holds a whole number, None where it is not set."""
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.strip().isdecimal() or int(text) < least:
        raise UserError(f"the environment variable {variable} is {text!r}: it must be a whole number, at least {least}")
    return int(text)
