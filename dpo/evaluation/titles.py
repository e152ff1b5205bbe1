"""The measures that a comparison can hold: their names in the ledger, and what they are called before readers."""

from collections.abc import Mapping

from dpo.evaluation.probes import CHOICES, FLIPS, HARNESS, SHIFT, TEXT
from dpo.evaluation.records import Measure

GOLD, PROXY, ACCURACY, MARGIN, KL, LENGTH = (
    "eval/gold_reward",
    "eval/proxy_reward",
    "eval/pair/accuracy",
    "eval/pair/margin",
    "kl/policy_reference",
    "eval/length",
)


DISTINCT, SELF_BLEU = "eval/distinct_2", "eval/self_bleu"


TITLES: Mapping[str, str] = {
    GOLD: "gold reward",
    PROXY: "reward model",
    ACCURACY: "pair accuracy",
    MARGIN: "pair margin",
    KL: "KL to start",
    LENGTH: "length",
    DISTINCT: "distinct bigrams",
    SELF_BLEU: "self-BLEU",
    CHOICES: "right choices",
    FLIPS: "sycophantic flips",
    SHIFT: "sycophantic shift",
    TEXT: "plain text",
    HARNESS: "lm-eval",
}
"""The measures of a comparison, in the order of its table."""


BY_GOLD = "gold reward"
"""Name of the judge that the gold reward is."""


BY_PROXY = "reward model"
"""Likewise, where one reward model scored all answers."""


OWN_PROXY = Measure(
    PROXY,
    "own reward model",
    "own scale",
    "Mean over the prompts of what the reward model that an entry was trained on says of its answers. Each entry has "
    "its own, on a scale of its own: nothing is compared between them.",
    None,
)
"""What the reward model's measure is where there is not one for all."""
