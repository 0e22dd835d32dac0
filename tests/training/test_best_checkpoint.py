"""--keep-best ends with the adapter of the lowest validation loss, not with the last one."""

import json

import torch
from safetensors.torch import load_file


def test_the_best_adapter_is_kept(tmp_path, tiny_model, records_file, train):
    wild = ["--learning-rate", 1.0, "--warmup-steps", 3, "--schedule", "constant", "--max-grad-norm", 0]
    steps = ["--max-steps", 3, "--save-steps", 1, "--eval-steps", 1, "--global-batch", 8, "--validation-size", 6]
    data = ["--model", tiny_model, "--train-data", records_file, "--max-length", 320, "--rank", 4]
    run = train(tmp_path / "run", 0, "--keep-best", *wild, *steps, *data)
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    validation = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = min(validation, key=validation.get)
    assert sorted(validation) == [1, 2, 3] and best < 3, "the rate is too large on purpose"
    assert run.manifest["results"]["validation_loss"] == validation[best]
    kept = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    wanted = load_file(run.folder / f"checkpoint-{best}" / "adapter_model.safetensors")
    last = load_file(run.folder / "checkpoint-3" / "adapter_model.safetensors")
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[name], wanted[name]) for name in kept)
    assert not all(torch.equal(kept[name], last[name]) for name in kept)
