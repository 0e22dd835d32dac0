"""Files that are there whole or not at all."""

import os

import pytest

from sora_hw.errors import UserError
from sora_hw.storage import write_whole


def test_a_text_takes_the_place_of_another(tmp_path):
    write_whole(tmp_path / "file", "first\n")
    write_whole(tmp_path / "file", "ä second\n")
    assert (tmp_path / "file").read_bytes() == "ä second\n".encode()
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_text(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file cannot be written \(No space left on device\)"):
        write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_no_folder_to_write_into(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "below", "text")
