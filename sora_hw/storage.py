"""Files that are on the disk whole or not at all, what tells them from others, and reading what others have written."""

import errno
import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from sora_hw.errors import UserError

SAMPLE, SAMPLED_EVERY, READ_WHOLE = 2**16, 2**24, 2**26  # bytes


def write_whole(file: Path, text: str) -> None:
    """Write `text` in UTF-8 to `file`, in place of what it held: aside, synced, renamed.

    Whoever reads it finds the old text or the new one, also when the machine fails in between. Raises UserError where
    it cannot be written; then nothing is left.
    """
    aside = file.with_name(f"{file.name}.part")
    try:
        aside.unlink(missing_ok=True)  # it may be a link
        with open(aside, "x", encoding="utf-8") as opened:
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
        check_regular(file)
        with open(file, "rb") as opened:
            digest.update(f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def sampled_checksum(folder: Path, *patterns: str) -> str:
    """SHA-256 of the names, the sizes and the bytes of the files in `folder` that match any of the glob patterns, of
    files over 64 MiB 64 KiB out of every 16 MiB: what tells a model's weights from another's without reading all."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        check_regular(file)
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as opened:
            for place in range(0, size, SAMPLED_EVERY if size > READ_WHOLE else SAMPLE):
                opened.seek(place)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def read_json(file: Path) -> object:
    """What the file holds, in JSON's types; whatever is wrong with it is an OSError or a ValueError.

    Raises OSError where it cannot be read or is no regular file, ValueError where it is not UTF-8, not JSON, or nested
    deeper than Python goes.
    """
    check_regular(file)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_regular(file: Path) -> None:
    """Raises OSError for what is neither a file nor a link to one: a pipe would be waited for, a device may not end."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
