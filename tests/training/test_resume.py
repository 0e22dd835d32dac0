"""A run that goes on from its middle ends exactly where the undisturbed one ends, dropout included."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sealed import seal

ARGUMENTS = [
    *("--max-steps", 8, "--save-steps", 4, "--global-batch", 8, "--micro-batch", 4, "--warmup-steps", 2),
    *("--learning-rate", 5e-3, "--dropout", 0.2, "--validation-size", 0, "--rank", 4),
]


@pytest.mark.parametrize(("ranks", "stage", "into"), [(2, 2, "the same folder"), (0, 3, "a new folder")])
def test_resumed_losses_and_adapter_are_identical(tmp_path, tiny_model, records_file, train, ranks, stage, into):
    arguments = ["--model", tiny_model, "--train-data", records_file, "--zero-stage", stage, *ARGUMENTS]
    whole = train(tmp_path / "whole", ranks, *arguments, "--report-to", "tensorboard")  # which is free to differ
    if into == "the same folder":  # as a run leaves it that ended between step 4 and step 8
        shutil.copytree(whole.folder, tmp_path / "again")
        for left_later in ("checkpoint-8", "adapter"):
            shutil.rmtree(tmp_path / "again" / left_later)
        again = train(tmp_path / "again", ranks, "--resume", *arguments)
    else:
        again = train(tmp_path / "again", ranks, "--resume", whole.folder / "checkpoint-4", *arguments)
    assert f"resuming from {again.folder if into == 'the same folder' else whole.folder}/checkpoint-4" in again.stdout
    assert len(whole.losses) == 8 and len(set(whole.losses)) == 8
    assert again.losses == whole.losses, "the first four come from the checkpoint, the others are computed again"
    weights = "adapter/adapter_model.safetensors"
    assert (again.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()
    assert again.manifest["resumed_from"].endswith("checkpoint-4") and whole.manifest["resumed_from"] is None


def test_what_a_stranger_has_sealed(tmp_path, tiny_model, records_file, train, launch):
    """The checksums are right, and still it is no checkpoint: one line, and nothing in it runs."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    given = ["--model", tiny_model, "--train-data", records_file, *ARGUMENTS, "--max-steps", 2, "--save-steps", 1]
    run = train(tmp_path / "run", 0, *given)
    shutil.rmtree(run.folder / "checkpoint-2")
    checkpoint = run.folder / "checkpoint-1"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    harm = {
        "rng_state.pth": lambda file: torch.save({"cpu": Payload()}, file),
        "state-0.safetensors": lambda file: save_file({"weight": torch.ones(1)}, file),
        "schedule.json": lambda file: file.write_text("[]"),
        "trainer_state.json": lambda file: file.write_text(json.dumps({**state, "more": 1})),
    }
    for name, spoil in harm.items():
        content = (checkpoint / name).read_bytes()
        spoil(checkpoint / name)
        seal(checkpoint)
        done = launch(0, "--output", run.folder, *given, "--resume")
        told = [line for line in done.stderr.splitlines() if "WARNING" not in line]
        assert done.returncode == 2 and len(told) == 1 and "weights_only" not in told[0], done.stderr
        assert "checkpoint-1 cannot be gone on from, though its checksums are right" in told[0]
        (checkpoint / name).write_bytes(content)
    assert not (tmp_path / "ran").exists()


def test_other_ranks_and_another_stage_go_on(tmp_path, tiny_model, records_file, train):
    """Two ranks under ZeRO-2, then one without an engine's sharding, then two under ZeRO-3: the same losses."""
    given = ["--model", tiny_model, "--train-data", records_file, *ARGUMENTS, "--dropout", 0, "--max-steps", 6]
    given += ["--save-steps", 2]
    whole = train(tmp_path / "whole", 2, *given, "--zero-stage", 2)
    folder = tmp_path / "again"
    shutil.copytree(whole.folder, folder)
    for left_later in ("checkpoint-6", "adapter"):
        shutil.rmtree(folder / left_later)
    one = train(folder, 0, "--resume", *given, "--zero-stage", 0, "--micro-batch", 2)
    assert "resuming from" in one.stdout and one.manifest["resumed_from"].endswith("checkpoint-4")
    assert one.losses == pytest.approx(whole.losses, abs=5e-5) and one.losses[:4] == whole.losses[:4]
    for left_later in ("checkpoint-6", "adapter"):
        shutil.rmtree(folder / left_later)
    two = train(folder, 2, "--resume", *given, "--zero-stage", 3)
    assert two.manifest["resumed_from"].endswith("checkpoint-4") and two.losses[:4] == whole.losses[:4]
    assert two.losses == pytest.approx(whole.losses, abs=5e-5)


FULL = [pytest.param(stage, 20, marks=pytest.mark.full) for stage in range(4)]


@pytest.mark.parametrize(("stage", "steps"), [(2, 4), (3, 4), *FULL])
def test_interrupted_at_every_step(tmp_path, tiny_model, records_file, warm, stage, steps):
    given = ["--model", tiny_model, "--train-data", records_file, *ARGUMENTS, "--zero-stage", stage]
    interrupt_at_every_step(warm, "commonsense", tmp_path, steps, given)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.full) for stage in (0, 1)), 2, 3])
def test_parameters_with_and_without_weight_decay(tmp_path, tiny_encoder, warm, stage):
    """The optimiser has two groups of parameters, which DeepSpeed steps one after the other."""
    records = [{"sentence1": "ab" * number, "sentence2": "b", "label": number % 2} for number in range(1, 20)]
    (tmp_path / "rte.jsonl").write_text("\n".join(map(json.dumps, records)))
    given = ["--task", "rte", "--model", tiny_encoder, "--train-data", tmp_path / "rte.jsonl", *ARGUMENTS]
    given += ["--weight-decay", 0.3, "--zero-stage", stage]
    interrupt_at_every_step(warm, "glue", tmp_path, 3, given)


def interrupt_at_every_step(warm, recipe, folder, steps, given):
    """In a process of its own, which DeepSpeed takes for itself."""
    program = [Path(__file__).with_name("resume_program.py"), recipe, folder, steps, *given]
    done = warm.run(list(map(str, program)), folder, os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"{steps} of {steps}"
