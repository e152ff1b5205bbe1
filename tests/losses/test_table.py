"""What every objective over pairs is asked for, one row each: a certain and a soft label, weights, step 0.

The rows hold numbers worked out by hand; the derivation stands beside them. What is particular to one objective has a
file of its own, and the laws that hold for any are in `test_contract.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import exp, log, log1p
from typing import Any, get_type_hints

import pytest
import torch

from dpo.losses import Objective, find, names
from dpo.losses.objective import Number
from dpo.types import PairLogps

LN2 = log(2)
PAIR = (-10.0, -14.0, -12.0, -13.0, 4, 10)
"""L_w, L_l, the reference's L_w and L_l, |w|, |l|: r_w = 2 nats over 4 tokens, r_l = -1 nat over 10 tokens."""
GAP_OF_1 = (1.0, 0.0, 0.0, 0.0, 3, 5)
BOTH_FALL = (-11.0, -16.0, -10.0, -13.0, 4, 9)
"""r_w = -1, r_l = -3."""
TWICE_AND_HALF = (LN2, 0.0, 0.0, LN2, 3, 5)
"""pi / pi_ref = 2 for the chosen completion, 1/2 for the rejected one."""
LOW, HIGH = 0.2014132779827525, 1.7014132779827525
"""-log sigma(1.5) and -log sigma(-1.5); sigma(-1.5) = 0.1824255238063563."""


@dataclass(frozen=True, kw_only=True)
class Row:
    loss: float
    """Of a certain label."""
    slopes: tuple[float, float]
    """d loss / d L_w and d loss / d L_l of a certain label."""
    rewards: tuple[float, float]
    soft: tuple[float, float]
    """P(chosen preferred), and the loss there."""
    at_reference: tuple[float, float] | None = (LN2, LN2)
    """The loss where the policy equals the reference, of a certain label and of P = 0.7; None: it needs none."""
    pair: tuple[float, float, float, float, int, int] = PAIR
    hyper: Mapping[str, Any] = field(default_factory=dict)
    mean_log_ratio: float | None = None


def expected(p: float, as_labelled: float, reversed_label: float) -> float:
    return p * as_labelled + (1 - p) * reversed_label


