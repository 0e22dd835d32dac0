"""A base model held in 4 bits."""

import pytest

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")


def test_it_learns_on_a_packed_base(tmp_path, train):
    """The embedded model: the first loss is near the plain one's, and the loss falls."""
    steps = ["--max-steps", 12, "--global-batch", 8, "--validation-size", 0, "--warmup-steps", 2, "--dropout", 0]
    whole = train(tmp_path / "whole", 0, *steps, "--max-steps", 1)
    packed = train(tmp_path / "packed", 0, *steps, "--load-in-4bit")
    assert packed.manifest["profile"]["four_bit"] and not whole.manifest["profile"]["four_bit"]
    assert packed.losses[0] != whole.losses[0] and packed.losses[0] == pytest.approx(whole.losses[0], rel=0.1)
    assert packed.losses[-1] < packed.losses[0]
    assert packed.manifest["results"]["embedded_questions"]["after"] > 0.2, "the adapter is scored on the plain base"
