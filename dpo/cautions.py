"""What is allowed, but seldom meant: said once, before a run begins."""

from collections.abc import Sequence

from dpo.data import Example
from dpo.losses import Objective

FEWEST_COUPLED = 8
"""Examples of an optimiser step below which an objective that sorts them is hardly another one than its pairwise form.

In a random order about one of n examples keeps its place, whatever n, and is compared with itself: from 8 on, no more
than an eighth of the step."""


def cautions(objective: Objective, examples: Sequence[Example], batch: int) -> list[str]:
    """Return what to warn of.

    Args:
        objective: what is trained.
        examples: all of training.
        batch: examples of one optimiser step.
    """
    name, found = type(objective).__name__, []
    labels = {example.desirable for example in examples} if objective.view == "judgements" else set()
    if len(labels) == 1:
        only = "desirable" if True in labels else "undesirable"
        found.append(
            f"{name}: all {len(examples)} training examples are {only}, expected both labels: nothing says what to "
            "move away from, and there is no accuracy. Add rows with the other label, or imitate the desirable ones "
            "with sft."
        )
    step = min(batch, len(examples))
    if objective.batch_coupled and step < FEWEST_COUPLED:
        found.append(
            f"{name}: an optimiser step holds {step} examples, expected {FEWEST_COUPLED} or more: it compares the "
            "examples of a step with each other. Raise loop.gradient_accumulation_steps, or take more data."
        )
    return found
