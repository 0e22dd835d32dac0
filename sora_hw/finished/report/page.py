"""The parts that a page is put together from, and how they become HTML: one file that needs nothing else.

Whatever comes from a run's files is text to the browser: Jinja escapes it. What looks like a secret is left out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Protocol

from jinja2 import Environment, FunctionLoader, StrictUndefined

from sora_hw.errors import HIDDEN, without_secrets
from sora_hw.finished.tables import Table
from sora_hw.storage import write_whole

SECRET_NAMES = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)


class Block(Protocol):
    """A part of a section; `kind` names what in page.html draws it."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Card:
    """A key figure."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Cards:
    """Key figures beside one another."""

    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]


@dataclass(frozen=True)
class Grid:
    """A table of text; the first column names the rows. `colours` mark the rows as in the charts."""

    kind: ClassVar[str] = "grid"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    colours: Sequence[str] = ()


@dataclass(frozen=True)
class Scores:
    """A table of ours beside the paper's."""

    kind: ClassVar[str] = "scores"
    table: Table


@dataclass(frozen=True)
class Bar:
    """A share between 0 and 1 of the longest bar, and what it says."""

    label: str
    share: float
    text: str
    colour: str


@dataclass(frozen=True)
class Bars:
    """Values that are compared by their length."""

    kind: ClassVar[str] = "bars"
    title: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Note:
    """A sentence, and the command that would make what is missing."""

    kind: ClassVar[str] = "note"
    text: str
    command: str = ""


@dataclass(frozen=True)
class Code:
    """Text as a machine reads or writes it."""

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Side:
    """Blocks beside one another, as many as there is room for; with `flow` they fill columns of their own heights."""

    kind: ClassVar[str] = "side"
    blocks: Sequence[Block]
    flow: bool = False


@dataclass(frozen=True)
class Details:
    """Blocks that are shown when they are asked for."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page; `state` is how the run ended, in a word for the eye and a sentence for the rest."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    colour: str
    state: str = ""
    warning: str = ""


def table_of(values: Mapping[str, object], title: str = "") -> Grid:
    """Names and values; a value whose name speaks of a secret stays hidden."""
    rows = [[name, HIDDEN if SECRET_NAMES.search(name) else shown(value)] for name, value in values.items()]
    return Grid((), rows, title)


def shown(value: object) -> str:
    """A value of JSON as a reader writes it."""
    if value in (None, "", [], (), {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def html(page: Page) -> str:
    """The page as one HTML document."""
    room = files(__package__)
    environment = Environment(
        loader=FunctionLoader(lambda name: (room / name).read_text(encoding="utf-8")),
        autoescape=True,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html").render(page=page)


def _clean(value: object) -> object:
    """What the template writes: text without secrets; markup of its own (`__html__`) is made of such text."""
    return without_secrets(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def write_page(page: Page, file: Path) -> None:
    """Write the page whole or not at all. Raises UserError where it cannot be written."""
    write_whole(file, html(page))
