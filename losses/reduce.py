"""What objectives share: log-ratios, soft labels, and the one way from per-example losses to a `LossOutput`."""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dpo.types import JudgementLogps, LossOutput, PairLogps

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


def pair_output(logps: PairLogps, losses: Float[Tensor, " batch"], rewards: Float[Tensor, "batch 2"]) -> LossOutput:
    """Weight and average the losses of pairs, and read the metrics off their rewards (chosen, rejected)."""
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
