"""The laws that every objective obeys, this package's and yours: `check(MyObjective())` in a test of your own."""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dpo.losses.objective import Objective
from dpo.types import JudgementLogps, LossInput, LossOutput, PairLogps

BATCH = 6
"""Examples in a test batch: it splits unevenly, and both parts hold both labels."""
EXTREME = 1e4
"""A log-ratio in nats far beyond what training meets; exponentials of it overflow, losses must not."""
METRIC_NAME = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)+")
PAIR_SIGNS = {"policy_chosen": -1.0, "policy_rejected": 1.0}
REFERENCE_FIELDS = ("reference_chosen", "reference_rejected", "reference", "policy_mismatched", "reference_mismatched")
"""Fields that hold constants: the reference, and the log-probs from which a reference point is estimated."""


def check(objective: Objective) -> None:
    """Hold an objective to every law of this module; what the objective itself raises passes through.

    Raises:
        AssertionError: a law is broken; the message says which, with what was got and expected.
    """
    for law in LAWS:
        law(objective)


def example_batch(objective: Objective, *, seed: int = 0, drift: float = 1.0, size: int = BATCH) -> LossInput:
    """Return a random float64 record of the kind that `objective` reads.

    The policy differs from the reference by a normal variate of deviation `drift` nats; at 0 they are equal. On
    mismatched completions it is higher by `drift` on average, as a KL divergence is. Labels are certain and weights
    absent. The fields that the objective does not ask for are None.
    """
    generator = torch.Generator().manual_seed(seed)

    def scores() -> tuple[Tensor, Tensor, Tensor]:
        length = torch.randint(1, 40, (size,), generator=generator)
        reference = -length * (0.5 + torch.rand(size, generator=generator, dtype=torch.float64))
        return length, reference, reference + drift * torch.randn(size, generator=generator, dtype=torch.float64)

    def known(reference: Tensor) -> Tensor | None:
        return reference if objective.needs_reference else None

    length, reference, policy = scores()
    other_length, other_reference, other_policy = scores()
    if objective.view == "pairs":
        return PairLogps(policy, other_policy, known(reference), known(other_reference), length, other_length)
    desirable = torch.arange(size) % 2 == 0
    return JudgementLogps(
        policy=policy,
        reference=known(reference),
        desirable=torch.ones_like(desirable) if objective.view == "demonstrations" else desirable,
        length=length,
        policy_mismatched=other_policy + drift if objective.needs_mismatched else None,
        reference_mismatched=known(other_reference) if objective.needs_mismatched else None,
    )


def policy_gradients(objective: Objective, logps: LossInput) -> dict[str, Tensor]:
    """Return d loss / d log-prob of each policy field that is trained, each (batch,)."""
    leaves = _leaves(logps, *_policy_fields(logps))
    objective(replace(logps, **leaves)).loss.backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def is_declared(objective: Objective) -> None:
    """The class is a final, frozen, keyword-only dataclass and cites its source."""
    kind: Any = type(objective)
    _law("__dataclass_fields__" in vars(kind), objective, "must be a dataclass")
    _law(kind.__dataclass_params__.frozen, objective, "must be frozen: @dataclass(frozen=True, ...)")
    positional = [f.name for f in fields(kind) if f.init and not f.kw_only]
    _law(not positional, objective, f"must be keyword-only (kw_only=True), got positional {positional}")
    _law(vars(kind).get("__final__", False), objective, "must be marked @final")
    paper, text = getattr(kind, "paper", ""), " ".join((kind.__doc__ or "").split())
    _law(bool(paper), objective, f"must cite its source in the class attribute `paper`, got {paper!r}")
    _law(f"Paper: {paper}" in text, objective, f"must say 'Paper: {paper}.' in its docstring")


