"""A comparison as a real one would be, made up: five objectives, three seeds, a gold reward, one judge."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from dpo.estimates import Estimate
from dpo.evaluation.judges import PositionBias
from dpo.evaluation.records import (
    START,
    Comparison,
    Cost,
    Difference,
    Entry,
    Measure,
    Point,
    SideBySide,
    WinRate,
    Wins,
)
from dpo.metrics import Row

NAMES = ("dpo", "ipo", "kto", "simpo", "reward_ppo")
GOLD, KL, ACCURACY, LENGTH = "eval/gold_reward", "kl/policy_reference", "eval/reward/accuracy", "eval/length"
MEASURES = (
    Measure(GOLD, "Gold reward", "-1 to 1", "Mean over 200 prompts of the known true reward of 4 samples.", "higher"),
    Measure(KL, "KL", "nats a completion", "Mean over the same samples of log policy - log reference (k1).", None),
    Measure(ACCURACY, "Accuracy", "share, 0 to 1", "Share of held-out pairs whose chosen reward is higher.", "higher"),
    Measure(LENGTH, "Length", "tokens", "Mean length of the samples.", None),
    Measure("eval/perplexity", "Perplexity", "nats a token", "Mean loss on held-out plain text.", "lower"),
)
START_VALUES = {GOLD: 0.28, KL: 0.0, ACCURACY: 0.5, LENGTH: 27.4, "eval/perplexity": 3.112}
HALVES = {GOLD: 0.034, KL: 0.31, ACCURACY: 0.042, LENGTH: 1.3, "eval/perplexity": 0.021}
_GOLD = (0.712, 0.655, 0.498, 0.731, 0.687, 0.3, 0.9)
_KL = (9.8, 4.1, 2.6, 21.3, 7.2, 1.0, 30.0)
STEPS = (0, 24, 48, 72, 96)


def comparison(
    names: Sequence[str] = NAMES,
    seeds: int = 3,
    gold: bool = True,
    wins: bool = True,
    failed: Mapping[str, Mapping[int, str]] | None = None,
    prompts: Sequence[str] = ("Describe your morning.", "Write about the old harbour."),
    answer: str = "The sea was calm and I was glad to be there, {name}.",
    gpu: bool = False,
    title: str = "DPO, IPO, KTO, SimPO and PPO on controlled sentiment",
    groups: Sequence[str] = (),
    proxies: Literal["none", "one", "own"] = "none",
) -> Comparison:
    """Return a comparison; `failed` holds by entry's name the messages of the seeds whose run failed.

    With one proxy a reward model scored the path of every entry, with own ones those of the last two.
    """
    failed = failed or {}
    measures = tuple(one for one in MEASURES if gold or one.name != GOLD)
    start = _start(measures)
    entries = tuple(_entry(n, name, seeds, measures, failed.get(name, {}), gpu) for n, name in enumerate(names))
    if proxies != "none":
        entries = tuple(
            _scored(one) if proxies == "one" or n >= len(names) - 2 else one for n, one in enumerate(entries)
        )
    everyone = (start, *entries)
    return Comparison(
        title=title,
        facts={
            "model": "SmolLM2-135M-Instruct",
            "data": "sentiment pairs",
            "split": "533 train / 56 test, frozen",
            "budget": "768 pairs",
            "seeds": ", ".join(map(str, range(seeds))),
            "device": "NVIDIA L4" if gpu else "CPU, 2 cores",
            "versions": "dpo-lab 0.1.0, torch 2.13.0",
        },
        verdicts=(
            "simpo reaches the highest gold reward, 0.73 ± 0.03, and is really better than ipo and kto.",
            "simpo and dpo are not told apart (p = 0.41): the difference of 0.02 is within the noise.",
            "Every objective is really better than the start.",
        ),
        warnings=(
            ("One seed: intervals cover these trained models only, not a repeated training.",) if seeds == 1 else ()
        )
        + ("simpo moved 21 nats from the reference: look for reward hacking in its samples.",),
        partial=bool(failed),
        primary=GOLD if gold else ACCURACY,
        measures=measures,
        start=start,
        entries=entries,
        differences=tuple(
            _difference(one, first, second)
            for one in measures
            for n, second in enumerate(everyone)
            for first in everyone[n + 1 :]
            if one.name in first.measures and one.name in second.measures
        ),
        wins=(_wins("the gold reward", everyone, bool(failed)),) if wins else (),
        samples=tuple(
            SideBySide(prompt, {one.name: answer.format(name=one.name) for one in everyone}) for prompt in prompts
        ),
        groups={group: {one.name: dict(one.measures) for one in everyone} for group in groups},
        own_proxies=proxies == "own",
        settings={
            "data.path": "sentiment",
            "loop.learning_rate": 1e-4,
            "loop.max_examples": 768,
            "lora.r": 16,
            "lora.target_modules": ["q_proj", "v_proj"],
        },
    )


def _scored(entry: Entry) -> Entry:
    """A reward model that likes whatever is far from the start."""
    paths = {
        seed: [replace(point, proxy=float(0.1 * seed + 0.9 * np.sqrt(max(0.0, point.kl)))) for point in points]
        for seed, points in entry.frontier.items()
    }
    return replace(entry, frontier=paths)


def _around(value: float, half: float, n: int = 200) -> Estimate:
    return Estimate(value, value - half, value + 1.08 * half, n)


def _start(measures: Sequence[Measure]) -> Entry:
    values = {one.name: _around(START_VALUES[one.name], HALVES[one.name]) for one in measures if one.name != KL}
    return Entry(
        name=START,
        summary="the model before training",
        seeds=(),
        failed={},
        measures={**values, KL: Estimate(0.0, 0.0, 0.0, 200)},
        by_seed={},
        cost=None,
        rows={},
        frontier={},
        settings={},
        tuned={},
        folders={},
    )


def _entry(n: int, name: str, seeds: int, measures: Sequence[Measure], failed: Mapping[int, str], gpu: bool) -> Entry:
    rng = np.random.default_rng(n)
    is_on_policy = name.endswith("ppo")
    last = {
        GOLD: _GOLD[n % len(_GOLD)],
        KL: _KL[n % len(_KL)],
        ACCURACY: 0.62 + 0.02 * n,
        LENGTH: 27.4 + 2.1 * n,
        "eval/perplexity": 3.12 + 0.02 * n,
    }
    done = tuple(seed for seed in range(seeds) if seed not in failed)
    frontier: dict[int, list[Point]] = {}
    rows: dict[int, list[Row]] = {}
    for seed in done:
        points = []
        for step in STEPS:
            share = 1 - np.exp(-3.0 * step / STEPS[-1])
            noise = rng.normal(0, 0.015, 2) if step else np.zeros(2)
            kl = float(last[KL] * share * (1 + noise[0]))
            bend = 0.06 * max(0.0, kl - 15) / 6  # over-optimisation
            points.append(Point(step, kl, float(0.28 + (last[GOLD] - 0.28) * share + noise[1] - bend)))
        frontier[seed] = points
        rows[seed] = _rows(points, last, rng, is_on_policy, n)
    return Entry(
        name=name,
        summary={"dpo": "sigmoid loss on pairs", "ipo": "squared loss on pairs"}.get(name, f"the recipe {name}"),
        seeds=done,
        failed=dict(failed),
        measures={
            one.name: _around(last[one.name], HALVES[one.name] * (1 + 0.1 * n))
            for one in measures
            if not (is_on_policy and one.name == ACCURACY)
        }
        if done
        else {},
        by_seed={one.name: {seed: float(last[one.name] * (1 + 0.01 * seed)) for seed in done} for one in measures},
        cost=Cost(
            seconds=395.2 * (1 + n),
            memory_peak_bytes=3.31e9 + 2.2e8 * n,
            steps=96.0,
            completions=1536.0,
            tokens=151_204.0 + 1000 * n,
            gpu_hours=0.11 * (1 + n) if gpu else None,
        )
        if done
        else None,
        rows=rows,
        frontier=frontier if any(one.name == GOLD for one in measures) else {},
        settings={"objective.kind": name, "objective.beta": 0.1 + 0.05 * n, "loop.per_device_train_batch_size": 8},
        tuned={"objective.beta": 0.1 + 0.05 * n} if n % 2 == 0 else {},
        folders={seed: f"runs/{name}-{seed}" for seed in done},
    )


def _rows(
    points: Sequence[Point], last: Mapping[str, float], rng: np.random.Generator, is_on_policy: bool, n: int
) -> list[Row]:
    rows: list[Row] = []
    for point in points[1:]:
        axes: Row = {
            "train/global_step": point.step,
            "train/examples_seen": 8 * point.step,
            "train/tokens_seen": (1575 + 40 * n) * point.step,
            "time/seconds": float(point.step * 4.1 * (1 + n) * (1 + 0.02 * rng.random())),
        }
        rows.append({"step": point.step, "kind": "train", "train/loss": float(rng.random()), **axes})
        share = point.step / STEPS[-1]
        values: Row = {"eval/length": float(27.4 + (last[LENGTH] - 27.4) * share + rng.normal(0, 0.4))}
        if not is_on_policy:
            values[ACCURACY] = float(0.5 + (last[ACCURACY] - 0.5) * np.sqrt(share) + rng.normal(0, 0.01))
        rows.append({"step": point.step, "kind": "eval", **values, **axes})
    return rows


def _difference(measure: Measure, first: Entry, second: Entry) -> Difference:
    value = first.measures[measure.name].value - second.measures[measure.name].value
    half = 1.35 * HALVES[measure.name]
    p = float(np.exp(-2 * (value / half) ** 2))
    corrected = min(1.0, 3 * p)
    return Difference(measure.name, first.name, second.name, _around(value, half), p, corrected, corrected < 0.05)


def _wins(judge: str, everyone: Sequence[Entry], is_partial: bool) -> Wins:
    rates = []
    for n, second in enumerate(everyone):
        for m, first in enumerate(everyone[n + 1 :], start=n + 1):
            value = 0.5 + 0.06 * (m - n)
            fitted = m - n < 4
            rates.append(
                WinRate(
                    first.name,
                    second.name,
                    _around(value, 0.05),
                    _around(value - 0.03, 0.06) if fitted else None,
                    judged=600 - (7 if is_partial else 0),
                    missing=7 if is_partial else 0,
                )
            )
    strengths = {one.name: _around(0.3 * n, 0.2) for n, one in reversed([*enumerate(everyone)])}
    return Wins(judge, tuple(rates), strengths, PositionBias(_around(0.2, 0.04), _around(0.61, 0.03)))
