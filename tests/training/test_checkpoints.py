"""Checkpoints on the disk: which one a run goes on from, what a damaged one says of itself, and which are deleted."""

import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist
from sealed import seal, write_checkpoint

from sora_hw.errors import UserError
from sora_hw.storage import write_whole
from sora_hw.training import checkpoints
from sora_hw.training.checkpoints import (
    clear,
    damage,
    delete,
    newest,
    prune,
    reading_state,
    together,
    write_state,
    writing,
)
from sora_hw.training.divergence import Diverged


@pytest.fixture
def alone(tmp_path_factory):
    """A process group of one rank."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('meeting')}/point", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_the_newest_is_the_last_that_is_whole(tmp_path):
    assert newest(tmp_path) == (None, [])
    for step in (5, 10, 20):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-20" / "checkpoint.json").unlink()  # as one that was copied in part
    (tmp_path / "checkpoint-notes").mkdir()
    told = f"{tmp_path / 'checkpoint-20'} is left out: checkpoint.json is missing"
    assert newest(tmp_path) == (tmp_path / "checkpoint-10", [told])


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def exchange(file):
    """With that of another checkpoint."""
    shutil.copy(write_checkpoint(file.parent.parent / "checkpoint-7") / file.name, file)


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        ("state-0.safetensors", cut, "state-0.safetensors is damaged"),
        ("state-0.safetensors", flip, "state-0.safetensors is damaged"),
        ("state-0.safetensors", exchange, "state-0.safetensors is damaged"),
        ("schedule.json", exchange, "schedule.json is damaged"),
        ("trainer_state.json", flip, "trainer_state.json is damaged"),
        ("trainer_state.json", os.unlink, "trainer_state.json is missing"),
        ("adapter/adapter_config.json", os.unlink, "adapter/adapter_config.json is missing"),
        ("checkpoint.json", cut, "checkpoint.json is damaged"),
        ("checkpoint.json", os.unlink, "checkpoint.json is missing"),
        ("checkpoint.json", lambda file: file.write_text("[]"), "checkpoint.json is damaged"),
        ("checkpoint.json", lambda file: file.write_text('{"version": 2, "sha256": {}}'), "it is of version 2"),
    ],
)
def test_what_was_done_to_it_is_said(tmp_path, file, harm, reason):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4")
    assert damage(checkpoint) is None
    harm(checkpoint / file)
    assert damage(checkpoint).startswith(reason)


@pytest.mark.parametrize("name", ["state-1.safetensors", "rng_state_1.pth"])
def test_a_file_that_was_put_in_beside_its_own(tmp_path, name):
    """What is read by its name would take the place of what was saved."""
    checkpoint, other = (write_checkpoint(tmp_path / f"checkpoint-{step}") for step in (4, 2))
    shutil.copy(other / "state-0.safetensors", checkpoint / name)
    assert newest(tmp_path) == (other, [f"{checkpoint} is left out: {name} is none of its files"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("state-0.safetensors", "state-0.safetensors is none of its files"),
        ("schedule.json", "schedule.json is none of its files"),
        ("trainer_state.json", "trainer_state.json is none of its files"),
        ("rng_state.pth", "its random numbers are missing"),
    ],
)
def test_a_seal_of_less_than_a_checkpoint(tmp_path, name, reason):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4")
    (checkpoint / name).unlink()
    seal(checkpoint)
    assert damage(checkpoint) == reason


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"global_step": 4},
        {"global_step": "4", "log_history": []},
        {"global_step": 4, "log_history": 7},
        {"global_step": 4, "log_history": [7]},
        {"global_step": 4, "log_history": [], "best_global_step": "../x"},
    ],
)
def test_a_sealed_state_that_cannot_be(tmp_path, state):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4")
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    seal(checkpoint)
    assert damage(checkpoint) == "trainer_state.json is damaged"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (cut, "state-0.safetensors is damaged"),
        (flip, "state-0.safetensors is damaged"),
        (os.unlink, "state-0.safetens"),
    ],
)
def test_the_best_must_be_whole_too(tmp_path, harm, reason):
    """A run that ends with the best so far would end with something else, or not at all."""
    for step in (2, 4, 6):
        write_checkpoint(tmp_path / f"checkpoint-{step}", best=2 if step < 6 else 6)
    assert newest(tmp_path) == (tmp_path / "checkpoint-6", [])
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert newest(tmp_path) == (tmp_path / "checkpoint-4", [])
    harm(tmp_path / "checkpoint-2" / "state-0.safetensors")
    assert damage(tmp_path / "checkpoint-4").startswith(f"checkpoint-2, the best so far: {reason}")
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert damage(tmp_path / "checkpoint-4") == "checkpoint-2, the best so far: checkpoint.json is missing"


def test_one_under_another_name(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-4").rename(tmp_path / "checkpoint-8")
    assert damage(tmp_path / "checkpoint-8") == "it is that of step 4"


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in (5, 10, 15, 20, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    prune(tmp_path, best=tmp_path / "checkpoint-10")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-100", "checkpoint-20"]
    prune(tmp_path, best=None)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-100", "checkpoint-20"]


def test_one_that_was_half_deleted_is_none(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-4")

    def killed(folder, ignore_errors=False):
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            delete(checkpoint)
    assert newest(tmp_path) == (None, [])
    clear(tmp_path)
    assert os.listdir(tmp_path) == []


def test_it_is_there_when_it_is_whole(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(checkpoints, "LARGEST_FILE", 40)  # bytes, so that there are several
    tensors = {f"layer.{number}": torch.randn(3, 4) for number in range(5)}
    with writing(tmp_path / "checkpoint-4") as aside:
        write_state(aside, tensors.items())
        (aside / "trainer_state.json").write_text('{"global_step": 4, "log_history": []}')
        for name in ("schedule.json", "rng_state.pth"):
            (aside / name).touch()
        assert newest(tmp_path) == (None, [])
    assert newest(tmp_path) == (tmp_path / "checkpoint-4", [])
    assert len(list((tmp_path / "checkpoint-4").glob("state-*.safetensors"))) == 5
    with reading_state(tmp_path / "checkpoint-4") as value:
        assert all(torch.equal(value(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("when", ["writing tensors", "syncing", "sealing"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, alone, monkeypatch, when):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    write_checkpoint(tmp_path / "checkpoint-2")
    where = {"writing tensors": (checkpoints, "save_file"), "syncing": (os, "fsync"), "sealing": (os, "rename")}[when]
    monkeypatch.setattr(*where, full)
    with (
        pytest.raises(UserError, match=r"rank 0 \(No space left on device\); that mended, --resume goes on"),
        writing(tmp_path / "checkpoint-4") as aside,
    ):
        write_state(aside, {"weight": torch.ones(2)}.items())
    assert newest(tmp_path) == (tmp_path / "checkpoint-2", [])
    assert not list(tmp_path.glob("*.part"))


def test_every_rank_learns_what_one_has_said_in_a_line(tmp_path, alone):
    """Which would end that one alone, and leave the others waiting."""
    told = r"checkpoint-4 cannot be written by rank 0 \(.*checkpoint.json cannot be written \(No such file"
    with pytest.raises(UserError, match=told), together(tmp_path / "checkpoint-4"):
        write_whole(tmp_path / "checkpoint-4" / "checkpoint.json", "{}")


def test_a_payload_in_a_checkpoint_does_not_run(tmp_path):
    """Even where its checksum is right: random numbers are read as plain values, all else as tensors or JSON."""
    from transformers import Trainer

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoint = write_checkpoint(tmp_path / "checkpoint-4")
    torch.save({"python": Payload(), "numpy": Payload(), "cpu": Payload()}, checkpoint / "rng_state.pth")
    trainer = Trainer.__new__(Trainer)
    trainer.args = type("Arguments", (), {"world_size": 1, "process_index": 0})()
    with pytest.raises(Exception, match="Weights only load failed"):
        trainer._load_rng_state(str(checkpoint))
    torch.save({"weight": Payload()}, checkpoint / "state-0.safetensors")
    with pytest.raises(Exception, match="header"), reading_state(checkpoint):
        pass
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite_leave_the_checkpoint_before(tmp_path, alone):
    write_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(Diverged, match="weight is no longer finite"), writing(tmp_path / "checkpoint-4") as aside:
        write_state(aside, {"weight": torch.tensor([1.0, float("nan")])}.items())
    assert newest(tmp_path) == (tmp_path / "checkpoint-2", [])
    assert not list(tmp_path.glob("*.part"))
