"""What the embedded model learned: its held-out questions answered without and with the adapter."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase
from transformers.integrations import unset_hf_deepspeed_config

from sora_hw.data.embedded import candidates, heldout_records
from sora_hw.evaluation.choices import score_choices
from sora_hw.hardware import Profile
from sora_hw.training.base_model import BaseModel, load_model
from sora_hw.training.saving import load_trained


@dataclass(frozen=True)
class DemoScore:
    """Shares of held-out questions answered correctly, between 0 and 1; `chance` is what guessing gives."""

    questions: int
    chance: float
    before: float
    after: float


def score_demo(
    base: BaseModel, tokenizer: PreTrainedTokenizerBase, trained: Path, profile: Profile, device: torch.device
) -> DemoScore:
    """Score the plain base model and what was trained, as it was saved. Every rank answers its share of the questions.

    The model is loaded anew: whatever the ZeRO stage, what is scored is what lies on the disk.
    """
    unset_hf_deepspeed_config()
    records = heldout_records()
    mine = records[dist.get_rank() :: dist.get_world_size()]
    profile = replace(profile, dtype="float32", four_bit=False)
    model = load_model(base, profile).to(device)
    before = score_choices(model, tokenizer, mine, candidates, device).correct
    model = load_trained(base, model, trained, profile).to(device)
    after = score_choices(model, tokenizer, mine, candidates, device).correct
    correct = torch.tensor([before, after], device=device)
    dist.all_reduce(correct)
    before, after = (correct.double() / len(records)).tolist()
    chance = sum(1 / len(candidates(record)) for record in records) / len(records)
    return DemoScore(len(records), chance, before, after)
