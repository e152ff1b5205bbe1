"""Each objective's losses and gradients equal those of `second.py`, to nine digits, in float64."""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from itertools import cycle
from math import isclose
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo.losses import MovesReference, Objective, Part, find, names
from dpo.types import JudgementLogps, LossInput, PairLogps, TokenLogps


def _second() -> ModuleType:
    """The neighbouring file: tests are no package, so it has no import path."""
    spec = spec_from_file_location("second", Path(__file__).with_name("second.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


second = _second()

VARIANTS: dict[str, list[dict[str, Any]]] = {  # beside the defaults
    "aot": [{"pairing": "unpaired"}, {"beta": 0.7}, {"beta": 0.7, "pairing": "unpaired"}],
    "apodown": [{"beta": 0.8}],
    "apozero": [{"beta": 0.8}],
    "apozerounpaired": [{"beta": 0.8}],
    "bco": [{"beta": 0.8}],
    "bcopair": [{"beta": 0.8}],
    "cdpo": [{"beta": 0.8, "label_smoothing": 0.3}, {"label_smoothing": 0.0}],
    "cpo": [{"beta": 0.8, "alpha": 0.3}, {"alpha": 0.0}],
    "discopop": [{"beta": 0.3, "tau": 0.6}, {"beta": 1.0, "tau": 1.0}],
    "dpo": [{"beta": 2.5}],
    "dponorm": [{"beta": 0.8}],
    "dpop": [{"beta": 0.1, "penalty_weight": 3.0}, {"penalty_weight": 0.5}],
    "exo": [{"beta": 0.8, "epsilon": 0.2}],
    "fdpo": [
        {"divergence": "reverse_kl", "beta": 0.4},
        {"divergence": "forward_kl", "beta": 0.4},
        {"divergence": "js"},
        {"divergence": "js", "beta": 1.5},
        {"divergence": "alpha"},
        {"divergence": "alpha", "alpha": 0.2, "beta": 0.4},
        {"divergence": "alpha", "alpha": 0.9},
    ],
    "hinge": [{"beta": 0.8}],
    "ipo": [{"reduction": "sum"}, {"tau": 0.7}, {"tau": 0.7, "reduction": "sum"}],
    "kto": [{"beta": 0.8, "desirable_weight": 1.7, "undesirable_weight": 0.6}],
    "lddpo": [{"alpha": 0.0}, {"alpha": 1.0}, {"beta": 0.8, "alpha": 0.2}],
    "mixture": [
        {"parts": ((1.5, "ipo", {"tau": 0.7}), (0.4, "sft", {"reduction": "sum"}))},
        {"parts": ((0.5, "simpo", {}), (2.0, "slic", {"delta": 3.0}))},
        {"parts": ((0.5, "lddpo", {}), (2.0, "wpo", {"beta": 0.8}))},
        {"parts": ((0.5, "aot", {"beta": 0.7}), (2.0, "bcopair", {}))},
    ],
    "nca": [{"beta": 0.8}],
    "orpo": [{"odds_ratio_weight": 1.3}],
    "rdpo": [{"beta": 0.8, "alpha": 0.3}],
    "robustdpo": [{"beta": 0.8, "label_smoothing": 0.3}, {"label_smoothing": 0.0}],
    "rpo": [{"beta": 0.8, "alpha": 0.3}, {"alpha": 2.0}],
    "sft": [{"reduction": "sum"}],
    "simpo": [{"beta": 0.8, "gamma_beta_ratio": 1.3}, {"gamma_beta_ratio": 0.0}],
    "slic": [{"delta": 4.0, "regularisation_weight": 0.7}],
    "sppo": [{"beta": 0.3}],
    "trdpo": [{"beta": 0.8, "alpha": 1.0, "tau": 3}],
    "wpo": [{"beta": 0.8}],
}
OFFLINE = [name for name in names() if find(name).view in ("pairs", "judgements", "demonstrations")]
"""Those over rankings and rollouts have theirs in second_rl.py."""
RUNS = [(name, hyper) for name in OFFLINE for hyper in ({}, *VARIANTS.get(name, []))]
PREFERENCES = (0.5, 0.75, 1.0, 0.9)
WEIGHTS = (2.5, 1.0, 0.3, 1.7, 0.0)
GRID = 2**44


def test_every_objective_has_a_second_implementation():
    missing = [name for name in OFFLINE if name not in VARIANTS or name not in second.EACH | second.TOGETHER]
    assert not missing, f"write each as a formula in second.py, and name hyper-parameters of it in VARIANTS: {missing}"


def build(name: str, hyper: dict[str, Any]) -> Objective:
    """Make an objective, and those it is a sum of, from names and hyper-parameters."""
    parts = {"parts": tuple(Part(weight, build(part, its)) for weight, part, its in hyper.get("parts", ()))}
    return find(name)(**hyper | parts if "parts" in hyper else hyper)


# Examples: completions as (tokens, policy's sum, reference's sum)

Sums = tuple[int, float, float]


def completion(rng: random.Random, sums: Sums):
    """Spread the sums over tokens, each model's differently unless the models are equal.

    Tokens are multiples of a power of two, so that float64 adds them without rounding: e^30 would amplify it.
    """
    length, policy, reference = sums

    def spread(total: float) -> list[float]:
        shares = [rng.uniform(0.2, 1) for _ in range(length)]
        tokens = [round(total * share / sum(shares) * GRID) for share in shares[1:]]
        return [token / GRID for token in (round(total * GRID) - sum(tokens), *tokens)]

    of_reference = spread(reference)
    of_policy = of_reference if policy == reference else spread(policy)
    collisions = [-rng.uniform(0, 1.5) for _ in range(length)]
    return second.completion(of_policy, of_reference, collisions)


def random_sums(rng: random.Random, drift: float = 1.5) -> Sums:
    length = rng.randint(1, 6)
    policy, move = -length * rng.uniform(0.5, 1.5), drift * rng.gauss(0, 1)
    return length, policy, min(policy + move, -0.01)


def drawn(seed: int, size: int = 6) -> list[tuple[Sums, Sums]]:
    rng = random.Random(seed)
    return [(random_sums(rng), random_sums(rng)) for _ in range(size)]


def margins(objective: Objective) -> list[tuple[Sums, Sums]]:
    """beta times the margin is 30 or -30: in one token each, and in more."""
    beta = 1.0 if type(objective).__name__ == "FDPO" else getattr(objective, "beta", 1.0)  # there exp(15 / beta) enters
    gap = 30 / beta
    high, low, middle = -1.0, -1.0 - gap, -1.0 - gap / 2
    return [
        ((1, high, middle), (1, low, middle)),
        ((1, low, middle), (1, high, middle)),
        ((4, high, middle), (2, low, middle)),
        ((4, low, middle), (2, high, middle)),
    ]


def cases(objective: Objective) -> dict[str, list[tuple[Sums, Sums]]]:
    sure, rng = -1e-9, random.Random(9)
    return {
        "random 0": drawn(0),
        "random 1": drawn(1),
        "random 2": drawn(2),
        "one token": [((1, *w[1:]), (1, *v[1:])) for w, v in drawn(3)],
        "equal lengths": [((3, *w[1:]), (3, *v[1:])) for w, v in drawn(4)],
        "policy is reference": [(_at_reference(w), _at_reference(v)) for w, v in drawn(5)],
        "log-ratios of 30": [
            ((rng.randint(1, 4), -50.0 + up, -50.0), (rng.randint(1, 4), -40.0 + down, -40.0))
            for up, down in ((30.0, -30.0), (-30.0, 30.0), (30.0, 30.0), (-30.0, -30.0))
        ],
        "margins of 30": margins(objective),
        "near-certain": [
            ((1, sure, -2.0), (2, -3.0, -2.5)),
            ((3, -2.0, -2.5), (1, sure, -1.0)),
            ((2, sure, -1.0), (3, sure, -2.0)),
            ((1, sure, sure), (1, 2 * sure, sure)),
            ((1, -1e-5, -1.0), (2, -1e-5, -2.0)),
        ],
    }


def _at_reference(sums: Sums) -> Sums:
    return sums[0], sums[2], sums[2]


def examples(objective: Objective, sums: Sequence[tuple[Sums, Sums]], seed: int) -> list[Any]:
    rng = random.Random(seed)
    running, mismatched = ((0.0, (1.2, -0.4, 2.0)), (0.7, (0.3,)), (-2.5, (-3.0, 1.0)))[seed % 3]
    if objective.view == "pairs":
        turned = PREFERENCES[seed % 4 :] + PREFERENCES[: seed % 4]
        return [
            second.Pair(
                chosen=completion(rng, chosen),
                rejected=completion(rng, rejected),
                preference=preference,
                weight=weight,
                mean_log_ratio=running,
            )
            for (chosen, rejected), preference, weight in zip(sums, cycle(turned), cycle(WEIGHTS), strict=False)
        ]
    return [
        second.Judgement(
            completion=completion(rng, one),
            desirable=objective.view == "demonstrations" or place % 2 == seed % 2,
            weight=weight,
            mean_log_ratio=running,
            mismatched=mismatched,
        )
        for place, (one, weight) in enumerate(zip((one for pair in sums for one in pair), cycle(WEIGHTS), strict=False))
    ]


# The same examples as tensors


def column(values: Sequence[Any]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def optional(values: Sequence[Any]) -> Tensor | None:
    return None if values[0] is None else column(values)


def rows(values: Sequence[Sequence[Any]]) -> Tensor:
    return pad_sequence([column(row) for row in values], batch_first=True)


def record(objective: Objective, batch: Sequence[Any]) -> tuple[LossInput, dict[str, Tensor]]:
    """Return the record of the examples, and its leaves by side: sums, or tokens of which the sums are made."""
    sides = [second.completions(example) for example in batch]
    record, leaves = {}, {}
    for side in sides[0]:
        held = [completions[side] for completions in sides]
        mask = rows([[1.0] * y.length for y in held]).bool()
        if objective.needs_tokens:
            leaves[side] = rows([y.policy_tokens for y in held]).requires_grad_()
            record[f"{side}_policy"] = leaves[side].sum(1)
            record[f"{side}_tokens"] = TokenLogps(
                policy=leaves[side],
                reference=rows([y.reference_tokens for y in held]) if objective.needs_reference else None,
                completion_mask=mask,
                log_collision=rows([y.log_collision for y in held]) if objective.needs_collision else None,
            )
        else:
            leaves[side] = record[f"{side}_policy"] = column([y.policy for y in held]).requires_grad_()
        record[f"{side}_reference"] = column([y.reference for y in held]) if objective.needs_reference else None
        record[f"{side}_length"] = mask.sum(1)
    weight = optional([example.weight for example in batch])
    running = column([batch[0].mean_log_ratio])[0] if objective.needs_mean_log_ratio else None
    if objective.view == "pairs":
        pairs = PairLogps(
            policy_chosen=record["chosen_policy"],
            policy_rejected=record["rejected_policy"],
            reference_chosen=record["chosen_reference"],
            reference_rejected=record["rejected_reference"],
            chosen_length=record["chosen_length"],
            rejected_length=record["rejected_length"],
            preference=optional([example.preference for example in batch]),
            weight=weight,
            chosen_tokens=record.get("chosen_tokens"),
            rejected_tokens=record.get("rejected_tokens"),
            mean_log_ratio=running,
        )
        return pairs, leaves
    mismatched = column(batch[0].mismatched) if objective.needs_mismatched else None
    judgements = JudgementLogps(
        policy=record["completion_policy"],
        reference=record["completion_reference"],
        desirable=torch.tensor([example.desirable for example in batch]),
        length=record["completion_length"],
        policy_mismatched=None if mismatched is None else mismatched - 20,
        reference_mismatched=None if mismatched is None else torch.full_like(mismatched, -20),
        weight=weight,
        mean_log_ratio=running,
    )
    return judgements, leaves


def compare(name: str, hyper: dict[str, Any], batch: list[Any], place: str) -> None:
    objective = build(name, hyper)
    logps, leaves = record(objective, batch)
    try:
        expected = second.losses(name, batch, hyper)
    except ValueError:  # the formula holds for certain labels only
        with pytest.raises(ValueError, match="preference"):
            objective(logps)
        compare(name, hyper, [replace(pair, preference=1.0) for pair in batch], place)
        return
    out = objective(logps)
    for row, (got, wanted) in enumerate(zip(out.losses.tolist(), expected, strict=True)):
        assert close(got, wanted), f"{place}, loss {row}: got {got}, expected {float(wanted)}"
    assert close(out.loss.item(), sum(expected) / len(batch)), f"{place}: the loss is not the mean of the losses"
    out.loss.backward()
    for slope in second.slopes(name, batch, hyper, every_token=objective.needs_tokens):
        gradient = leaves[slope.side].grad
        assert gradient is not None, f"{place}: no gradient reaches {slope.side}"
        got = float(gradient[slope.example, slope.token] if objective.needs_tokens else gradient[slope.example])
        between = min(slope.left, slope.right) <= got <= max(slope.left, slope.right)
        assert between or close(got, slope.left) or close(got, slope.right), f"{place}: got {got}, expected {slope}"


def close(got: float, expected: Any) -> bool:
    return isclose(got, float(expected), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize(("name", "hyper"), RUNS, ids=str)
def test_losses_and_gradients_are_those_of_the_second_implementation(name: str, hyper: dict[str, Any]):
    objective = build(name, hyper)
    for seed, (place, sums) in enumerate(cases(objective).items()):
        batch = examples(objective, sums, seed)
        if objective.batch_coupled and place == "policy is reference":  # ties: which weight meets which is left open
            batch = [replace(example, weight=1.0) for example in batch]
        compare(name, hyper, batch, place)
        if objective.view == "pairs":
            compare(name, hyper, [replace(pair, preference=1.0) for pair in batch], f"{place}, certain labels")


@pytest.mark.parametrize("name", OFFLINE)
def test_without_preference_and_weight_labels_are_certain(name: str):
    objective = build(name, {})
    batch = examples(objective, drawn(6), 1)
    plain = [replace(one, weight=None) for one in batch]
    if objective.view == "pairs":
        plain = [replace(pair, preference=None) for pair in plain]
    compare(name, {}, plain, "absent")


@pytest.mark.parametrize("name", [name for name in names() if issubclass(find(name), MovesReference)])
def test_the_policys_share_in_a_moving_reference_is_that_of_the_second_implementation(name: str):
    for hyper in ({}, {"alpha": 0.3, "tau": 4}, {"alpha": 1.0, "tau": 512}):
        objective = find(name)(**hyper)
        assert isinstance(objective, MovesReference)
        for step in (*range(1, 14), 511, 512, 513, 1024):
            assert objective.share(step) == getattr(second, f"{name}_share")(step, **hyper), (hyper, step)


def test_derivatives_of_the_second_implementation_are_exact():
    """Those of DPO are -+ p beta sigma(-z) +- (1 - p) beta sigma(z), over the batch of 1; DPOP's kink shows both."""
    pair = second.Pair(
        chosen=second.completion([-1.0, -2.0], [-2.5, -1.5]),
        rejected=second.completion([-4.0], [-3.0]),
        preference=0.75,
    )
    z = second.number("0.1") * 2
    wanted = -0.75 * second.number("0.1") * second.sigmoid(-z) + 0.25 * second.number("0.1") * second.sigmoid(z)
    chosen, rejected = second.slopes("dpo", [pair], {"beta": second.number("0.1")}, every_token=False)
    assert isclose(chosen.left, wanted, rel_tol=1e-15)
    assert isclose(chosen.right, wanted, rel_tol=1e-15)
    assert isclose(rejected.left, -wanted, rel_tol=1e-15)
    still = second.completion([-1.0], [-1.0])
    kink = next(second.slopes("dpop", [second.Pair(chosen=still, rejected=still)], {"beta": 0.3}, every_token=False))
    assert isclose(kink.left, -0.3 * 51 / 2, rel_tol=1e-12)
    assert isclose(kink.right, -0.3 / 2, rel_tol=1e-12)
