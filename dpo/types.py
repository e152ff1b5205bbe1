"""The typed records that pass between the rooms of the house.

An objective reads one of the input records (`PairLogps`, `JudgementLogps`, `RankingScores`, `Rollout`) and returns a
`LossOutput`; it sees nothing else. Log-probs are natural logarithms (nats), summed over completion tokens: prompt and
padding excluded, the end-of-sequence token counted once. They are float32 or wider, because a sum near -3000 in
bfloat16 has a spacing of 16 nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs of each token of completions, one a row, for objectives that weigh tokens; padded on the right."""

    policy: Float[Tensor, "batch tokens"]
    reference: Float[Tensor, "batch tokens"] | None
    completion_mask: Bool[Tensor, "batch tokens"]
    """True = scored token; log-probs elsewhere are 0."""
    log_collision: Float[Tensor, "batch tokens"] | None = None
    """log of the sum over the vocabulary of the policy's squared probabilities where each token is predicted, without
    gradient: the expected log-prob's scale. None for objectives that do not ask for it."""


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of preference pairs: row i compares two completions of one prompt.

    The reference fields are None for objectives that need no reference. `preference` is P(chosen preferred), 0.5 to
    1, and None means 1 (a certain label). `weight` multiplies an example's loss, and None means 1.
    """

    policy_chosen: Float[Tensor, " batch"]
    policy_rejected: Float[Tensor, " batch"]
    reference_chosen: Float[Tensor, " batch"] | None
    reference_rejected: Float[Tensor, " batch"] | None
    chosen_length: Shaped[Tensor, " batch"]
    """Completion tokens, EOS included (>= 1)."""
    rejected_length: Shaped[Tensor, " batch"]
    preference: Float[Tensor, " batch"] | None = None
    weight: Float[Tensor, " batch"] | None = None
    chosen_tokens: TokenLogps | None = None
    """The same log-probs token by token, or None for objectives that do not ask for them."""
    rejected_tokens: TokenLogps | None = None
    mean_log_ratio: Float[Tensor, ""] | None = None
    """Mean log-ratio of all completions of the optimiser steps before this one, in nats, 0 in the first; a constant.
    None for objectives that do not ask for it."""


@dataclass(frozen=True)
class JudgementLogps:
    """Log-probs of single completions, each judged desirable or not.

    The mismatched fields score completions of OTHER prompts: KTO estimates its KL reference point from them. They are
    those of a whole optimiser step, of which this record may be one micro-batch, and an objective may use them as a
    mean alone. They are None for objectives that do not ask for them.
    """

    policy: Float[Tensor, " batch"]
    reference: Float[Tensor, " batch"] | None
    desirable: Bool[Tensor, " batch"]
    length: Shaped[Tensor, " batch"]
    """Completion tokens, EOS included (>= 1)."""
    policy_mismatched: Float[Tensor, " step"] | None
    reference_mismatched: Float[Tensor, " step"] | None
    weight: Float[Tensor, " batch"] | None = None
    mean_log_ratio: Float[Tensor, ""] | None = None
    """As in `PairLogps`."""


@dataclass(frozen=True)
class RankingScores:
    """Scalar scores of completions that people ranked, flat over completions; a prompt with its K completions is one
    example, and a pair is a ranking of two."""

    scores: Float[Tensor, " completions"]
    """What a reward model says of each completion; higher is better."""
    rank: Int[Tensor, " completions"]
    """Place among the completions of its prompt, from 0 for the best; equal places are ties."""
    prompt_index: Int[Tensor, " completions"]
    """Which example a completion belongs to, 0 to prompts - 1, never decreasing."""
    margin: Float[Tensor, " completions"] | None = None
    """How people rated each completion, on the scale of the data: the differences say by how much one is better.
    None where they only ranked them."""
    preference: Float[Tensor, " prompts"] | None = None
    """P(the better completion of a comparison is preferred), 0.5 to 1; None is 1."""
    weight: Float[Tensor, " prompts"] | None = None
    """Multiplies an example's loss; None is 1."""


@dataclass(frozen=True)
class Rollout:
    """Completions that the policy sampled, one a row, and what is known of their tokens; padded on the right.

    All log-probs are those at the temperature of sampling. Values outside `completion_mask` are 0.
    """

    policy: Float[Tensor, "batch tokens"]
    """Log-probs by the policy as it is now, in nats; the gradient's way in."""
    sampler: Float[Tensor, "batch tokens"]
    """Log-probs by the policy as it was when it wrote them; a constant."""
    completion_mask: Bool[Tensor, "batch tokens"]
    """True = sampled token, the end token included where the policy wrote it."""
    score: Float[Tensor, " batch"]
    """Reward of the whole completion, penalties included; a constant."""
    prompt_index: Int[Tensor, " batch"]
    """Completions of one prompt have the same number."""
    reference: Float[Tensor, "batch tokens"] | None = None
    """Log-probs by the reference; None for objectives that need none."""
    value: Float[Tensor, "batch tokens"] | None = None
    """What the value role, as it is now, expects of the return before each token is written; carries a gradient. None
    for objectives without that role."""
    sampler_value: Float[Tensor, "batch tokens"] | None = None
    """The same, as it was when the completions were sampled; a constant."""
    advantage: Float[Tensor, "batch tokens"] | None = None
    """How much better each token did than was expected: what `RolloutObjective.credit` finds; a constant."""
    value_target: Float[Tensor, "batch tokens"] | None = None
    """What `value` is fitted to, likewise."""
    tokens_per_completion: Float[Tensor, ""] | None = None
    """Mean length of the completions of the whole optimiser step, of which this record may be one micro-batch: means
    over tokens divide by it. None: that of this record."""
    demonstration: Float[Tensor, " batch"] | None = None
    """Log-prob, summed over its tokens, of a demonstration that goes with each row; carries a gradient. None for
    objectives that do not ask for them."""
    demonstration_length: Shaped[Tensor, " batch"] | None = None
    """Its completion tokens, EOS included (>= 1)."""


LossInput = PairLogps | JudgementLogps | RankingScores | Rollout


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns."""

    loss: Float[Tensor, ""]
    """The scalar to minimise: the mean of `losses`."""
    losses: Float[Tensor, " batch"]
    """Per example, in input order, with the example's weight applied."""
    rewards: Float[Tensor, "..."]
    """The rewards the loss compares, detached: (batch, 2) implicit ones of chosen and rejected for pairs, (batch,)
    for judgements, (completions,) scores for rankings, (batch,) scores for rollouts."""
    metrics: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Detached scalars; every name is defined in `dpo.metrics`."""
