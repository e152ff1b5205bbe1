"""What objectives share: log-ratios, soft labels, and the one way from per-example losses to a `LossOutput`."""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
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
    rewards, index = scores.scores.detach(), scores.prompt_index
    chosen, rejected = (
        _prompt_mean(rewards, index, len(losses), scores.rank == _extreme(scores, len(losses), how)[index])
        for how in ("amin", "amax")
    )
    first, second = comparisons(scores)
    right = ((rewards[first] - rewards[second]).sign() + 1) / 2
    metrics = {
        "reward/chosen": chosen.mean(),
        "reward/rejected": rejected.mean(),
        "reward/margin": (chosen - rejected).mean(),
    }
    if len(right):  # a prompt without a comparison says nothing
        accuracy = _prompt_mean(right, index[first], len(losses), torch.ones_like(right))
        metrics["reward/accuracy"] = accuracy[~accuracy.isnan()].mean()
    return _output(losses, scores.weight, rewards, metrics)


def _extreme(scores: RankingScores, prompts: int, how: str) -> Int[Tensor, " prompts"]:
    """Return each prompt's first or last place."""
    start = torch.zeros(prompts, dtype=scores.rank.dtype, device=scores.rank.device)
    return start.scatter_reduce(0, scores.prompt_index, scores.rank, reduce=how, include_self=False)


def _prompt_mean(
    values: Float[Tensor, " items"], index: Int[Tensor, " items"], prompts: int, kept: Shaped[Tensor, " items"]
) -> Float[Tensor, " prompts"]:
    """Return the mean of each prompt's values that are kept; NaN where there is none."""
    total, count = (
        values.new_zeros(prompts).index_add(0, index, one) for one in (values * kept, kept.to(values.dtype))
    )
    return total / count


def comparisons(scores: RankingScores) -> tuple[Int[Tensor, " comparisons"], Int[Tensor, " comparisons"]]:
    """Return, for every comparison within a prompt, the indices of the better completion and of the worse.

    Completions of equal rank are not compared. Work grows with the completions times the most of one prompt.
    """
    index, rank = scores.prompt_index, scores.rank
    most = int(torch.bincount(index).max()) if len(index) else 0
    found: list[Tensor] = []
    for apart in range(1, most):  # those of one prompt stand together
        first = (index[apart:] == index[:-apart]).nonzero().squeeze(1)
        found.append(torch.stack([first, first + apart]))
    pairs = torch.cat(found, dim=1) if found else index.new_zeros(2, 0)
    left, right = pairs[:, rank[pairs[0]] != rank[pairs[1]]]
    swap = rank[left] > rank[right]
    return torch.where(swap, right, left), torch.where(swap, left, right)


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