TABLE = {
    # sigma(1) + 1 - sigma(1.5) = 0.7310585786300049 + 1 - 0.8175744761936437. Slopes 0.5 (sigma'(1) - sigma'(1.5))
    # = 0.5 (0.1966119332414819 - 0.1491464520703329) and 0.5 sigma'(1.5).
    # Reversed: sigma(-0.5) + sigma(1.5) = 0.3775406687981454 + 0.8175744761936437.
    "apodown": Row(
        hyper={"beta": 0.5},
        loss=0.9134841024363612,
        slopes=(0.0237327405855745, 0.0745732260351664),
        rewards=(1.0, -0.5),
        soft=(0.8, expected(0.8, 0.9134841024363612, 1.1951151449917891)),
        at_reference=(1, 1),
    ),
    # 1 - sigma(1) + sigma(-0.5) = 1 - 0.7310585786300049 + 0.3775406687981454. Slopes -0.5 sigma'(1), 0.5 sigma'(0.5).
    # p = 0.8: 1 - 0.6 (0.7310585786300049 - 0.3775406687981454).
    "apozero": Row(
        hyper={"beta": 0.5},
        loss=0.6464820901681406,
        slopes=(-0.0983059666207409, 0.1175018561007972),
        rewards=(1.0, -0.5),
        soft=(0.8, 0.7878892541008843),
        at_reference=(1, 1),
    ),
    # Rewards 1 and -0.5, delta = 0.5 * 0.5 = 0.25: -2 log sigma(0.75) = 2 * 0.3868710061148999; slopes -+0.5
    # sigma(-0.75). Reversed -2 log sigma(-0.75), 1.5 more. At the reference -log sigma(0.25) - log sigma(-0.25).
    "bcopair": Row(
        hyper={"beta": 0.5},
        mean_log_ratio=0.5,
        loss=0.7737420122297999,
        slopes=(-0.1604106504123035, 0.1604106504123035),
        rewards=(1.0, -0.5),
        soft=(0.8, 0.7737420122297999 + 0.2 * 1.5),
        at_reference=(1.4018788397576871, 1.4018788397576871),
    ),
    # z = 1.5: 0.9 LOW + 0.1 HIGH; slopes 0.5 (sigma(1.5) - 0.9). p = 0.8: p' = 0.8 * 0.9 + 0.2 * 0.1 = 0.74.
    "cdpo": Row(
        hyper={"beta": 0.5},
        loss=0.3514132779827524,
        slopes=(-0.0412127619031782, 0.0412127619031782),
        rewards=(1.0, -0.5),
        soft=(0.8, expected(0.74, LOW, HIGH)),
    ),
    # a_w = -1 nat a token, a_l = -2; z = 0.1 (-4 + 14) = 1. log(1 + e^-1) + 2 * 1 nat a token; the paper's sum would
    # add 2 * 4. Slopes -0.1 sigma(-1) - 2 / 4 and 0.1 sigma(-1). Reversed: log(1 + e) + 2 * 2, of the rejected one.
    "cpo": Row(
        hyper={"alpha": 2},
        pair=(-4.0, -14.0, 0.0, 0.0, 4, 7),
        loss=0.31326168751822286 + 2,
        slopes=(-0.5268941421369995, 0.02689414213699951),
        rewards=(-0.4, -1.4),
        soft=(0.75, expected(0.75, 0.31326168751822286 + 2, 1.3132616875182228 + 4)),
        at_reference=None,
    ),
    # z = 0.05, m = sigma(1) = 0.7310585786300049: (1 - m) ln(1 + e^-0.05) + m e^-0.05 = 0.1797765 + 0.6954045.
    # f' = m (1 - m) / tau (e^-z - ln(1 + e^-z)) - (1 - m) sigma(-z) - m e^-z = 0.2854041742114586, times beta.
    # Reversed, m = sigma(-1): 0.7310585786300049 ln(1 + e^0.05) + 0.2689414213699951 e^0.05.
    "discopop": Row(
        pair=GAP_OF_1,
        loss=0.8751809188917093,
        slopes=(0.01427020871057293, -0.01427020871057293),
        rewards=(0.05, 0.0),
        soft=(
            0.8,
            expected(0.8, 0.8751809188917093, 0.7310585786300049 * log1p(exp(0.05)) + 0.2689414213699951 * exp(0.05)),
        ),
        at_reference=((1 + LN2) / 2, (1 + LN2) / 2),
    ),
    # z = 0.5 (2 + 1) = 1.5: LOW; slopes -+0.5 sigma(-1.5).
    "dpo": Row(
        hyper={"beta": 0.5},
        loss=LOW,
        slopes=(-0.0912127619031782, 0.0912127619031782),
        rewards=(1.0, -0.5),
        soft=(0.8, expected(0.8, LOW, HIGH)),
    ),
    # z = 5 (2 / 4 + 1 / 10) = 3: ln(1 + e^-3), sigma(-3) = 0.0474258731775668; slopes -5 sigma(-3) / 4 and
    # 5 sigma(-3) / 10. Reversed: 3 more.
    "dponorm": Row(
        loss=0.0485873515737421,
        slopes=(-0.0592823414719585, 0.0237129365887834),
        rewards=(2.5, -0.5),
        soft=(0.8, 0.0485873515737421 + 0.2 * 3),
    ),
    # h = -1 - 5 * 1 = -6, z = 0.1 (-6 + 3) = -0.3: ln(1 + e^0.3), above ln 2 though r_w > r_l. Slopes
    # -0.1 (1 + 5) sigma(0.3) and 0.1 sigma(0.3). Reversed h(r_l) = -3 - 15 = -18, z = 0.1 (-18 + 1) = -1.7.
    "dpop": Row(
        hyper={"beta": 0.1, "penalty_weight": 5},
        pair=BOTH_FALL,
        loss=0.8543552444685272,
        slopes=(-0.6 * 0.574442516811659, 0.1 * 0.574442516811659),
        rewards=(-0.6, -0.3),
        soft=(0.75, expected(0.75, log1p(exp(0.3)), log1p(exp(1.7)))),
    ),
    # sigma(1.5) = 0.8175744761936437 against q = 0.9: 0.8175744761936437 ln(0.8175744761936437 / 0.9)
    # + 0.1824255238063563 ln(0.1824255238063563 / 0.1); slopes beta sigma(z) sigma(-z) (z - ln 9)
    # = 0.5 * 0.1491464520703329 (1.5 - 2.1972245773362196). p = 0.8: q = 0.8 * 0.9 + 0.2 * 0.1 = 0.74.
    # At the reference -ln 2 - (ln q + ln(1 - q)) / 2 with q = 0.9 and q = 0.7 * 0.9 + 0.3 * 0.1 = 0.66.
    "exo": Row(
        hyper={"beta": 0.5, "epsilon": 0.1},
        loss=0.0311387964062991,
        slopes=(-0.0519942860029673, 0.0519942860029673),
        rewards=(1.0, -0.5),
        soft=(0.8, 0.0168648906558142),
        at_reference=(-LN2 - (log(0.9) + log(0.1)) / 2, -LN2 - (log(0.66) + log(0.34)) / 2),
    ),
    # "js": g = ln(2u / (1 + u)): ln(4/3) and ln(2/3), z = ln 2, -log sigma(z) = ln(3/2). g' = 1 / (1 + u): 1/3 and 2/3,
    # each times sigma(-z) = 1/3. Reversed -log sigma(-ln 2) = ln 3.
    "fdpo": Row(
        hyper={"beta": 1},
        pair=TWICE_AND_HALF,
        loss=log(1.5),
        slopes=(-1 / 9, 2 / 9),
        rewards=(log(4 / 3), log(2 / 3)),
        soft=(0.8, expected(0.8, log(1.5), log(3))),
    ),
    # z = 0.2 (2 + 1) = 0.6: 1 - 0.6; slopes -+beta. Reversed 1 + 0.6.
    "hinge": Row(
        hyper={"beta": 0.2},
        loss=0.4,
        slopes=(-0.2, 0.2),
        rewards=(0.4, -0.2),
        soft=(0.8, expected(0.8, 0.4, 1.6)),
        at_reference=(1, 1),
    ),
    # t = 1. h = 2 / 4 + 1 / 10 = 0.6: (0.6 - 1)^2 = 0.16; slopes -0.8 / 4 and 0.8 / 10. Reversed (0.6 + 1)^2 = 2.56.
    "ipo": Row(
        hyper={"tau": 0.5},
        loss=0.16,
        slopes=(-0.2, 0.08),
        rewards=(0.5, -0.1),
        soft=(0.8, expected(0.8, 0.16, 2.56)),
        at_reference=(1, 1),
    ),
    # Rewards 1 and -0.5. -log sigma(1) = 0.3132616875182228, -log sigma(-1) = 1.3132616875182228,
    # -log sigma(0.5) = 0.4740769841801067: 0.31326 + 1.31326 / 2 + 0.47408 / 2. Slopes 0.5 (-sigma(-1) + sigma(1) / 2)
    # and 0.5 sigma(-0.5) / 2: beyond ln 2 the chosen completion is held back.
    # p = 0.8, with -log sigma(-0.5) = 0.9740769841801067: 0.8 * 0.31326 + 0.2 * 0.97408 + (1.31326 + 0.47408) / 2.
    "nca": Row(
        hyper={"beta": 0.5},
        loss=1.2069310233673876,
        slopes=(0.0482939339725037, 0.0943851671995363),
        rewards=(1.0, -0.5),
        soft=(0.8, 1.3390940826997644),
        at_reference=(2 * LN2, 2 * LN2),
    ),
    # Mean token probabilities 1/2 and 1/4: odds 1 and 1/3, d = ln 3, sigma(d) = 3/4, loss ln 2 + ln(4/3). d log odds /
    # d a = 1 / (1 - P): 2 and 4/3; by a_w -1 - (1 - 3/4) 2 = -3/2, by a_l (1 - 3/4) 4/3; divided by 2 and 5 tokens.
    # Reversed ln 4 - log sigma(-ln 3) = ln 4 + ln 4.
    "orpo": Row(
        hyper={"odds_ratio_weight": 1},
        pair=(2 * log(1 / 2), 5 * log(1 / 4), 0.0, 0.0, 2, 5),
        loss=log(8 / 3),
        slopes=(-3 / 4, 1 / 15),
        rewards=(0.0, -log(3)),
        soft=(0.75, expected(0.75, log(8 / 3), log(16))),
        at_reference=None,
    ),
    # s_w = 0.5 * 2 + 0.1 * 4 = 1.4, s_l = -0.5 + 0.1 * 10 = 0.5, z = 0.9: ln(1 + e^-0.9); slopes -+0.5 sigma(-0.9).
    # Reversed: 0.9 more. At the reference z = 0.1 (4 - 10) = -0.6: ln(1 + e^0.6), reversed 0.6 less.
    "rdpo": Row(
        hyper={"beta": 0.5, "alpha": 0.1},
        loss=0.3411538747320879,
        slopes=(-0.5 * 0.28905049737499605, 0.5 * 0.28905049737499605),
        rewards=(1.4, 0.5),
        soft=(0.8, 0.3411538747320879 + 0.2 * 0.9),
        at_reference=(log1p(exp(0.6)), log1p(exp(0.6)) - 0.3 * 0.6),
    ),
    # (0.9 LOW - 0.1 HIGH) / 0.8; slopes 0.5 (sigma(1.5) - 0.9 / 0.8). Reversed (0.9 HIGH - 0.1 LOW) / 0.8.
    "robustdpo": Row(
        hyper={"beta": 0.5},
        loss=0.0139132779827524,
        slopes=(-0.1537127619031782, 0.1537127619031782),
        rewards=(1.0, -0.5),
        soft=(0.8, expected(0.8, 0.0139132779827524, 1.8889132779827525)),
    ),
    # L_w / |w| = -2.5, L_l / |l| = -1.4: LOW + 2 * 2.5; slopes -0.5 sigma(-1.5) - 2 / 4 and 0.5 sigma(-1.5). Reversed
    # HIGH + 2 * 1.4. At the reference ln 2 + 2 * 2.5, reversed ln 2 + 2 * 1.4.
    "rpo": Row(
        hyper={"beta": 0.5, "alpha": 2},
        loss=LOW + 5,
        slopes=(-0.5912127619031782, 0.0912127619031782),
        rewards=(1.0, -0.5),
        soft=(0.75, expected(0.75, LOW + 5, HIGH + 2.8)),
        at_reference=(LN2 + 5, LN2 + expected(0.7, 5, 2.8)),
    ),
    # a_w = -1 nat a token, a_l = -2, gamma = 2 * 0.5 = 1, z = 2 (-1 + 2) = 2: log(1 + e^-1); slopes
    # -sigma(-1) 2 / 4 and sigma(-1) 2 / 10. Reversed log(1 + e^3): the margin stays on the side of the loser.
    "simpo": Row(
        pair=(-4.0, -20.0, 0.0, 0.0, 4, 10),
        loss=0.31326168751822286,
        slopes=(-0.13447071068499755, 0.05378828427399902),
        rewards=(-2.0, -4.0),
        soft=(0.75, expected(0.75, 0.31326168751822286, 3.048587351573742)),
        at_reference=None,
    ),
    # Gap 1/2: (1 - 1/2) + 0.1 * 10; slopes -1 - 0.1 and 1. Reversed (1 + 1/2) + 0.1 * 10.5.
    "slic": Row(
        pair=(-10.0, -10.5, 0.0, 0.0, 3, 8),
        loss=1.5,
        slopes=(-1.1, 1.0),
        rewards=(-10.0, -10.5),
        soft=(0.75, expected(0.75, 1.5, 2.55)),
        at_reference=None,
    ),
    # Targets 0.5 / 0.1 = 5 and -5: ((2 - 5)^2 + (-1 + 5)^2) / 2; slopes 2 - 5 and -1 + 5. p = 0.8: targets 3 and -3.
    # At the reference (p - 1/2)^2 / beta^2.
    "sppo": Row(
        hyper={"beta": 0.1},
        loss=12.5,
        slopes=(-3.0, 4.0),
        rewards=(2.0, -1.0),
        soft=(0.8, 2.5),
        at_reference=(25, 4),
    ),
    # As DPO.
    "trdpo": Row(
        hyper={"beta": 0.5},
        loss=LOW,
        slopes=(-0.0912127619031782, 0.0912127619031782),
        rewards=(1.0, -0.5),
        soft=(0.8, expected(0.8, LOW, HIGH)),
    ),
}

