"""Files that are there whole or not at all."""

import os

import pytest

from sora_hw import storage
from sora_hw.errors import UserError
from sora_hw.storage import sampled_checksum, write_whole


def test_a_text_takes_the_place_of_another(tmp_path):
    write_whole(tmp_path / "file", "first\n")
    write_whole(tmp_path / "file", "ä second\n")
    assert (tmp_path / "file").read_bytes() == "ä second\n".encode()
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_by_the_name_that_it_is_written_by_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "file.part").symlink_to(tmp_path / "mine")
    write_whole(tmp_path / "file", "text")
    assert (tmp_path / "mine").read_text() == "precious" and not (tmp_path / "file").is_symlink()


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


def test_a_sampled_checksum_sees_size_name_and_every_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SAMPLE", 4)
    monkeypatch.setattr(storage, "SAMPLED_EVERY", 16)
    monkeypatch.setattr(storage, "READ_WHOLE", 32)
    content = bytes(range(40))

    def of(content: bytes, name: str = "a.safetensors") -> str:
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / "other.json").write_bytes(os.urandom(4))
        return sampled_checksum(folder, "*.safetensors", "*.bin")

    def with_byte(place: int) -> bytes:
        return content[:place] + b"!" + content[place + 1 :]

    assert of(content) == of(content) == of(with_byte(4)) == of(with_byte(39)), "these lie between the samples"
    assert of(content[:32]) != of(with_byte(4)[:32]), "a small file is read whole"
    others = [of(with_byte(place)) for place in (0, 3, 16, 19, 32, 35)]
    others += [of(content[:-1]), of(content, "b.safetensors"), of(content, "a.bin"), of(b"")]
    assert len({of(content), *others}) == 1 + len(others)
