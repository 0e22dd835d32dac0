"""--keep-best ends with the adapter of the lowest validation loss, not with the last one."""

import json
import shutil

import torch
from safetensors.torch import load_file

from sora_hw.data.dataset import split
from sora_hw.data.records import Record

SEED, HELD_OUT = 3, 4


def write_records(file):
    """Records whose held-out answers are the letters that the others' answers unteach."""
    records = [Record(f"Say {number}.", "", "a" * 30, "a", id=str(number)) for number in range(20)]
    held_out = {record.id for record in split(records, HELD_OUT, SEED)[1]}
    lines = [
        {
            "instruction": record.instruction,
            "output": "xyz" * 10 if record.id in held_out else record.output,
            "answer": "a",
        }
        for record in records
    ]
    file.write_text("\n".join(map(json.dumps, lines)))


def test_the_best_adapter_is_kept(tmp_path, tiny_model, train):
    write_records(tmp_path / "records.jsonl")
    data = ["--model", tiny_model, "--train-data", tmp_path / "records.jsonl", "--learn", "answer", "--seed", SEED]
    steps = ["--max-steps", 4, "--save-steps", 1, "--eval-steps", 1, "--global-batch", 8, "--learning-rate", 0.02]
    steps += ["--log-steps", 100]
    run = train(tmp_path / "run", 0, "--keep-best", *data, *steps, "--warmup-steps", 2, "--validation-size", HELD_OUT)
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    validation = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = min(validation, key=validation.get)
    assert sorted(validation) == [1, 2, 3, 4] and best < 4
    assert run.manifest["results"]["validation_loss"] == validation[best]
    assert run.manifest["results"]["final_loss"] == run.losses[0] and len(run.losses) == 1, "logged at the last step"
    kept = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    wanted = load_file(run.folder / f"checkpoint-{best}" / "adapter" / "adapter_model.safetensors")
    last = load_file(run.folder / "checkpoint-4" / "adapter" / "adapter_model.safetensors")
    assert kept.keys() == wanted.keys()
    assert all(torch.equal(kept[name], wanted[name]) for name in kept)
    assert not all(torch.equal(kept[name], last[name]) for name in kept)
    moved = run.folder.rename(tmp_path / "moved")  # and ended by force when all but the adapter was there
    shutil.rmtree(moved / "adapter")
    again = train(
        moved, 0, "--keep-best", "--resume", *data, *steps, "--warmup-steps", 2, "--validation-size", HELD_OUT
    )
    assert again.manifest["resumed_from"].endswith("checkpoint-4")
    found = load_file(moved / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_best_is_one_that_was_saved(tmp_path, tiny_model, records_file, train):
    """Where validations are more frequent than checkpoints, and the lowest loss lies between two of them."""
    data = ["--model", tiny_model, "--train-data", records_file, "--validation-size", 6, "--keep-best"]
    steps = ["--max-steps", 7, "--save-steps", 2, "--eval-steps", 1, "--global-batch", 8]
    run = train(tmp_path / "run", 0, *data, *steps, "--learning-rate", 0.02, "--warmup-steps", 1)
    history = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
    validation = {}
    for entry in history:
        if "eval_loss" in entry:
            validation.setdefault(entry["step"], entry["eval_loss"])
    saved = [step for step in validation if step in (2, 4, 6, 7)]
    assert min(validation, key=validation.get) not in saved
    assert run.manifest["results"]["validation_loss"] == min(validation[step] for step in saved)
