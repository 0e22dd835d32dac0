"""Asking a finished run: what `sora-hw generate` does."""

from collections.abc import Sequence
from pathlib import Path

from sora_hw.data.prompts import prompt
from sora_hw.data.records import Record
from sora_hw.devices.detect import select
from sora_hw.errors import UserError
from sora_hw.evaluation.generation import Generator
from sora_hw.finished.loading import load, profile_for
from sora_hw.finished.run import read_run
from sora_hw.recipes.recipe import Classification
from sora_hw.terminal import Console
from sora_hw.training.report import kernels
from sora_hw.versions import check_versions


def generate(
    folder: Path,
    questions: Sequence[str],
    backend: str,
    max_new_tokens: int,
    console: Console,
    model: str | None = None,
) -> list[str]:
    """The answer to each question, in the prompt format that the run in `folder` was trained with, decoded greedily.

    console: is told what runs where.
    model: the base model, where it has moved from where run.json names it.
    Raises UserError for a run that has left nothing, or whose model does not answer questions.
    """
    check_versions(unneeded=("deepspeed",))
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
    if not all(question.strip() for question in questions):
        raise UserError("a question is empty")
    device = select(backend)
    run = read_run(folder, model)
    if isinstance(run.recipe, Classification):
        raise UserError(f"{folder} is a run of GLUE: it labels sentences, and has no answers to questions")
    profile = profile_for(run, device)
    loaded = load(run.recipe, run, profile, device.torch_device(0))
    positions = getattr(loaded.model.config, "max_position_embeddings", None)
    if positions is not None and max_new_tokens >= positions:
        raise UserError(
            f"--max-new-tokens {max_new_tokens}: question and answer together may have {positions} tokens with "
            f"{run.recipe.model}"
        )
    console.print(
        f"{run.recipe.method} of {folder} on {run.recipe.model}: {device.display_name} ({device.name()}), "
        f"{profile.dtype}, kernels of {kernels(device)}"
    )
    generator = Generator(loaded.model, loaded.tokenizer, device.torch_device(0), max_new_tokens)
    # The blanks at the prompt's end are the model's to write: in training the last belonged to the answer's first word.
    texts = [prompt(Record(each, "", "", ""), for_training=True).rstrip(" ") for each in questions]
    prompts = list(map(generator.encode, texts))
    if cut := sum(each.cut for each in prompts):
        console.print(f"{cut} of {len(prompts)} questions are longer than the model takes and lost their beginning")
    return [generator.answer([each])[0] for each in prompts]
