"""A random tiny Llama and a BERT with tokenizers of bytes, a few short records, and the launcher as a process."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import write_records, write_tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from warm import Warm, by_deepspeed, with_programs

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHERS = REPOSITORY / "launchers"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a two-layer model of random weights; its tokens are bytes, its end-of-text is 256."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A folder with a two-layer BERT of random weights and no dropout; its tokens are bytes between [CLS] and [SEP]."""
    folder = tmp_path_factory.mktemp("tiny_encoder")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"[PAD]": 256, "[CLS]": 257, "[SEP]": 258}
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)} | special, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 257), ("[SEP]", 258)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    kinds = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=kinds, **names).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(
        **sizes,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records_file(tmp_path_factory) -> Path:
    """50 records whose lengths differ widely, so that ranks and micro-batches hold unequal numbers of tokens."""
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl")


@dataclass(frozen=True)
class Finished:
    """A launcher's run that ended with exit code 0."""

    folder: Path
    stdout: str

    @property
    def manifest(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def losses(self) -> list[float]:
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="session")
def launch(warm):
    """`launch(ranks, *arguments, **options)`, see `_launch`."""
    return partial(_launch, warm)


@pytest.fixture(scope="session")
def train(warm):
    """`train(folder, ranks, *arguments, **options)`, see `_train`."""
    return partial(_train, warm)


@pytest.fixture(scope="session")
def finish():
    """`finish(process, seconds=240)`, see `_finish`."""
    return _finish


def _finish(process: subprocess.Popen, seconds: float = 240) -> subprocess.CompletedProcess:
    """Wait for a program that leads a session of its own; one that takes longer is ended with all that it started.

    Launchers end their ranks when they are asked to, and leave them alive when they are killed.
    """
    try:
        stdout, stderr = process.communicate(timeout=seconds)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(40)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        raise


def _launch(
    warm: Warm,
    ranks: int,
    *arguments: object,
    backend: str = "cpu",
    launcher: str = "commonsense.py",
    cwd: Path | None = None,
    cold: bool = False,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Run the launcher: 0 ranks for plain python, otherwise by DeepSpeed's launcher on a port of its own.

    On the processor it is forked from a process that has imported the libraries. `cold` starts it as a user does: for
    tests of a start, and where a library reads one of the variables while it is imported.
    """
    program = [str(LAUNCHERS / launcher), "--backend", backend, *map(str, arguments)]
    if ranks:
        program = [*by_deepspeed(ranks), *program]
    environment = with_programs({**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables})
    if backend == "cpu" and not cold:
        return warm.run(program, cwd or Path.cwd(), environment)
    return subprocess.run([sys.executable, *program], capture_output=True, text=True, env=environment, cwd=cwd)


def _train(warm: Warm, folder: Path, ranks: int, *arguments: object, **options: object) -> Finished:
    """A run into `folder` that must succeed."""
    done = _launch(warm, ranks, "--output", folder, *arguments, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return Finished(folder, done.stdout)
