"""More records than memory should hold: on the disk they are the same, and so is what is made of them."""

import tempfile

import pytest

from sora_hw.data import dataset, spool
from sora_hw.data.dataset import LazySamples, checksum, draw, make_samples, split, tokenise
from sora_hw.data.embedded import MODEL_PATH, train_records
from sora_hw.data.glue import SentenceRecord
from sora_hw.data.records import Record
from sora_hw.data.spool import Spool, keep
from sora_hw.errors import DataError

RECORDS = train_records()[:60]
MAX_LENGTH = 72  # about half of the samples are longer


@pytest.fixture
def few(monkeypatch):
    """Ten records are as many as memory should hold."""
    monkeypatch.setattr(spool, "IN_MEMORY", 10)
    monkeypatch.setattr(dataset, "IN_MEMORY", 10)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.mark.parametrize(
    "records",
    [
        RECORDS,
        [Record("a\n\0", "", "ü\u2028\U0001f426", "", "\ud800")] * 11,
        [SentenceRecord("a", None, 1, "x"), SentenceRecord("a", "b", 2.5)] * 6,
    ],
)
def test_records_come_back_as_they_were(few, records):
    kept = keep(iter(records))
    assert isinstance(kept, Spool) and len(kept) == len(records)
    assert list(kept) == records
    assert kept[len(records) - 1] == records[-1]
    for beyond in (-1, len(records)):
        with pytest.raises(IndexError):
            kept[beyond]


def test_few_records_are_a_list(few):
    assert keep(iter(RECORDS[:10])) == RECORDS[:10]
    assert keep(iter([])) == []


def test_the_same_records_are_drawn_and_held_out(few):
    kept = keep(iter(RECORDS))
    assert checksum(kept) == checksum(RECORDS)
    for size in (5, 30, 60, None):
        drawn, wanted = draw(kept, size, seed=3), draw(RECORDS, size, seed=3)
        assert list(drawn) == list(wanted)
        parts = zip(split(drawn, 4, seed=3), split(wanted, 4, seed=3), strict=True)
        assert all(list(ours) == list(theirs) for ours, theirs in parts)


@pytest.mark.parametrize("learn", ["text", "answer"])
def test_samples_made_one_at_a_time_are_the_same(few, tokenizer, learn):
    def make(records):
        return tokenise(records, tokenizer, MAX_LENGTH, learn)

    wanted = make(RECORDS)
    made = make_samples(keep(iter(RECORDS)), MAX_LENGTH, make)
    assert isinstance(made, LazySamples) and len(made) == len(RECORDS)
    assert (made.truncated, made.left_out) == (None, None)
    assert (made.longest, made.largest_token) == (MAX_LENGTH, wanted.largest_token)
    places = {id: place for place, id in enumerate(wanted.ids)}
    teaches = [record.id in places for record in RECORDS]
    for index in range(len(RECORDS)):
        next_one = next(i % len(RECORDS) for i in range(index, 2 * len(RECORDS)) if teaches[i % len(RECORDS)])
        assert made[index] == wanted[places[RECORDS[next_one].id]]
    assert all(teaches) == (learn == "text"), "of some answers nothing remains"


def test_records_of_which_nothing_remains_are_refused(few, tokenizer):
    with pytest.raises(DataError, match="nothing to learn remains of the first 60 records at a maximum length of 2"):
        make_samples(keep(iter(RECORDS)), 2, lambda records: tokenise(records, tokenizer, 2, "answer"))


def test_a_disk_without_room_is_named(few, monkeypatch):
    def full(**options):
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"does not take it \(No space left on device\); name a folder with room by"):
        keep(iter(RECORDS))
