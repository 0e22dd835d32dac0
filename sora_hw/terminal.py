"""What is printed, whatever it holds and wherever it goes: no text from a file is a command to the terminal, and no
character that the terminal cannot show ends a program."""

import io
import sys
from collections.abc import Iterable

import rich.console
from rich.segment import Segment

from sora_hw.errors import printable


class Console(rich.console.Console):
    """rich's, which would take words in brackets for its markup, and pass on what a text holds for the terminal: here
    the styles that it is given are all that is no text. Long lines are left to the terminal."""

    def __init__(self, **options):
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, "soft_wrap": True, **options})

    def render(self, renderable, options=None) -> Iterable[Segment]:
        """The segments of anything that is printed, without control characters in their texts."""
        for segment in super().render(renderable, options):
            if segment.control or not (text := segment.text.strip("\n")) or text.isprintable():
                yield segment
            else:
                yield Segment("\n".join(map(printable, segment.text.split("\n"))), segment.style)


def print_anything() -> None:
    """From now on a character that the standard output's encoding lacks is printed as a question mark. The standard
    error has an escape for it anyway."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
