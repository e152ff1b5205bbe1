"""What the experiments share: softmax policies over a handful of answers, in float64.

These are experiments: unlike the recipes beside them they compute. A policy is a vector of log-probs, one an answer, so
that the whole population can be the batch and an optimum can be compared with its closed form.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo.types import LossInput, LossOutput, PairLogps

Loss = Callable[[Any], LossOutput]
"""An objective, or a function of the same record that calls one."""

FLAT = 1e-8
"""Largest component of the gradient at which an optimum counts as found."""


def column(values: Sequence[float]) -> Tensor:
    """Return a float64 tensor (n,)."""
    return torch.tensor(values, dtype=torch.float64)


def random_problem(seed: int, answers: int = 5) -> tuple[Tensor, Tensor]:
    """Return the reference's log-probs and the true rewards of the answers, each (answers,)."""
    generator = torch.Generator().manual_seed(seed)
    logits, rewards = torch.randn(2, answers, generator=generator, dtype=torch.float64)
    return logits.log_softmax(0), rewards


def bradley_terry(rewards: Tensor, compared: Sequence[tuple[int, int]]) -> tuple[list[int], list[int], Tensor]:
    """Turn each pair so that the likelier winner comes first; its probability is σ of the reward gap."""
    turned = [(i, j) if rewards[i] >= rewards[j] else (j, i) for i, j in compared]
    better, worse = [i for i, _ in turned], [j for _, j in turned]
    return better, worse, torch.sigmoid(rewards[better] - rewards[worse])


def pairs(
    policy: Tensor,
    reference: Tensor | None,
    better: Sequence[int] | Tensor,
    worse: Sequence[int] | Tensor,
    *,
    preference: Tensor | None = None,
    weight: Tensor | None = None,
    lengths: Tensor | None = None,
) -> PairLogps:
    """Compare answers by their numbers; `policy` and `reference` hold log-probs, `lengths` tokens (1 by default)."""
    better, worse = torch.as_tensor(better), torch.as_tensor(worse)
    lengths = torch.ones(len(policy), dtype=torch.long) if lengths is None else lengths
    return PairLogps(
        policy_chosen=policy[better],
        policy_rejected=policy[worse],
        reference_chosen=None if reference is None else reference[better],
        reference_rejected=None if reference is None else reference[worse],
        chosen_length=lengths[better],
        rejected_length=lengths[worse],
        preference=preference,
        weight=weight,
    )


def gibbs(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Return argmax E[reward] - beta KL(policy || reference): the log-probs of reference exp(rewards / beta) / Z."""
    return (reference + rewards / beta).log_softmax(-1)


def kl(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KL(policy || reference) in nats over the last dimension."""
    return (policy.exp() * (policy - reference)).sum(-1)


def solve(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Return the parameters that minimise a smooth loss, by L-BFGS from `start`.

    Raises:
        RuntimeError: the gradient did not vanish; the loss has no minimum or a kink there.
    """
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    optimiser.step(closure)
    (gradient,) = torch.autograd.grad(loss(parameters), parameters)
    steepest = gradient.abs().max().item()
    if not steepest < FLAT:
        raise RuntimeError(f"solve: gradient {steepest:.2g} where it stopped, expected < {FLAT:g}: has it a minimum?")
    return parameters.detach()


def minimise(objective: Loss, record: Callable[[Tensor], LossInput], start: Tensor) -> Tensor:
    """Return the log-probs (answers,) of the policy that minimises the objective over `record` of its log-probs."""
    return solve(lambda logits: objective(record(logits.log_softmax(0))).loss, start).log_softmax(0)


def fit_rewards(better: Tensor, worse: Tensor, preference: Tensor, answers: int) -> Tensor:
    """Return the rewards (answers,) of greatest Bradley-Terry likelihood, with mean 0: a tabular reward model."""

    def loss(scores: Tensor) -> Tensor:
        gap = scores[better] - scores[worse]
        return -(preference * logsigmoid(gap) + (1 - preference) * logsigmoid(-gap)).mean()

    scores = solve(loss, torch.zeros(answers, dtype=torch.float64))
    return scores - scores.mean()


def train(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    learning_rate: float,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return the logits after some steps of Adam; `watch` sees each number of steps taken, from 0, and the logits."""
    logits = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=learning_rate)
    for step in range(steps + 1):
        if watch is not None:
            watch(step, logits.detach())
        if step < steps:
            optimiser.zero_grad()
            loss(logits.log_softmax(-1)).backward()
            optimiser.step()
    return logits.detach()
