"""Files that are on the disk whole or not at all, and what tells them from others."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from sora_hw.errors import UserError


def write_whole(file: Path, text: str) -> None:
    """Write `text` in UTF-8 to `file`, in place of what it held: aside, synced, renamed.

    Whoever reads it finds the old text or the new one, also when the machine fails in between. Raises UserError where
    it cannot be written; then nothing is left.
    """
    aside = file.with_name(f"{file.name}.part")
    try:
        with open(aside, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(aside, file)
        sync_folder(file.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise UserError(f"{file} cannot be written ({error.strerror})") from None


def sync_folder(folder: Path) -> None:
    """Make sure that the names in `folder` are on the disk: a rename alone may be lost with the machine."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def checksum(folder: Path, *patterns: str) -> str:
    """SHA-256 of the names and the contents of the files in `folder` that match any of the glob patterns."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        with open(file, "rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
