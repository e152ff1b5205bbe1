"""Over-optimisation in words: where a policy pleases a reward model, the proxy, and not what it stands for, the gold.

Paper: Gao et al. 2023, arXiv:2210.10760. Whoever optimises against a learned reward raises it all along, while the true
one rises, turns and falls.
"""

import math
from collections.abc import Mapping, Sequence

from scipy import stats

from dpo.estimates import LEVEL
from dpo.evaluation.records import Difference, Entry, Point
from dpo.evaluation.titles import GOLD


def overoptimised(proxies: Sequence[Difference], golds: Sequence[Difference]) -> list[str]:
    """Say which entries really raised the proxy above the start's, and the gold reward not.

    Nothing is said where the gold reward's interval by itself lies above 0, though the corrected test may not call that
    real.

    Args:
        proxies: entries against the start, paired by prompts, in the reward model's score.
        golds: the same in the gold reward.
    """
    found = []
    by_entry = {one.first: one for one in golds}
    for one in proxies:
        gold = by_entry.get(one.first)
        if gold is None or not one.real or one.value.value <= 0 or gold.value.low > 0:
            continue
        raised = f"raised its reward model's score ({one.interval}; {one.chance})"
        if gold.real:
            found.append(
                f"{one.first} is over-optimised: it {raised} and lowered the gold reward ({gold.interval}; "
                f"{gold.chance})."
            )
        else:
            found.append(
                f"{one.first} may be over-optimised: it {raised}, and is not told apart from the start in gold reward "
                f"({gold.interval}; {gold.chance})."
            )
    return found


def past_best(entry: Entry, start: Entry) -> list[str]:
    """Say where an entry's gold reward stood really higher on the way than at the end, if it did.

    Of a point on the way the mean alone is recorded. Its interval is taken to be as wide as the wider one of those of
    start and end, and the two means to be independent, though they are over the same prompts. The best of several
    points is chosen, for which the interval is widened (Bonferroni).
    """
    before, after = start.measures.get(GOLD), entry.measures.get(GOLD)
    path = _mean_path(entry.frontier)
    on_the_way = [one for one in path[:-1] if one.step > 0]
    if before is None or after is None or min(before.n, after.n) < 2 or not on_the_way:
        return []
    best, last = max(on_the_way, key=lambda one: one.reward), path[-1]
    tail = (1 - LEVEL) / 2
    widened = float(stats.norm.isf(tail / len(on_the_way)) / stats.norm.isf(tail))
    noise = math.sqrt(2) * widened * max(before.half_width, after.half_width)
    if not best.reward - last.reward > noise:
        return []
    scored = best.proxy is not None and last.proxy is not None
    proxy = f" Meanwhile its reward model's score went from {best.proxy:.2f} to {last.proxy:.2f}." if scored else ""
    return [
        f"{entry.name} went past its best: its gold reward was {best.reward:.2f} at step {best.step} "
        f"(KL {best.kl:.1f}) and {last.reward:.2f} at the end (KL {last.kl:.1f}), while noise alone would keep them "
        f"within {noise:.2f}.{proxy}"
    ]


def _mean_path(paths: Mapping[int, Sequence[Point]]) -> list[Point]:
    """Return the mean over seeds of every point that all of them have, in the order of training."""
    by_step = [{one.step: one for one in points} for points in paths.values()]
    common = sorted(set.intersection(*(set(one) for one in by_step))) if by_step else []
    found = []
    for step in common:
        points = [one[step] for one in by_step]
        proxies = [one.proxy for one in points if one.proxy is not None]
        found.append(
            Point(
                step,
                sum(one.kl for one in points) / len(points),
                sum(one.reward for one in points) / len(points),
                sum(proxies) / len(proxies) if len(proxies) == len(points) else None,
            )
        )
    return found
