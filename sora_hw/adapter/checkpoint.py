"""What a saved adapter says beside its tensors, and what its tensors must be when it is loaded.

PEFT fills in what a checkpoint has, leaves the rest at its start values and warns at most: an adapter that has lost a
tensor, or is another method's, would load in part. Here that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft.config import PeftConfig

# Raised by whoever changes what the fields of a configuration or the tensors mean, or adds one that the output depends
# on. An adapter that was saved without it is of version 1.
FORMAT_VERSION = 1
HOW_TO_LOAD = "run `import sora_hw` before loading this adapter: PEFT does not know its peft_type by itself"

# transformers' class for each of PEFT's task types
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

_CARD = "README.md"
_START, _END = "<!-- sora_hw -->", "<!-- end of sora_hw -->"


def check_version(version: object) -> None:
    """Raises ValueError for a format that this library does not know."""
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"format_version={version!r}: this sora_hw reads adapters of format {FORMAT_VERSION}; install the sora_hw "
            "that the adapter was saved with, or a newer one"
        )


def check_tensors(wanted: Iterable[str], found: Iterable[str], known: Iterable[str]) -> None:
    """Check the names of a checkpoint's tensors, brought to those of the model.

    Args:
        wanted: what the adapter must be given.
        found: what the checkpoint holds.
        known: everything that the model has: biases and whole layers may be trained beside the adapter.

    Raises:
        ValueError: where one is missing, or belongs to nothing in the model.
    """
    found = set(found)
    missing, foreign = sorted(set(wanted) - found), sorted(found - set(known))
    if not missing and not foreign:
        return
    faults = [
        f"{len(names)} {fault}, {names[0]} first"
        for fault, names in (("missing", missing), ("foreign", foreign))
        if names
    ]
    lora = any(re.search(r"\.lora_\w+(\.|$)", name) for name in foreign)
    whose = "a LoRA's, which PEFT loads as such" if lora else "damaged, or of another method or model"
    raise ValueError(f"the tensors are not this adapter's ({'; '.join(faults)}): the checkpoint is {whose}")


def write_card(folder: Path, config: PeftConfig, facts: dict[str, object]) -> None:
    """Write the model card README.md, or put what a reader must know on top of what is there (PEFT saves a form).

    Args:
        folder: of the saved adapter.
        config: its configuration.
        facts: what the card's table shows.
    """
    file = folder / _CARD
    card = ModelCard.load(file) if file.exists() else ModelCard(f"---\n{ModelCardData(library_name='peft')}\n---\n")
    others = re.sub(f"{_START}.*?{_END}", "", card.text, flags=re.DOTALL).strip()
    card.text = (
        "\n\n".join(part for part in (f"{_START}\n{_introduction(config, facts)}\n{_END}", others) if part) + "\n"
    )
    card.data["tags"] = sorted({*(card.data.get("tags") or []), "sora_hw"})
    card.save(file)


def _introduction(config: PeftConfig, facts: dict[str, object]) -> str:
    name, auto_class = config.base_model_name_or_path, AUTO_CLASSES.get(config.task_type)
    base = f'{auto_class}.from_pretrained("{name}")' if auto_class and name else "...  # the model it was trained on"
    imports = f"\nfrom transformers import {auto_class}" if auto_class and name else ""
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return f"""\
**Run `import sora_hw` before loading this adapter.** It tells PEFT the method; without it PEFT ends in
`KeyError: '{config.peft_type.value}'`.

```python
import sora_hw
from peft import PeftModel{imports}

base = {base}
model = PeftModel.from_pretrained(base, "the folder with this file")
```

| | |
|---|---|
{rows}"""
