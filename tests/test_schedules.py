"""Laws of schedules."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.optimizer_settings import AdamWConfig
from pretrain.pace import Pace
from pretrain.schedules import (
    Shape,
    cosine,
    linear,
    warmup_constant,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
    warmup_steps,
)

SHARE = st.floats(0, 1)


@given(SHARE, SHARE, SHARE)
def test_warmup_cosine_stays_between_its_ends(progress: float, warmup: float, final: float) -> None:
    assert -1e-12 <= warmup_cosine(progress, 1.0, warmup, final) <= 1.0 + 1e-12


@given(st.floats(0.01, 0.99), SHARE, SHARE, SHARE)
def test_warmup_cosine_rises_then_falls(warmup: float, final: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    first, second = (warmup_cosine(x, 1.0, warmup, final) for x in (low, high))
    if high <= warmup:
        assert first <= second + 1e-12
    if low >= warmup:
        assert second <= first + 1e-12


@given(st.floats(0.01, 0.99), SHARE)
def test_warmup_cosine_meets_its_marks(warmup: float, final: float) -> None:
    assert warmup_cosine(0.0, 2.0, warmup, final) == 0.0
    assert warmup_cosine(warmup, 2.0, warmup, final) == pytest.approx(2.0)
    assert warmup_cosine((1 + warmup) / 2, 2.0, warmup, final) == pytest.approx(1.0 + final / 2)
    assert warmup_cosine(1.0, 2.0, warmup, final) == pytest.approx(final)


def test_no_warmup_starts_at_the_peak_and_all_warmup_ends_there() -> None:
    assert warmup_cosine(0.0, 3.0, 0.0) == 3.0
    assert warmup_cosine(0.5, 3.0, 1.0) == 1.5


@given(st.floats(0.01, 0.4), st.floats(0.05, 0.5), SHARE, st.sampled_from(["sqrt", "linear"]))
def test_warmup_stable_decay_is_level_between_its_ends(warmup: float, decay: float, final: float, shape: Shape) -> None:
    at = [warmup_stable_decay(x, 2.0, warmup, decay, 2.0 * final, shape) for x in (0.0, warmup, 1.0 - decay, 1.0)]
    assert at == pytest.approx([0.0, 2.0, 2.0, 2.0 * final])
    assert warmup_stable_decay((warmup + 1.0 - decay) / 2, 2.0, warmup, decay, final, shape) == 2.0
    falling = [warmup_stable_decay(1.0 - decay * x, 2.0, warmup, decay, 0.0, shape) for x in (0.75, 0.5, 0.25)]
    assert falling == pytest.approx([2 - 2 * (x**0.5 if shape == "sqrt" else x) for x in (0.25, 0.5, 0.75)])


@given(st.floats(0.01, 0.99), SHARE)
def test_the_linear_and_the_level_schedule_meet_their_marks(warmup: float, final: float) -> None:
    middle = (1 + warmup) / 2
    assert [warmup_linear(x, 2.0, warmup, final) for x in (0.0, warmup, middle, 1.0)] == pytest.approx(
        [0.0, 2.0, 1.0 + final / 2, final]
    )
    assert [warmup_constant(x, 2.0, warmup) for x in (0.0, warmup / 2, warmup, 1.0)] == pytest.approx([0, 1, 2, 2])


def test_steps_multiply_at_their_milestones() -> None:
    rates = [warmup_steps(x, 3.0, 0.1, [0.5, 0.75], 0.1) for x in (0.05, 0.1, 0.49, 0.5, 0.74, 0.75, 1.0)]
    assert rates == pytest.approx([1.5, 3.0, 3.0, 0.3, 0.3, 0.03, 0.03])


@given(SHARE, st.floats(-3, 3), st.floats(-3, 3))
def test_a_cosine_and_a_line_stay_between_their_ends(progress: float, start: float, end: float) -> None:
    low, high = sorted((start, end))
    for value in (cosine(progress, start, end), linear(progress, start, end), linear(progress, start, end, 0.3)):
        assert low - 1e-9 <= value <= high + 1e-9
    assert (cosine(0, start, end), cosine(1, start, end)) == pytest.approx((start, end))
    assert linear(0.3, start, end, 0.3) == linear(0.9, start, end, 0.3) == pytest.approx(end)
    assert linear(0.0, start, end, 0.0) == end


def test_a_teacher_s_momentum_rises_as_in_byol() -> None:
    # 1 - (1 - tau) * (cos(pi k / K) + 1) / 2, section 3.2.
    for progress in (0.0, 0.2, 0.7, 1.0):
        paper = 1 - (1 - 0.996) * (math.cos(math.pi * progress) + 1) / 2
        assert cosine(progress, 0.996, 1.0) == pytest.approx(paper)


@pytest.mark.parametrize(("rule", "ratio"), [("none", 1.0), ("linear", 16.0), ("sqrt", 4.0)])
def test_the_rate_follows_the_batch_by_its_rule(rule: str, ratio: float) -> None:
    config = AdamWConfig.model_validate({"lr": 1.5e-4, "lr_scaling": rule, "warmup": 0.0, "schedule": "constant"})
    assert config.rate(0.5, 4096) == pytest.approx(1.5e-4 * ratio)
    assert config.rate(0.5, 256) == pytest.approx(1.5e-4)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant", "linear", "step"])
def test_every_schedule_starts_at_nothing_and_reaches_the_peak(schedule: str) -> None:
    config = AdamWConfig.model_validate({"lr": 2.0, "warmup": 0.1, "schedule": schedule, "final": 0.25})
    rates = [config.rate(step / 100, 1) for step in range(101)]
    assert (rates[0], max(rates)) == (0.0, 2.0)
    ends = {"cosine": 0.5, "linear": 0.5, "wsd": 0.5, "constant": 2.0, "step": 0.02}
    assert rates[-1] == pytest.approx(ends[schedule])


def test_weight_decay_moves_by_half_a_cosine_or_stays() -> None:
    moving = AdamWConfig(weight_decay=0.04, weight_decay_end=0.4)
    assert [moving.decay_at(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.04, 0.22, 0.4])
    assert AdamWConfig(weight_decay=0.3).decay_at(0.7) == 0.3


def test_pace_looks_at_recent_steps_only() -> None:
    pace = Pace(window=4)
    assert (pace.rate, pace.waiting) == (0.0, 0.0)
    for seconds in [100.0] + [0.5] * 4:
        pace.add(seconds, waited=seconds / 5)
    assert pace.rate == pytest.approx(2.0)
    assert pace.waiting == pytest.approx(0.2)
