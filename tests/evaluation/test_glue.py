"""GLUE's metrics against their formulas."""

import math

import numpy as np
import pytest

from sora_hw.data.glue import TASKS
from sora_hw.evaluation.glue import score

RNG = np.random.default_rng(0)


def logits_of(classes):
    return np.eye(2)[np.array(classes)] + 0.1


def test_accuracy():
    assert score(TASKS["rte"], logits_of([0, 1, 1, 0]), np.array([0, 1, 0, 0])) == {"accuracy": 0.75}


def test_matthews():
    predicted, gold = [1, 1, 1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1, 1, 0]
    tp, tn, fp, fn = 3, 3, 1, 1
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert score(TASKS["cola"], logits_of(predicted), np.array(gold))["matthews"] == pytest.approx(wanted)
    assert score(TASKS["cola"], logits_of([1] * 8), np.array(gold)) == {"matthews": 0.0}


def test_pearson():
    predicted, gold = RNG.normal(size=50).astype(np.float32), RNG.normal(size=50)
    x, y = predicted.astype(float) - predicted.astype(float).mean(), gold - gold.mean()
    wanted = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert score(TASKS["stsb"], predicted[:, None], gold)["pearson"] == pytest.approx(wanted)
    assert score(TASKS["stsb"], np.ones((50, 1)), gold) == {"pearson": 0.0}
