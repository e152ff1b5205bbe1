"""What objectives share: log-ratios, soft labels, and the one way from per-example losses to a `LossOutput`."""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.types import JudgementLogps, LossOutput, PairLogps, RankingScores, Rollout

T = TypeVar("T")


def log_ratio(
    policy: Float[Tensor, " batch"], reference: Float[Tensor, " batch"] | None, name: str
) -> Float[Tensor, " batch"]:
    """Return log(policy / reference) of each completion in nats, without a gradient into the reference.

    Raises:
        ValueError: there is no reference; `name` says which field of the record is missing.
    """
    if reference is None:
        raise ValueError(
            f"{name} must hold the reference policy's log-probs, got None: score the batch with the reference, "
            "or choose an objective whose needs_reference is False"
        )
    return policy - reference.detach()


def log_ratios(logps: PairLogps) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return log(policy / reference) of the chosen and of the rejected completions, as `log_ratio` does."""
    return (
        log_ratio(logps.policy_chosen, logps.reference_chosen, "PairLogps.reference_chosen"),
        log_ratio(logps.policy_rejected, logps.reference_rejected, "PairLogps.reference_rejected"),
    )


def require_field(value: T | None, name: str, need: str) -> T:
    """Return an optional field of a record.

    Raises:
        ValueError: it is absent; `name` says which, `need` the attribute of the objective that asks for it.
    """
    if value is None:
        raise ValueError(f"{name} must hold values, got None: score the batch as {need} asks")
    return value


def log1mexp(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return log(1 - exp(x)) for x < 0, exact to rounding near 0 and far from it (Maechler 2012).

    The branch not taken is kept away from its singularity: a gradient through `where` would be NaN otherwise.
    """
    near = x > -math.log(2)
    far = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(far)))