ELSEWHERE = {
    "aot": "compares the pairs of a batch with each other",
    "lddpo": "reads tokens",
    "mixture": "is its parts'",
    "wpo": "reads tokens",
}
"""Objectives over pairs that one pair's sums do not say all of, and why: their hand numbers are in their own files."""


def test_every_objective_over_pairs_has_a_row():
    assert {*TABLE, *ELSEWHERE} == {name for name in names() if find(name).view == "pairs"}


def build(row: Row, name: str) -> Objective:
    return find(name)(**row.hyper)


def record(row: Row, copies: int = 1, **labels) -> PairLogps:
    pc, pr, rc, rr, cl, rl = (torch.tensor([one] * copies, dtype=torch.float64) for one in row.pair)
    mean = None if row.mean_log_ratio is None else torch.tensor(row.mean_log_ratio, dtype=torch.float64)
    return PairLogps(
        policy_chosen=pc.requires_grad_(),
        policy_rejected=pr.requires_grad_(),
        reference_chosen=None if row.at_reference is None else rc,
        reference_rejected=None if row.at_reference is None else rr,
        chosen_length=cl.long(),
        rejected_length=rl.long(),
        mean_log_ratio=mean,
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in labels.items()},
    )


rows = pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=TABLE)


@rows
def test_a_certain_label(name: str, row: Row):
    logps = record(row)
    out = build(row, name)(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(row.loss, abs=1e-12)
    slopes = logps.policy_chosen.grad.item(), logps.policy_rejected.grad.item()
    assert slopes == pytest.approx(row.slopes, abs=1e-12)
    assert out.rewards[0].tolist() == pytest.approx(row.rewards, abs=1e-12)


@rows
def test_metrics_are_of_the_rewards_and_of_the_sums_over_tokens(name: str, row: Row):
    metrics = {key: value.item() for key, value in build(row, name)(record(row)).metrics.items()}
    chosen, rejected, _, _, chosen_length, rejected_length = row.pair
    assert metrics == pytest.approx(
        {
            "reward/chosen": row.rewards[0],
            "reward/rejected": row.rewards[1],
            "reward/margin": row.rewards[0] - row.rewards[1],
            "reward/accuracy": 1.0 if row.rewards[0] > row.rewards[1] else 0.0,
            "logp/chosen": chosen,
            "logp/rejected": rejected,
            "length/chosen": chosen_length,
            "length/rejected": rejected_length,
        },
        abs=1e-12,
    )


@rows
def test_a_soft_label(name: str, row: Row):
    preference, loss = row.soft
    assert build(row, name)(record(row, preference=[preference])).loss.item() == pytest.approx(loss, abs=1e-12)


@rows
def test_a_weight_multiplies_its_pair_and_the_mean_is_over_pairs(name: str, row: Row):
    out = build(row, name)(record(row, copies=3, weight=[3.0, 1.0, 0.0]))
    assert out.losses.tolist() == pytest.approx([3 * row.loss, row.loss, 0], abs=1e-12)
    assert out.loss.item() == pytest.approx(4 * row.loss / 3, abs=1e-12)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.at_reference is not None])
