"""Over-optimisation is said where the numbers carry it, and nowhere else."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dpo.estimates import Estimate
from dpo.evaluation.overoptimisation import GOLD, overoptimised, past_best
from dpo.evaluation.records import START, Difference, Entry, Point

PROXY = "eval/proxy_reward"


def against_start(measure: str, value: float, half: float, real: bool) -> Difference:
    estimate = Estimate(value, value - half, value + half, 40)
    return Difference(measure, "ppo", START, estimate, 0.01, 0.02 if real else 0.4, real)


ROSE = against_start(PROXY, 1.2, 0.3, real=True)


def test_a_gold_reward_that_fell_while_the_proxy_rose_is_over_optimisation() -> None:
    assert overoptimised([ROSE], [against_start(GOLD, -0.2, 0.1, real=True)]) == [
        "ppo is over-optimised: it raised its reward model's score (+1.20, by itself +0.90 to +1.50; p = 0.02 "
        "corrected) and lowered the gold reward (-0.20, by itself -0.30 to -0.10; p = 0.02 corrected)."
    ]


def test_a_gold_reward_that_is_not_told_apart_may_be_one() -> None:
    (line,) = overoptimised([ROSE], [against_start(GOLD, 0.05, 0.1, real=False)])
    assert line.startswith("ppo may be over-optimised: it raised its reward model's score (+1.20")
    assert line.endswith(
        "is not told apart from the start in gold reward (+0.05, by itself -0.05 to +0.15; p = 0.4 corrected)."
    )


@pytest.mark.parametrize(
    ("proxy", "gold"),
    [
        (ROSE, against_start(GOLD, 0.3, 0.1, real=True)),
        (ROSE, against_start(GOLD, 0.3, 0.2, real=False)),  # by itself above 0: the correction alone hides it
        (replace(ROSE, real=False), against_start(GOLD, -0.2, 0.1, real=True)),
        (against_start(PROXY, -1.2, 0.3, real=True), against_start(GOLD, -0.2, 0.1, real=True)),
        (ROSE, replace(against_start(GOLD, -0.2, 0.1, real=True), first="dpo")),
    ],
    ids=["both rose", "gold may have risen", "noise", "both fell", "another entry"],
)
def test_anything_else_is_passed_over(proxy: Difference, gold: Difference) -> None:
    assert overoptimised([proxy], [gold]) == []


def entry(golds: Sequence[float], half: float, proxies: Sequence[float | None] = (), name: str = "ppo") -> Entry:
    """An entry of two seeds whose mean path is `golds`, sampled every 8 steps, the last one with its interval."""
    proxies = proxies or [None] * len(golds)
    seeds = {
        seed: [
            Point(8 * n, float(n * n), gold + shift, None if proxy is None else proxy + shift)
            for n, (gold, proxy) in enumerate(zip(golds, proxies, strict=True))
        ]
        for seed, shift in ((0, -0.01), (1, 0.01))
    }
    measures = {GOLD: Estimate(golds[-1], golds[-1] - half, golds[-1] + half, 40)}
    return Entry(name, "", (0, 1), {}, measures, {}, None, {}, seeds, {}, {}, {})


BEFORE = replace(entry([0.2], 0.08, name=START), seeds=(), frontier={})


def test_a_peak_on_the_way_is_said_with_its_numbers() -> None:
    """Two points on the way: z at 0.025 / 2 is 2.2414, at 0.025 1.9600; 2 ** 0.5 * 2.2414 / 1.9600 * 0.1 = 0.1617."""
    assert past_best(entry([0.2, 0.7, 0.6, 0.5], 0.1, [0.0, 1.0, 2.0, 3.0]), BEFORE) == [
        "ppo went past its best: its gold reward was 0.70 at step 8 (KL 1.0) and 0.50 at the end (KL 9.0), while noise "
        "alone would keep them within 0.16. Meanwhile its reward model's score went from 1.00 to 3.00."
    ]
    (line,) = past_best(entry([0.2, 0.7, 0.6, 0.5], 0.1), BEFORE)
    assert line.endswith("within 0.16.")


def test_a_peak_within_the_noise_is_none() -> None:
    assert past_best(entry([0.2, 0.66, 0.6, 0.5], 0.1), BEFORE) == []  # 0.16 lower, 0.1617 is noise
    wide = replace(BEFORE, measures={GOLD: Estimate(0.2, 0.05, 0.35, 40)})
    assert past_best(entry([0.2, 0.7, 0.6, 0.5], 0.1), wide) == []  # the end's narrow interval is not that of the peak


def test_without_intervals_or_points_on_the_way_nothing_is_said() -> None:
    peaked = entry([0.2, 0.9, 0.1], 0.05)
    assert len(past_best(peaked, BEFORE)) == 1
    assert past_best(peaked, replace(BEFORE, measures={})) == []
    assert past_best(replace(peaked, measures={GOLD: Estimate(0.1, 0.1, 0.1, 1)}), BEFORE) == []
    assert past_best(entry([0.9, 0.1], 0.05), BEFORE) == []  # from the start on: the difference tells it
    assert past_best(replace(peaked, frontier={}), BEFORE) == []


def test_noise_alone_is_rarely_taken_for_a_peak() -> None:
    """Prompts of one mean at every point, sampled independently, 5 points on the way: at most 2.5 % may be said."""
    rng = np.random.default_rng(0)
    said = 0
    for _ in range(400):
        golds = rng.normal(0.5, 0.4, (7, 40))
        half = 2.02 * golds[-1].std(ddof=1) / 40**0.5
        one = replace(entry(list(golds.mean(axis=1)), half))
        said += len(past_best(one, BEFORE))
    assert said <= 16
