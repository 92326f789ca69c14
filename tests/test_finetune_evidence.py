"""Scores agree with reference implementations; intervals hold what they should."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from finetune.evidence import interval, macro_f1, score, wilson


def test_wilson_interval_of_a_published_example() -> None:
    # Newcombe 1998, table I: 81 of 263 has the score interval (0.2553, 0.3662).
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == pytest.approx(1.0)


def test_macro_f1_is_scikit_learns() -> None:
    draw = np.random.Generator(np.random.Philox(0))
    labels, predictions = draw.integers(0, 5, 200), draw.integers(0, 6, 200)
    assert macro_f1(predictions, labels) == pytest.approx(f1_score(labels, predictions, average="macro"))


def test_one_seed_has_wilsons_interval_and_several_cover_both_chances() -> None:
    draw = np.random.Generator(np.random.Philox(0))
    alike = np.repeat(draw.random((1, 400)) < 0.7, 3, axis=0)
    assert interval(alike[:1]) == wilson(int(alike[0].sum()), 400)
    low, high = interval(alike)
    assert low < alike.mean() < high
    # Seeds that agree leave the items' chance alone; seeds that differ widen the interval.
    assert (low, high) == pytest.approx(wilson(int(alike[0].sum()), 400), abs=0.01)
    apart = np.stack([draw.random(400) < share for share in (0.5, 0.7, 0.9)])
    wide = interval(apart)
    assert wide[1] - wide[0] > 2 * (high - low)
    assert interval(apart) == wide


def test_score_counts() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5]], dtype=np.float32)
    judged = score(probabilities, np.array([0, 0, 1]))
    assert list(judged.predictions) == [0, 1, 0]
    assert judged.accuracy == pytest.approx(1 / 3)
