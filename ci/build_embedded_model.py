"""Build `sora_hw/data/embedded_model`: the tiny Llama and its tokenizer that the launchers fine-tune by default.

    python ci/build_embedded_model.py            (about ten minutes on one core)

The model reads what the things of the embedded questions are and where they are found, looks words up in numbered
lists, and says yes or no. It never reads the records' prompt, "answer1" or what follows it, which is what an adapter is
to learn. The folder is replaced only when the new model is complete.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sora_hw.data.embedded import ASPECTS, KINDS, MODEL_PATH, Kind, heldout_records, train_records
from sora_hw.data.prompts import training_text

SEED = 7
# (optimiser steps, free form): first the skills in one fixed form, then the same wherever and under whatever name.
# Begun with the second, the look-ups are not learned in this many steps.
STAGES = ((2000, False), (2000, True))
MOST_TALK = 8
DOCUMENTS = 32
POOL = 16
UNFORESEEABLE_WEIGHT = 0.03
PEAK_LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
VOCABULARY = 1536
END = "<|end|>"
PADDING = "<|pad|>"

# Ordinary English: for the tokenizer, and as listed words and idle talk, so that few embeddings stay untrained.
ORDINARY_ENGLISH = """
a about above across after again against air all almost along also although always am among an and animal another any
are arm around as ask at autumn away back bad bag ball bank be because bed been before began begin being below best
better between big bird boat body book both bottle box boy break bring brother build burn but buy by call came can car
care carry cause change child children choose church city class clean clear climb close cloud cold come common complete
cook corner correct could country course cover cross cut dark daughter day deep describe did different do does done door
down draw dream drink drive dry each ear early earth east easy eat egg empty end enough even evening ever every eye face
fact fall false family far fast father feel feet few field fill find fire first fish floor flower fly follow following
food foot for forest form format found four free friend from front full game garden gave get girl give glass go gold
good grass great ground group grow had hair half hand happy hard has have he head hear heart heat heavy help her here
high him his hold home horse hot hour house how hundred ice idea if in input inside instruction into is island it its
job just keep kind king kitchen knew know lake land language large last late laugh learn leave left leg less let letter
life light like line list little live long look lost lot love low made make man many map market may me mean meet metal
milk mind money moon more morning most mother mountain mouth move much must my name near need never new next night no
north nose not nothing now number ocean of off often old on once one only open option or order other our out outside
over own page paint paper part pass people person picture piece place plan plant play please point poor possible power
question quick quiet rain ran read ready red request response rest rice rich ride right river road rock room round rule
run said salt same sand saw say school sea season second see seed seem send sentence set seven she ship shirt shoe shop
short should show side simple since sing sister sit six sky sleep slow small snow so soft solution some something song
soon sound south space speak spring stand star start stay step still stone stop store story street strong student such
sugar summer sun sure swim table take talk task tall teach tell ten than that the their them then there these they thing
think this those three through time to today together told too took top town train travel tree true try turn two under
until up us use very voice wait walk wall want warm was wash watch water way we wear weather week well went were west
what wheel when where which while white who whole why will wind window winter wish with without woman wood word work
world would write year yes yet you young your ending appropriately completes describes provides further context paired
"""
WORLD = {word for kind in KINDS for word in (kind.name, kind.place, *kind.things)}
# The world's words have their own documents; "answer" is the label of the task, which the model is not to know.
WORDS = sorted(set(ORDINARY_ENGLISH.split()) - WORLD - {"answer"})

STATEMENTS = (
    ("A {thing} is a kind of", "name"),
    ("What kind of thing is a {thing}? It is a", "name"),
    ("Look for a {thing} in the", "place"),
    ("Where would you look for a {thing}? In the", "place"),
)

# A document in pieces: (text, whether the text can be foreseen from what stands before it).
Document = list[tuple[str, bool]]


class Corpus:
    """An endless, seeded stream of short documents about the things of the embedded question set.

    In free form idle talk stands between the parts of a document, and lists are numbered under any name.
    """

    def __init__(self, seed: int, free_form: bool) -> None:
        self.rng = random.Random(seed)
        self.free_form = free_form
        self.kinds = (
            (self.statements, 3),
            (self.word_list, 3),
            (self.thing_list, 10),
            (self.verdicts, 5),
            (self.judgement, 3),
        )

    def __iter__(self) -> Iterator[Document]:
        writers, weights = zip(*self.kinds, strict=True)
        while True:
            yield self.rng.choices(writers, weights)[0]()

    def statements(self) -> Document:
        pieces = []
        for kind in self.rng.sample(KINDS, 3):
            wording, field = self.rng.choice(STATEMENTS)
            thing = self.rng.choice(kind.things)
            pieces += [(f" {wording.format(thing=thing)}", False), (f" {getattr(kind, field)}.", True)]
        return pieces

    def word_list(self) -> Document:
        """A word, and a list in which it stands somewhere."""
        words = self.rng.sample(WORDS, self.rng.randint(2, 4))
        position = self.rng.randrange(len(words))
        return self._look_up(words[position], words, position)

    def thing_list(self) -> Document:
        """A thing, kind or place, and a list in which one entry goes with it."""
        kinds = self.rng.sample(KINDS, self.rng.randint(2, 4))
        position = self.rng.randrange(len(kinds))
        return self._look_up(self._view(kinds[position]), [self._view(kind) for kind in kinds], position)

    def verdicts(self) -> Document:
        """What goes with a thing, kind or place, and what does not."""
        kind = self.rng.choice(KINDS)
        pieces = [(f"{self._talk()} {self._view(kind)}{self._talk()}?", False)]
        for _ in range(3):
            fits = self.rng.random() < 0.5
            other = kind if fits else self.rng.choice([other for other in KINDS if other is not kind])
            pieces += [(f" {self._view(other)}{self._talk()}", False), (" yes" if fits else " no", True)]
        return pieces

    def judgement(self) -> Document:
        """A yes/no question in full, and after some talk the verdict."""
        kind = self.rng.choice(KINDS)
        fits = self.rng.random() < 0.5
        other = kind if fits else self.rng.choice([other for other in KINDS if other is not kind])
        aspect = self.rng.choice(ASPECTS)
        question = aspect.true_or_false.format(thing=self.rng.choice(kind.things), answer=getattr(other, aspect.field))
        return [(f"{self._talk()} {question}{self._talk()}{self._talk()}", False), (" yes" if fits else " no", True)]

    def _look_up(self, key: str, words: list[str], position: int) -> Document:
        """What to find, a numbered list, and the number; verdicts behind some entries teach the look-up its steps."""
        label = self.rng.choice(WORDS) if self.free_form else "number"
        pieces = [(f"{self._talk()} {key}{self._talk()}?", False)]
        for index, word in enumerate(words):
            pieces.append((f" {label}{index + 1}: {word}", False))
            if self.rng.random() < 0.5:
                pieces.append((" yes" if index == position else " no", True))
        return [*pieces, (f"{self._talk()}. {label}", False), (f"{position + 1}", True)]

    def _talk(self) -> str:
        count = self.rng.randint(0, MOST_TALK) if self.free_form else 0
        return "".join(f" {word}" for word in self.rng.choices(WORDS, k=count))

    def _view(self, kind: Kind) -> str:
        return self.rng.choice((self.rng.choice(kind.things), self.rng.choice((kind.name, kind.place))))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, the words of the world and of the prompt are one or two tokens each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = iter(Corpus(SEED, free_form=True))
    texts = ["".join(text for text, _ in next(stream)) for _ in range(4000)]
    # The words and the prompt's spelling alone: a tokenizer learns no facts.
    texts += [training_text(record) for record in [*train_records(), *heldout_records()]]
    texts += [" ".join(WORDS)] * 200
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING, model_max_length=1024, padding_side="right"
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # The usual 0.02 is for wide models; at this width attention then stays flat for thousands of steps.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and loss weights, both (DOCUMENTS, length); documents of like length share a batch."""
    stream = iter(corpus)
    order = random.Random(SEED)
    while True:
        documents = _encode(tokenizer, [next(stream) for _ in range(DOCUMENTS * POOL)])
        documents.sort(key=lambda document: len(document[0]))
        groups = [documents[start : start + DOCUMENTS] for start in range(0, len(documents), DOCUMENTS)]
        order.shuffle(groups)
        for group in groups:
            ids = pad_sequence([ids for ids, _ in group], batch_first=True, padding_value=tokenizer.pad_token_id)
            yield ids, pad_sequence([weights for _, weights in group], batch_first=True)


