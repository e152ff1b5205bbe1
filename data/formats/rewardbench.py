"""RewardBench 1 and 2: pairs and sets of completions on which reward models are compared.

Sources: the cards of allenai/reward-bench and allenai/reward-bench-2.
"""

from dpo.data.format import Format
from dpo.data.parts import as_list, as_text, chosen_over, prompt_of, record
from dpo.data.read import Row
from dpo.data.records import Preference

_REASON = "RewardBench compares reward models: the score of one that has seen its rows says nothing"


def _pair(row: Row) -> Preference:
    chosen, rejected = (as_text(row.values.get(name), name) for name in ("chosen", "rejected"))
    return chosen_over(row, prompt_of(row.values), chosen, rejected)


def _best_of(row: Row) -> Preference:
    chosen, rejected = (
        [as_text(text, name) for text in as_list(row.values.get(name), name)] for name in ("chosen", "rejected")
    )
    scores = [1.0] * len(chosen) + [0.0] * len(rejected)
    return record(row, prompt_of(row.values), [*chosen, *rejected], scores)


REWARD_BENCH = Format(
    "RewardBench",
    "chosen is preferred to rejected",
    (("prompt",), ("chosen",), ("rejected",), ("chosen_model",), ("rejected_model",), ("subset",)),
    _pair,
    evaluation_only=_REASON,
)
REWARD_BENCH_2 = Format(
    "RewardBench 2",
    "every text in chosen is preferred to every text in rejected",
    (("prompt",), ("chosen",), ("rejected",), ("num_correct",), ("num_incorrect",)),
    _best_of,
    evaluation_only=_REASON,
)
