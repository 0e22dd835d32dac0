"""A checkpoint as a run leaves it, without a run: its files, and the checksum of each by hand."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_checkpoint(folder: Path, log_history: list[dict] | None = None, best: int | None = None) -> Path:
    """`folder` is called checkpoint-N; `best` is the step of the lowest validation loss, of a run that keeps it."""
    (folder / "adapter").mkdir(parents=True)
    state = {"global_step": int(folder.name.rpartition("-")[2]), "log_history": log_history or []}
    state["best_global_step"] = best
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "schedule.json").write_text(json.dumps({"optimiser_steps": state["global_step"], "scheduler": {}}))
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"weight": torch.full((3,), float(state["global_step"]))}, folder / "state-0.safetensors")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Make the checksums those of what lies in the folder, as a stranger can."""
    (folder / "checkpoint.json").unlink(missing_ok=True)
    files = [file for file in folder.rglob("*") if file.is_file()]
    sums = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / "checkpoint.json").write_text(json.dumps({"version": 1, "sha256": sums}))
