"""The embedded question set: what everyday things are and where they are found, in the Commonsense15K record format.

The tiny checkpoint in `MODEL_PATH` has read about every thing below (`ci/build_embedded_model.py`), but never a
question in this format. Fine-tuning on the questions about `TRAIN_THINGS` teaches the format; the questions about
`HELDOUT_THINGS`, which no training record mentions, measure what was learned.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from sora_hw.data.records import Record

MODEL_PATH = Path(__file__).parent / "embedded_model"
SEED = 20260101
OPTION_COUNTS = (2, 4)


@dataclass(frozen=True)
class Kind:
    """A kind of thing, the place where such things are found, and twelve of them."""

    name: str
    place: str
    things: tuple[str, ...]


def _kind(name: str, place: str, things: str) -> Kind:
    return Kind(name, place, tuple(things.split()))


KINDS = (
    _kind("bird", "forest", "robin sparrow raven finch crow hawk dove wren swallow heron magpie thrush"),
    _kind("fruit", "orchard", "plum pear cherry peach lemon grape mango banana melon fig lime quince"),
    _kind("tool", "workshop", "hammer saw drill wrench chisel mallet screwdriver clamp pickaxe spanner lathe crowbar"),
    _kind("garment", "wardrobe", "shirt coat skirt jacket sweater dress scarf vest glove sock hat cardigan"),
    _kind("vehicle", "garage", "car truck van bus tractor scooter motorbike lorry taxi tram bicycle jeep"),
    _kind("fish", "sea", "trout salmon carp pike cod herring tuna perch shark mackerel sardine haddock"),
    _kind("instrument", "concert", "violin flute drum trumpet piano guitar cello harp banjo trombone clarinet tuba"),
    _kind("vegetable", "garden", "carrot potato cabbage leek turnip radish pumpkin bean pea beetroot celery parsnip"),
    _kind("furniture", "house", "chair table bed sofa desk bench stool shelf cupboard dresser bookcase couch"),
    _kind(
        "insect", "meadow", "bee wasp beetle moth butterfly cricket grasshopper mosquito ladybird locust gnat hornet"
    ),
    _kind("dish", "kitchen", "cup plate bowl pan pot kettle jug mug saucer ladle teapot tray"),
    _kind("flower", "park", "rose tulip daisy lily poppy violet sunflower marigold daffodil pansy lavender jasmine"),
)
HELDOUT_THINGS = tuple(thing for kind in KINDS for thing in kind.things[3::4])
TRAIN_THINGS = tuple(thing for kind in KINDS for thing in kind.things if thing not in HELDOUT_THINGS)


@dataclass(frozen=True)
class Aspect:
    """One thing to know about a thing (`field` of its Kind), and three ways to ask for it."""

    field: str
    name_it: str
    pick_one: str
    true_or_false: str


ASPECTS = (
    Aspect(
        "name",
        "What kind of thing is a {thing}?",
        "Which of these is a kind of {answer}?",
        "is a {thing} a kind of {answer}?",
    ),
    Aspect(
        "place",
        "Where would you look for a {thing}?",
        "Which of these would you look for in the {answer}?",
        "would you look for a {thing} in the {answer}?",
    ),
)


def train_records() -> list[Record]:
    """Questions about `TRAIN_THINGS`: every thing is asked about in every form."""
    return _records(TRAIN_THINGS, "train")


def heldout_records() -> list[Record]:
    """Questions about `HELDOUT_THINGS`, in the same forms; no training record mentions any of these things."""
    return _records(HELDOUT_THINGS, "heldout")


def candidates(record: Record) -> list[str]:
    """The answer words that the record's own "Answer format:" line allows, in its order.

    Raises ValueError when the instruction has no such line.
    """
    _, marker, answer_format = record.instruction.rpartition("Answer format: ")
    if not marker:
        raise ValueError(f"record {record.id!r} has no 'Answer format:' line")
    return answer_format.strip().split("/")


def _records(things: tuple[str, ...], split: str) -> list[Record]:
    rng = random.Random(f"{SEED}-{split}")
    pairs = [(kind, thing) for kind in KINDS for thing in kind.things if thing in things]
    texts = []
    for aspect in ASPECTS:
        texts += _true_false_questions(rng, aspect, pairs)
        for count in OPTION_COUNTS:
            texts += _naming_questions(rng, aspect, pairs, count)
            texts += _picking_questions(rng, aspect, pairs, count)
    rng.shuffle(texts)
    return [
        Record(instruction, "", f"the correct answer is {answer}", answer, id=f"embedded/{split}/{index}")
        for index, (instruction, answer) in enumerate(texts)
    ]


def _true_false_questions(rng: random.Random, aspect: Aspect, pairs: list[tuple[Kind, str]]) -> list[tuple[str, str]]:
    texts = []
    for turn, (kind, thing) in _in_turn(rng, pairs):
        truth = turn % 2 == 0
        asked = kind if truth else rng.choice([other for other in KINDS if other is not kind])
        question = aspect.true_or_false.format(thing=thing, answer=getattr(asked, aspect.field))
        instruction = (
            f"Please answer the following question with true or false, question: {question}\n\n"
            "Answer format: true/false"
        )
        texts.append((instruction, "true" if truth else "false"))
    return texts


def _naming_questions(
    rng: random.Random, aspect: Aspect, pairs: list[tuple[Kind, str]], count: int
) -> list[tuple[str, str]]:
    """A thing is given; its kind or place is to be found among `count` options."""
    texts = []
    for turn, (kind, thing) in _in_turn(rng, pairs):
        others = rng.sample([other for other in KINDS if other is not kind], count - 1)
        options = [getattr(option, aspect.field) for option in others]
        options.insert(turn % count, getattr(kind, aspect.field))
        texts.append(_choice(aspect.name_it.format(thing=thing), options, turn % count))
    return texts


def _picking_questions(
    rng: random.Random, aspect: Aspect, pairs: list[tuple[Kind, str]], count: int
) -> list[tuple[str, str]]:
    """A kind or place is given; the thing that belongs to it is to be found among `count` things of the same split."""
    texts = []
    for turn, (kind, thing) in _in_turn(rng, pairs):
        options = rng.sample([other for other_kind, other in pairs if other_kind is not kind], count - 1)
        options.insert(turn % count, thing)
        texts.append(_choice(aspect.pick_one.format(answer=getattr(kind, aspect.field)), options, turn % count))
    return texts


def _in_turn(rng: random.Random, pairs: list[tuple[Kind, str]]) -> enumerate:
    """The right answer goes round with the turn, over a shuffled order: each is right equally often, unpredictably."""
    return enumerate(rng.sample(pairs, len(pairs)))


def _choice(question: str, options: list[str], position: int) -> tuple[str, str]:
    listed = " ".join(f"Answer{number}: {option}" for number, option in enumerate(options, 1))
    labels = [f"answer{number}" for number in range(1, len(options) + 1)]
    instruction = (
        f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {'/'.join(labels)}"
    )
    return instruction, labels[position]