def keeps_the_precision(objective: Objective) -> None:
    """Losses and rewards have the dtype of the log-probs."""
    for dtype in (torch.float64, torch.float32):

        def cast(tensor: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        out = objective(_each(example_batch(objective), cast))
        for name, tensor in {"loss": out.loss, "losses": out.losses, "rewards": out.rewards}.items():
            _law(tensor.dtype == dtype, objective, f"{name} of {dtype} log-probs must be {dtype}, got {tensor.dtype}")


def is_finite_mean(objective: Objective) -> None:
    """The loss is the mean of one finite loss per example, for any log-ratio and with finite gradients."""
    for drift in (0.0, 1.0, EXTREME):
        logps = example_batch(objective, drift=drift)
        out = objective(logps)
        place = f"at log-ratios near {drift:g} nats"
        _law(out.losses.shape == (BATCH,), objective, f"losses: got {tuple(out.losses.shape)}, expected {(BATCH,)}")
        _law(out.loss.shape == (), objective, f"loss: got shape {tuple(out.loss.shape)}, expected a scalar")
        _law(_finite(out.losses), objective, f"losses {place} must be finite, got {out.losses.tolist()}")
        _same(out.loss, out.losses.mean(), objective, "loss must be the mean of losses")
        for name, gradient in policy_gradients(objective, logps).items():
            _law(_finite(gradient), objective, f"gradient by {name} {place} must be finite, got {gradient.tolist()}")


def has_detached_metrics(objective: Objective) -> None:
    """Rewards and metrics carry no gradient; a metric is a finite scalar, named as group/name."""
    logps = example_batch(objective)
    out = objective(replace(logps, **_leaves(logps, *_policy_fields(logps))))
    shape = (BATCH, 2) if objective.view == "pairs" else (BATCH,)
    _law(out.rewards.shape == shape, objective, f"rewards: got {tuple(out.rewards.shape)}, expected {shape}")
    _law(not out.rewards.requires_grad, objective, "rewards must be detached")
    for name, value in out.metrics.items():
        _law(METRIC_NAME.fullmatch(name) is not None, objective, f"metric {name!r} must be named as group/name")
        _law(not value.requires_grad, objective, f"metric {name} must be detached")
        _law(value.shape == () and _finite(value), objective, f"metric {name} must be a finite scalar, got {value}")


def pulls_the_right_way(objective: Objective) -> None:
    """At policy = reference, the loss falls as the better completion rises and the worse one falls."""
    logps = example_batch(objective, drift=0.0)
    for name, gradient in policy_gradients(objective, logps).items():
        if isinstance(logps, PairLogps):
            sign = torch.full((BATCH,), PAIR_SIGNS[name])
        else:
            sign = torch.where(logps.desirable, -1.0, 1.0)
        message = (
            f"d loss / d {name} at policy = reference must have the signs {sign.tolist()}, got {gradient.tolist()}"
        )
        _law(bool((gradient.sign() == sign).all()), objective, message)


def leaves_the_reference_alone(objective: Objective) -> None:
    """No gradient reaches the reference, or the completions that only set a reference point."""
    logps = example_batch(objective)
    constants = _leaves(logps, *REFERENCE_FIELDS)
    objective(replace(logps, **constants, **_leaves(logps, *_policy_fields(logps)))).loss.backward()
    for name, leaf in constants.items():
        _law(leaf.grad is None or not leaf.grad.any(), objective, f"{name} must get no gradient, got {leaf.grad}")


def averages_over_examples(objective: Objective) -> None:
    """Each example twice gives the same loss; each in another place gives the same losses there."""
    logps = example_batch(objective)
    out = objective(logps)
    doubled = objective(_each(logps, lambda tensor: torch.cat([tensor, tensor])))
    _same(doubled.loss, out.loss, objective, "loss of the batch repeated twice must be that of the batch")
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    moved = objective(_each(logps, lambda tensor: tensor[order]))
    _same(moved.losses, out.losses[order], objective, "losses of a permuted batch must be the permuted losses")


def honours_weights(objective: Objective) -> None:
    """A weight multiplies its example's loss and gradient; at 0 the example is silent."""
    logps = example_batch(objective)
    weight = torch.linspace(0, 3, BATCH, dtype=torch.float64)  # its mean is not 1: losses divided by it are found out
    weighted = replace(logps, weight=weight)
    _same(objective(weighted).losses, weight * objective(logps).losses, objective, "losses must be weight * losses")
    plain = policy_gradients(objective, logps)
    for name, gradient in policy_gradients(objective, weighted).items():
        _same(gradient, weight * plain[name], objective, f"gradient by {name} must scale with the weight")


def honours_soft_labels(objective: Objective) -> None:
    """Preference 1 is the certain label; at 1/2, chosen and rejected are interchangeable.

    An objective for certain labels only may refuse any other by raising ValueError, but may not pass over it.
    """
    logps = example_batch(objective)
    if not isinstance(logps, PairLogps):
        return
    even = replace(logps, preference=torch.full((BATCH,), 0.5, dtype=torch.float64))
    exchanged = replace(
        even,
        **{
            "policy_chosen": even.policy_rejected,
            "policy_rejected": even.policy_chosen,
            "reference_chosen": even.reference_rejected,
            "reference_rejected": even.reference_chosen,
            "chosen_length": even.rejected_length,
            "rejected_length": even.chosen_length,
        },
    )
    try:
        losses = objective(even).losses
    except ValueError:
        return
    message = "at preference 1/2, exchanging chosen and rejected must not change the losses (is preference ignored?)"
    _same(objective(exchanged).losses, losses, objective, message)
    certain = replace(logps, preference=torch.ones(BATCH, dtype=torch.float64))
    _same(objective(certain).losses, objective(logps).losses, objective, "preference 1 must equal a certain label")


def leaves_inputs_unchanged(objective: Objective) -> None:
    """No tensor of the record is written to."""
    logps = replace(example_batch(objective), weight=torch.ones(BATCH, dtype=torch.float64))
    before = _each(logps, Tensor.clone)
    objective(logps)
    for name, tensor in _tensors(before).items():
        _law(torch.equal(getattr(logps, name), tensor), objective, f"{name} must not be changed in place")


def accumulates_exactly(objective: Objective) -> None:
    """Parts of a batch, averaged by their share of the examples, give its loss, unless `batch_coupled` says otherwise.

    The parts are uneven in size, length and weight, so that a mean over tokens or weights is found out.
    """
    if objective.batch_coupled:
        return
    logps = replace(example_batch(objective), weight=torch.linspace(0.5, 2, BATCH, dtype=torch.float64))
    parts = (slice(0, 2), slice(2, BATCH))
    outs: list[LossOutput] = [objective(_each(logps, lambda tensor, part=part: tensor[part])) for part in parts]
    total = sum((out.loss * len(out.losses) / BATCH for out in outs), torch.zeros((), dtype=torch.float64))
    message = "loss of a batch must be the mean of its parts' (or the class says batch_coupled = True)"
    _same(total, objective(logps).loss, objective, message)


LAWS: tuple[Callable[[Objective], None], ...] = (
    is_declared,
    keeps_the_precision,
    is_finite_mean,
    has_detached_metrics,
    pulls_the_right_way,
    leaves_the_reference_alone,
    averages_over_examples,
    honours_weights,
    honours_soft_labels,
    leaves_inputs_unchanged,
    accumulates_exactly,
)
"""In the order of `check`; each is a function of the objective, so that a test can name the one it is about."""


def _law(holds: bool, objective: Objective, message: str) -> None:
    if not holds:
        raise AssertionError(f"{type(objective).__name__}: {message}")


def _same(got: Tensor, expected: Tensor, objective: Objective, message: str) -> None:
    close = got.shape == expected.shape and torch.allclose(got.double(), expected.double(), rtol=1e-9, atol=1e-12)
    _law(close, objective, f"{message}: got {got.tolist()}, expected {expected.tolist()}")


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _policy_fields(logps: LossInput) -> tuple[str, ...]:
    return tuple(PAIR_SIGNS) if isinstance(logps, PairLogps) else ("policy",)


def _tensors(logps: LossInput) -> dict[str, Tensor]:
    return {f.name: value for f in fields(logps) if (value := getattr(logps, f.name)) is not None}


def _each(logps: LossInput, change: Callable[[Tensor], Tensor]) -> LossInput:
    changed: dict[str, Any] = {name: change(tensor) for name, tensor in _tensors(logps).items()}
    return replace(logps, **changed)


def _leaves(logps: LossInput, *names: str) -> dict[str, Any]:
    present = _tensors(logps)
    return {name: present[name].clone().requires_grad_() for name in names if name in present}
