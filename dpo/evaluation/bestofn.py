"""Best-of-n without sampling n at a time: what the best of n answers earns, estimated from M >= n answers a prompt.

Of M answers every subset of n is as likely as any other, so that the mean over all subsets is unbiased, and of all
unbiased estimators from M answers it varies least. It takes a sort: the answer with the i-th lowest score is the best
of C(i - 1, n - 1) of the C(M, n) subsets. Papers: arXiv:2112.09332, appendix I; used in arXiv:2210.10760.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from dpo.estimates import Estimate, mean
from dpo.evaluation.samples import Spoken


@final
@dataclass(frozen=True)
class BestOfN:
    """What choosing the best of n answers gives."""

    n: int
    gold: Estimate
    """Expected gold reward of the chosen answer, over prompts."""
    score: Estimate
    """The same of the score that it is chosen by: the gold reward itself where no other is given."""
    kl_bound: float
    """`kl_bound(n)`, nats."""


def best_of(spoken: Spoken, n: int, score: Sequence[Sequence[float]] | None = None) -> BestOfN:
    """Return what the best of n answers earns, with intervals over prompts.

    Args:
        spoken: M answers to each prompt, M >= n, with their gold reward.
        n: answers to choose from.
        score: what they are chosen by, [prompt][answer]: a learned reward, say (None: the gold reward).

    Raises:
        ValueError: there is no gold reward, n is not from 1 to M, or there are not as many scores as answers.
    """
    gold = [[one.gold for one in row if one.gold is not None] for row in spoken.answers]
    if [len(row) for row in gold] != [len(row) for row in spoken.answers]:
        raise ValueError("best_of: got answers without a gold reward, expected one for each. Set evaluation.gold.")
    by = gold if score is None else score
    return BestOfN(
        n,
        mean([expected_best(scores, values, n) for scores, values in zip(by, gold, strict=True)]),
        mean([expected_best(scores, scores, n) for scores in by]),
        kl_bound(n),
    )


def expected_best(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Return the mean value of the highest-scored answer over all subsets of n answers.

    Answers of equal score are chosen alike often.

    Args:
        scores: what the answers to one prompt are chosen by.
        values: what is measured on them, in the same order.
        n: size of the subsets, 1 to the number of answers.

    Raises:
        ValueError: n is outside its range, or there are not as many scores as values.
    """
    total = len(scores)
    if total != len(values):
        raise ValueError(f"expected_best: got {total} scores of {len(values)} values, expected one for each")
    if not 1 <= n <= total:
        raise ValueError(f"expected_best: got n = {n} of {total} answers, expected 1 <= n <= {total}. Sample more.")
    _, group, size = np.unique(np.asarray(scores, dtype=float), return_inverse=True, return_counts=True)
    ranked = (np.bincount(group, values) / size)[np.sort(group)]
    wins = [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]  # i others score lower
    return float(ranked @ np.asarray(wins))


def kl_bound(n: int) -> float:
    """Return log n - (n - 1) / n, nats: how far choosing among n answers moves the policy (arXiv:2009.01325, app. G.3).

    The KL of best-of-n to the policy that is sampled, where every single answer is improbable, and an upper bound of it
    in general (arXiv:2401.01879): a policy that often says the same is moved less.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"kl_bound: got n = {n}, expected n >= 1")
    return math.log(n) - (n - 1) / n
