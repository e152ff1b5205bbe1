"""Step 0: where the policy equals the reference, every loss is what its formula says at r = 0.

Any other loss there is a fault of the run: dropout left on, a merged adapter, a precision, a shift or a template.
"""

import math

import pytest
import torch

from dpo.losses import find, names
from dpo.losses.testing import example_batch
from dpo.types import LossInput, PairLogps, TokenLogps


def softplus(x: float) -> float:
    """-log σ(-x)."""
    return math.log1p(math.exp(x))


def log_odds(mean: float) -> float:
    return mean - math.log(-math.expm1(mean))


def on_policy(tokens: TokenLogps) -> list[float]:
    """WPO's w, row by row: exp of the mean over tokens of log π(y_t) - log Σ π²."""
    rows = zip(tokens.policy.tolist(), tokens.log_collision.tolist(), tokens.completion_mask.tolist(), strict=True)
    return [math.exp(sum(p - c for p, c, m in zip(*row, strict=True) if m) / sum(row[2])) for row in rows]


def each(logps: LossInput, formula) -> list[float]:
    """The formula of one example, of (L_w, L_l, |w|, |l|) or of (L, |y|)."""
    if isinstance(logps, PairLogps):
        columns = logps.policy_chosen, logps.policy_rejected, logps.chosen_length, logps.rejected_length
    else:
        columns = logps.policy, logps.length
    return [formula(*row) for row in zip(*(tensor.tolist() for tensor in columns), strict=True)]


def same(value: float):
    return lambda logps: [value] * 6


LN2 = math.log(2)
# Defaults as the classes state them: a changed default has to be changed here too.
EXPECTED = {
    "aot": same(LN2),
    "apodown": same(0.5 + 1 - 0.5),
    "apozero": same(1 - 0.5 + 0.5),
    "apozerounpaired": same(0.5),
    "bco": same(LN2),
    "bcopair": same(2 * LN2),
    "cdpo": same(LN2),
    "cpo": lambda logps: each(logps, lambda c, r, m, n: softplus(-0.1 * (c - r)) - c / m),
    "discopop": same(0.5 * LN2 + 0.5),
    "dpo": same(LN2),
    "dponorm": same(LN2),
    "dpop": same(LN2),
    "exo": same(0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001)),
    "fdpo": same(LN2),
    "hinge": same(1.0),
    "ipo": same(1 / (4 * 0.5**2)),
    "kto": same(0.5),
    "lddpo": same(LN2),
    "mixture": lambda logps: each(logps, lambda c, r, m, n: 0.8 * LN2 + 0.2 * 2 * LN2 - c / m),
    "nca": same(2 * LN2),
    "orpo": lambda logps: each(logps, lambda c, r, m, n: -c / m + 0.1 * softplus(log_odds(r / n) - log_odds(c / m))),
    "rdpo": lambda logps: each(logps, lambda c, r, m, n: softplus(-0.01 * (m - n))),
    "robustdpo": same(LN2),
    "rpo": lambda logps: each(logps, lambda c, r, m, n: LN2 - c / m),
    "sft": lambda logps: each(logps, lambda y, n: -y / n),
    "simpo": lambda logps: each(logps, lambda c, r, m, n: softplus(1.0 - 2.0 * (c / m - r / n))),
    "slic": lambda logps: each(logps, lambda c, r, m, n: max(0.0, 1.0 - c + r) - 0.1 * c),
    "sppo": same(((1 - 0.5) / 1e-3) ** 2),
    "trdpo": same(LN2),
    "wpo": lambda logps: [
        min(1.0, chosen * rejected) * LN2
        for chosen, rejected in zip(on_policy(logps.chosen_tokens), on_policy(logps.rejected_tokens), strict=True)
    ],
}


def test_every_objective_states_its_loss_at_step_0():
    # Reward models have no reference; what rollouts lose is measured from the policy that sampled them.
    compared = {name for name in names() if find(name).view in ("pairs", "judgements", "demonstrations")}
    assert set(EXPECTED) == compared, "an objective has no line in EXPECTED, or a line no objective"


@pytest.mark.parametrize("name", EXPECTED)
def test_loss_at_step_0_is_the_constant_of_the_formula(name: str):
    objective = find(name)()
    logps = example_batch(objective, drift=0.0)
    losses = objective(logps).losses
    # Rounding alone: 1e-13 of values up to 60, and of SPPO's 250,000.
    expected = torch.tensor(EXPECTED[name](logps), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in EXPECTED if find(name)().needs_reference])
def test_a_reference_that_is_a_tenth_of_a_nat_away_shows(name: str):
    # What makes step 0 a check of a run: another start gives another loss.
    objective = find(name)()
    expected = torch.tensor(EXPECTED[name](example_batch(objective, drift=0.0)), dtype=torch.float64)
    losses = objective(example_batch(objective, drift=0.1)).losses
    assert (losses - expected).abs().max() > 1e-4
