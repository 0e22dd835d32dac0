"""What the environment variables of a launcher say about this process."""

import os

from sora_hw.errors import UserError


def rank() -> int:
    """This process's number, 0 where no launcher has numbered it."""
    return whole_number("RANK", least=0) or 0


def number_of_ranks() -> int | None:
    """How many processes a launcher has started for this run; None where there is no launcher."""
    return whole_number("WORLD_SIZE", least=1)


def whole_number(variable: str, least: int) -> int | None:
    """An environment variable that holds a whole number, None where it is not set."""
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.strip().isdecimal() or int(text) < least:
        raise UserError(f"the environment variable {variable} is {text!r}: it must be a whole number, at least {least}")
    return int(text)