def test_where_the_policy_equals_the_reference(name: str):
    row = TABLE[name]
    logps = record(row, copies=2, preference=[1.0, 0.7])
    same = replace(logps, reference_chosen=logps.policy_chosen, reference_rejected=logps.policy_rejected)
    assert build(row, name)(same).losses.tolist() == pytest.approx(row.at_reference, abs=1e-12)


REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "aot": {"beta": (0, -1.0)},
    "apodown": {"beta": (0, -0.1)},
    "apozero": {"beta": (0, -0.1)},
    "apozerounpaired": {"beta": (0, -1.0)},
    "bco": {"beta": (0, -1.0)},
    "bcopair": {"beta": (0, -0.1)},
    "cdpo": {"beta": (0, -0.1), "label_smoothing": (-0.1, 0.5, 1)},
    "cpo": {"beta": (0, -1.0), "alpha": (-1.0,)},
    "discopop": {"beta": (0, -1.0), "tau": (0, 1.5)},
    "dpo": {"beta": (0, 0.0, -0.1)},
    "dponorm": {"beta": (0, -0.1)},
    "dpop": {"beta": (0,), "penalty_weight": (-1,)},
    "exo": {"beta": (0, -0.1), "epsilon": (0, 0.5, -0.1, 1)},
    "fdpo": {"beta": (0,), "alpha": (0, 1)},
    "hinge": {"beta": (0, -0.1)},
    "ipo": {"tau": (0, -1.0)},
    "kto": {"beta": (0, -1.0), "desirable_weight": (0, -1.0), "undesirable_weight": (0, -1.0)},
    "lddpo": {"beta": (0,), "alpha": (-0.1, 1.1)},
    "nca": {"beta": (0, -0.1)},
    "orpo": {"odds_ratio_weight": (0, -1.0)},
    "rdpo": {"beta": (0,), "alpha": (-0.01,)},
    "robustdpo": {"beta": (0, -0.1), "label_smoothing": (-0.1, 0.5, 1)},
    "rpo": {"beta": (0,), "alpha": (-0.1,)},
    "simpo": {"beta": (0, -1.0), "gamma_beta_ratio": (-1.0,)},
    "slic": {"delta": (0, -1.0), "regularisation_weight": (0, -1.0)},
    "sppo": {"beta": (0, -0.1)},
    "trdpo": {"beta": (0,), "alpha": (0, 1.1), "tau": (0, -512)},
    "wpo": {"beta": (0, -1.0)},
}
"""Values just outside each hyper-parameter's range."""
NEVER = (math.nan, math.inf, True)
"""No number, or none to compute with."""


def test_every_number_has_a_range():
    stated = {
        name: {f.name for f in fields(find(name)) if f.init and get_type_hints(find(name))[f.name] in (Number, int)}
        for name in names()
        if find(name).view in ("pairs", "judgements", "demonstrations")
    }
    assert {name: set(ranges) for name, ranges in REFUSED.items()} == {n: found for n, found in stated.items() if found}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name, ranges in REFUSED.items() for field in ranges])
def test_a_hyper_parameter_outside_its_range_is_refused(name: str, field: str):
    kind = find(name)
    never = NEVER if get_type_hints(kind)[field] == Number else (True,)  # the test run's type checks refuse the others
    for value in (*REFUSED[name][field], *never):
        with pytest.raises(ValueError, match=rf"^{kind.__name__}\.{field} must be .*, got {value!r}$"):
            kind(**{field: value})
