"""A checkpoint as a run leaves it, without a run: its files, and the checksum of each by hand."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_checkpoint(folder: Path, log_history: list[dict] | None = None) -> Path:
    """`folder` is called checkpoint-N."""
    (folder / "adapter").mkdir(parents=True)
    state = {"global_step": int(folder.name.rpartition("-")[2]), "log_history": log_history or []}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "schedule.json").write_text(json.dumps({"optimiser_steps": state["global_step"], "scheduler": {}}))
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"weight": torch.full((3,), float(state["global_step"]))}, folder / "state-0.safetensors")
    files = [file for file in folder.rglob("*") if file.is_file()]
    sums = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / "checkpoint.json").write_text(json.dumps({"version": 1, "sha256": sums}))
    return folder
