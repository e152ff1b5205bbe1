"""The embedded task, controlled sentiment: its files, and the settings that suit so short a training.

Answers of the model itself, preferences given by a known gold reward: the first experiment of the DPO paper
(arXiv:2305.18290, section 6.1), so that the TRUE reward of every objective is known.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import as_file, files
from typing import Any, Final

from dpo.settings import merged

PAIRS, PROMPTS = "pairs.jsonl", "eval_prompts.txt"

SETTINGS: Final[Mapping[str, Any]] = {
    "data": {"eval_share": 0.1, "max_length": 192},
    "evaluation": {
        "gold": "dpo.data.gold:sentiment",
        "max_prompts": 60,
        "samples_per_prompt": 2,
        "max_new_tokens": 40,
        "seed": 1,
    },
}
"""Settings of all runs on it."""

COMPLETIONS: Final = 512
"""Its budget: 32 optimiser steps of 8 pairs."""

RATES: Final[Mapping[str, float]] = {"dpo": 5e-4, "ipo": 5e-4, "kto": 2.5e-4, "bradleyterry": 5e-4, "ppo": 3e-4}
"""Learning rates for so few steps, by objective (docs/experiments.md); the recipes' are for hundreds."""

RATE_FACTOR: Final = 5.0
"""Multiplies the recipe's rate of every other objective there."""


@contextmanager
def embedded() -> Iterator[dict[str, Any]]:
    """Yield the settings of all runs on the task, its files' places among them, which hold while the context does."""
    folder = files("dpo.data") / "sentiment"
    with as_file(folder / PAIRS) as pairs, as_file(folder / PROMPTS) as prompts:
        yield merged(SETTINGS, {"data": {"train": str(pairs)}, "evaluation": {"prompts": str(prompts)}})