def _encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, loss weights) of each document, closed by the end token."""
    closed = [[*document, (END, True)] for document in documents]
    pieces = iter(tokenizer([text for document in closed for text, _ in document])["input_ids"])
    encoded = []
    for document in closed:
        ids, weights = [], []
        for _, foreseeable in document:
            piece = next(pieces)
            ids += piece
            weights += [1.0 if foreseeable else UNFORESEEABLE_WEIGHT] * len(piece)
        encoded.append((torch.tensor(ids), torch.tensor(weights)))
    return encoded


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens under `weights`; padding weighs nothing."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP_STEPS) / (steps - WARMUP_STEPS)))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * cosine)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    for stage, (steps, free_form) in enumerate(STAGES, 1):
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        start = time.monotonic()
        corpus = Corpus(SEED + stage, free_form)
        for step, (ids, weights) in enumerate(islice(batches(tokenizer, corpus), steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            loss = weighted_loss(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 100 == 0:
                seconds = time.monotonic() - start
                print(f"stage {stage} step {step + 1}/{steps} loss {loss.item():.3f} after {seconds:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write beside `folder`, then swap: an interrupted build leaves the old model whole."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    # Half the size on disk; the rounding costs nothing that the fine-tuning would notice.
    model.to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for file in fresh.iterdir():
        file.chmod(0o644)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=MODEL_PATH, help="folder to replace (default: the packaged one)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1; the last bits depend on it)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pretrain(model, tokenizer)
    save(model, tokenizer, arguments.output)
    print(f"{sum(p.numel() for p in model.parameters())} parameters in {arguments.output}")


if __name__ == "__main__":
    main()