def expected_loss(
    logps: PairLogps, as_labelled: Float[Tensor, " batch"], reversed_label: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return each pair's loss in expectation over its label: p * as_labelled + (1 - p) * reversed_label.

    p is `logps.preference`, the probability that the chosen completion is the preferred one; None means 1.
    """
    if logps.preference is None:
        return as_labelled
    return logps.preference * as_labelled + (1 - logps.preference) * reversed_label


def logistic_loss(logps: PairLogps, z: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return each pair's -p log σ(z) - (1 - p) log σ(-z), p as in `expected_loss`; least at z = logit p."""
    return expected_loss(logps, -logsigmoid(z), -logsigmoid(-z))


def pair_output(logps: PairLogps, losses: Float[Tensor, " batch"], rewards: Float[Tensor, "batch 2"]) -> LossOutput:
    """Weight and average the losses of pairs, and read the metrics off their rewards (chosen, rejected).

    A tie counts 1/2 in the accuracy, and no margin is too small to count. In the first step, policy and reference
    differ by rounding (and dropout) alone; its sign is as often right as wrong, so that the accuracy scatters around
    1/2, with deviation 1 / (2 sqrt(pairs)). No threshold could tell such margins from real ones: they reach from 1e-8
    in float32 to 1e-2 in bfloat16, where those of trained policies begin.
    """
    rewards = rewards.detach()
    margin = rewards[:, 0] - rewards[:, 1]
    metrics = _side("chosen", rewards[:, 0], logps.policy_chosen, logps.chosen_length)
    metrics |= _side("rejected", rewards[:, 1], logps.policy_rejected, logps.rejected_length)
    metrics |= {"reward/margin": margin.mean(), "reward/accuracy": (margin.sign() + 1).mean() / 2}  # a tie: 1/2
    return _output(losses, logps.weight, rewards, metrics)


def judgement_output(
    logps: JudgementLogps,
    losses: Float[Tensor, " batch"],
    rewards: Float[Tensor, " batch"],
    metrics: Mapping[str, Float[Tensor, ""]],
) -> LossOutput:
    """Weight and average the losses of judgements, and read the metrics off their rewards.

    The desirable ones take the name "chosen", the others "rejected". A name is absent where the batch holds no such
    label; margin and accuracy are there only beside both. `metrics` are the objective's own, already detached.
    """
    rewards = rewards.detach()
    found = dict(metrics)
    sides = {"chosen": logps.desirable, "rejected": ~logps.desirable}
    for name, side in sides.items():
        if side.any():
            found |= _side(name, rewards[side], logps.policy[side], logps.length[side])
    if all(side.any() for side in sides.values()):
        found["reward/margin"] = found["reward/chosen"] - found["reward/rejected"]
        found["reward/accuracy"] = _outranking(rewards, logps.desirable)
    return _output(losses, logps.weight, rewards, found)


def demonstration_output(
    logps: JudgementLogps, losses: Float[Tensor, " batch"], rewards: Float[Tensor, " batch"]
) -> LossOutput:
    """Weight and average the losses of demonstrations; without a second side there is no reward to compare."""
    found = _side("chosen", rewards, logps.policy, logps.length)
    del found["reward/chosen"]
    return _output(losses, logps.weight, rewards.detach(), found)


def ranking_output(scores: RankingScores, losses: Float[Tensor, " prompts"]) -> LossOutput:
    """Weight and average the losses of rankings, and read the metrics off the scores.

    "chosen" is each prompt's best completion, "rejected" its worst; ties at either end are averaged. The accuracy is
    over all comparisons of unequal rank, a tie of scores counting 1/2, and each prompt weighs the same.
    """
    rewards = scores.scores.detach()
    members = scores.prompt_index == torch.arange(len(losses), device=rewards.device).unsqueeze(1)
    rank = scores.rank.expand_as(members)
    best = members & (rank == rank.masked_fill(~members, len(rewards)).amin(1, keepdim=True))
    worst = members & (rank == rank.masked_fill(~members, -1).amax(1, keepdim=True))
    chosen, rejected = ((rewards * side).sum(1) / side.sum(1) for side in (best, worst))
    first, second = comparisons(scores)
    right = ((rewards[first] - rewards[second]).sign() + 1) / 2
    index = scores.prompt_index[first]
    total, count = (right.new_zeros(len(losses)).index_add(0, index, one) for one in (right, torch.ones_like(right)))
    compared = count > 0
    metrics = {
        "reward/chosen": chosen.mean(),
        "reward/rejected": rejected.mean(),
        "reward/margin": (chosen - rejected).mean(),
        "reward/accuracy": (total[compared] / count[compared]).mean(),
    }
    return _output(losses, scores.weight, rewards, metrics)


def comparisons(scores: RankingScores) -> tuple[Int[Tensor, " comparisons"], Int[Tensor, " comparisons"]]:
    """Return, for every comparison within a prompt, the indices of the better completion and of the worse.

    Completions of equal rank are not compared.
    """
    same = scores.prompt_index.unsqueeze(1) == scores.prompt_index
    better, worse = (same & (scores.rank.unsqueeze(1) < scores.rank)).nonzero().unbind(1)
    return better, worse


def rollout_output(
    rollout: Rollout, losses: Float[Tensor, " batch"], metrics: Mapping[str, Float[Tensor, ""]]
) -> LossOutput:
    """Average the losses of sampled completions; `metrics` are the objective's own, already detached."""
    return _output(losses, None, rollout.score, metrics)


def masked_mean(values: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """Return the mean over the tokens where `mask` is True."""
    return (values * mask).sum() / mask.sum()


def token_mean(rollout: Rollout, values: Float[Tensor, "batch tokens"]) -> Float[Tensor, " batch"]:
    """Return one number a completion whose mean over the optimiser step is the mean of `values` over its tokens."""
    mask = rollout.completion_mask
    length = (
        mask.sum().to(values.dtype) / len(mask)
        if rollout.tokens_per_completion is None
        else rollout.tokens_per_completion
    )
    return (values * mask).sum(1) / length


def _output(
    losses: Float[Tensor, " batch"],
    weight: Float[Tensor, " batch"] | None,
    rewards: Float[Tensor, "..."],
    metrics: Mapping[str, Float[Tensor, ""]],
) -> LossOutput:
    """Divide by the number of examples, not by the sum of weights.

    Micro-batches of any size, averaged by their share of the examples, then give exactly the loss of the whole batch.
    """
    losses = losses if weight is None else weight * losses
    return LossOutput(loss=losses.mean(), losses=losses, rewards=rewards, metrics=metrics)


def _side(name: str, rewards: Tensor, policy: Tensor, length: Tensor) -> dict[str, Tensor]:
    return {
        f"reward/{name}": rewards.detach().mean(),
        f"logp/{name}": policy.detach().mean(),
        f"length/{name}": length.to(policy.dtype).mean(),
    }


def _outranking(rewards: Float[Tensor, " batch"], desirable: Bool[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return the share of (desirable, undesirable) combinations in which the desirable one's reward is the higher.

    A tie counts 1/2, so this is the area under the ROC curve; sorting keeps it cheap over a whole dataset.
    """
    undesirable = rewards[~desirable].sort().values
    below = torch.searchsorted(undesirable, rewards[desirable])
    below_or_tied = torch.searchsorted(undesirable, rewards[desirable], right=True)
    return (below + below_or_tied).to(rewards.dtype).mean() / (2 * len(undesirable))
