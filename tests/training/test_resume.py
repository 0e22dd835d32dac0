"""A run that goes on from its middle ends exactly where the undisturbed one ends, dropout included."""

import shutil

import pytest

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
