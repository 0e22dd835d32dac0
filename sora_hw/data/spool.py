"""Records that are too many to be held in memory: on the disk, read back one at a time."""

import marshal
import os
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import TypeVar

from sora_hw.errors import DataError

IN_MEMORY = 100_000  # records, of which each takes some kilobytes as samples
Kind = TypeVar("Kind")


class Spool(Sequence[Kind]):
    """Dataclasses of text and numbers in a temporary file without a name, which no one else can change or leave behind.

    In memory is where each of them begins, 8 bytes for each. Raises DataError where the disk has no room for them.
    """

    def __init__(self, kind: type[Kind], records: Iterable[Kind]):
        self._kind, self._starts = kind, array("Q", [0])
        try:
            self._file = tempfile.TemporaryFile(prefix="sora-hw-")  # noqa: SIM115 (open as long as this lives)
            for record in records:
                written = self._file.write(marshal.dumps(tuple(vars(record).values())))
                self._starts.append(self._starts[-1] + written)
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"more than {IN_MEMORY:,} records are kept in a temporary file, and {tempfile.gettempdir()} does not "
                f"take it ({error.strerror}); name a folder with room by TMPDIR"
            ) from None

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Kind:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, end = self._starts[index], self._starts[index + 1]
        return self._kind(*marshal.loads(os.pread(self._file.fileno(), end - start, start)))


def keep(records: Iterable[Kind]) -> Sequence[Kind]:
    """All of them: a list, or a Spool where they are more than `IN_MEMORY`. Raises what `records` and a Spool raise."""
    records = iter(records)
    first = list(islice(records, IN_MEMORY + 1))
    return first if len(first) <= IN_MEMORY else Spool(type(first[0]), chain(first, records))
