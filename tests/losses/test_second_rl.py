"""Rewards, credit, losses and gradients equal those of `second_rl.py`, to nine digits, in float64."""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from math import isclose
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpo.losses import RankingObjective, RolloutObjective, credit, find, names
from dpo.losses.ppo import PPO
from dpo.types import RankingScores, Rollout


def _second() -> ModuleType:
    """The neighbouring file: tests are no package, so it has no import path."""
    spec = spec_from_file_location("second_rl", Path(__file__).with_name("second_rl.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


second = _second()

ROLLOUT_VARIANTS: dict[str, list[dict[str, Any]]] = {  # beside the defaults
    "ppo": [
        {"kl_coefficient": 0.7, "gamma": 0.9, "gae_lambda": 0.6},
        {"gae_lambda": 0.0, "whiten_advantages": False},
        {"gae_lambda": 1.0, "whiten_advantages": False, "kl_coefficient": 0.0},
        {"whiten_rewards": True, "kl_coefficient": 0.3},
        {"whiten_rewards": True, "whiten_advantages": False},
        {"clip": 0.05, "value_clip": 0.02, "value_coefficient": 1.3},
        {"clip": 0.5, "value_clip": 2.0, "value_coefficient": 0.0},
        {"ptx_coefficient": 27.8},
    ],
    "rloo": [{"kl_coefficient": 0.8}, {"kl_coefficient": 0.0, "clip": 0.05}, {"clip": 0.9}],
    "grpo": [
        {"kl_coefficient": 0.6},
        {"aggregation": "sequence", "kl_coefficient": 0.6},
        {"aggregation": "constant", "kl_coefficient": 0.6, "max_completion_length": 11},
        {"scale_by_std": False, "clip": 0.05},
        {"clip_high": 0.28},
        {"clip": 0.3, "clip_high": 0.01, "aggregation": "sequence"},
    ],
}
RANKING_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "bradleyterry": [{"margin_weight": 0.8}, {"centring_weight": 0.3}, {"margin_weight": 1.0, "centring_weight": 0.01}],
    "kwise": [{"margin_weight": 0.8}, {"centring_weight": 0.3}, {"margin_weight": 1.0, "centring_weight": 0.01}],
    "plackettluce": [],
}


def runs(variants: dict[str, list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, hyper) for name, others in variants.items() for hyper in ({}, *others)]


def test_every_objective_of_these_views_has_a_second_implementation():
    for base, here in ((RolloutObjective, second.ROLLOUT), (RankingObjective, second.RANKING)):
        held = {name for name in names() if issubclass(find(name), base)}
        assert held == set(here), "write each as a formula in second_rl.py, and name hyper-parameters of it here"
    assert set(second.CREDIT) == set(second.ROLLOUT) == set(ROLLOUT_VARIANTS)
    assert set(second.RANKING) == set(RANKING_VARIANTS)


def close(got: float, expected: Any) -> bool:
    return isclose(got, float(expected), rel_tol=1e-9, abs_tol=1e-11)


def agree(got: Sequence[float], expected: Sequence[Any], place: str) -> None:
    assert len(got) == len(expected), place
    for row, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert close(mine, theirs), f"{place}, {row}: got {mine}, expected {float(theirs)}"


# Completions that a policy sampled


def sampled(seed: int, *, drift: float = 0.3, groups: Sequence[int] = (0, 0, 0, 1, 1, 2, 2)) -> list[Any]:
    """Ragged completions of prompts in no order; the policy is `drift` nats a token from the one that wrote them."""
    rng = random.Random(seed)
    prompts = [3 * group + 1 for group in groups]
    rng.shuffle(prompts)

    def draw(mean: float, deviation: float, length: int):
        return [rng.gauss(mean, deviation) for _ in range(length)]

    batch = []
    for prompt in prompts:
        length = rng.choice([1, 2, 3, 5])
        sampler = [-rng.uniform(0.1, 3) for _ in range(length)]
        sampler_value = draw(0.3, 1, length)
        rows = {
            "sampler": sampler,
            "policy": [s + d for s, d in zip(sampler, draw(0, drift, length), strict=True)],
            "reference": [s + d for s, d in zip(sampler, draw(-0.2, 0.6, length), strict=True)],
            "sampler_value": sampler_value,
            "value": [s + d for s, d in zip(sampler_value, draw(0, drift, length), strict=True)],
        }
        rows = {name: tuple(second.number(value) for value in row) for name, row in rows.items()}
        batch.append(
            second.Sampled(
                prompt=prompt,
                score=second.number(rng.gauss(0.5, 2)),
                demonstration=second.number(-rng.uniform(1, 40)),
                demonstration_length=rng.randint(1, 9),
                **rows,
            )
        )
    return batch


def rows(values: Sequence[Sequence[Any]], padding: int = 0) -> Tensor:
    padded = pad_sequence(
        [torch.tensor([float(x) for x in row], dtype=torch.float64) for row in values], batch_first=True
    )
    return torch.nn.functional.pad(padded, (0, padding))


def column(values: Sequence[Any]) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def rollout(objective: RolloutObjective, batch: Sequence[Any], padding: int = 0) -> Rollout:
    """The record of a batch; what the objective does not ask for is None."""

    def tokens(name: str) -> Tensor:
        return rows([getattr(y, name) for y in batch], padding)

    asked = objective.needs_demonstrations
    return Rollout(
        policy=tokens("policy").requires_grad_(),
        sampler=tokens("sampler"),
        completion_mask=rows([[1.0] * y.length for y in batch], padding).bool(),
        score=column([y.score for y in batch]),
        prompt_index=torch.tensor([y.prompt for y in batch]),
        reference=tokens("reference") if objective.needs_reference else None,
        value=tokens("value").requires_grad_() if objective.needs_values else None,
        sampler_value=tokens("sampler_value") if objective.needs_values else None,
        demonstration=column([y.demonstration for y in batch]).requires_grad_() if asked else None,
        demonstration_length=torch.tensor([y.demonstration_length for y in batch]) if asked else None,
    )


def made(name: str, hyper: dict[str, Any]) -> RolloutObjective:
    objective = find(name)(**hyper)
    assert isinstance(objective, RolloutObjective)
    return objective


def credited(objective: RolloutObjective, record: Rollout) -> Rollout:
    return objective.credit(record, objective.kl_coefficient)


def flat(values: Tensor, mask: Tensor) -> list[float]:
    return values[mask].tolist()


@pytest.mark.parametrize(("name", "hyper"), runs(ROLLOUT_VARIANTS), ids=str)
def test_credit_is_that_of_the_second_implementation(name: str, hyper: dict[str, Any]):
    objective = made(name, hyper)
    for seed in range(4):
        batch = sampled(seed)
        for padding in (0, 3):
            out = credited(objective, rollout(objective, batch, padding))
            expected = second.CREDIT[name](batch, **hyper)
            assert out.advantage is not None
            mask = out.completion_mask
            agree(flat(out.advantage, mask), [a for y in expected for a in y.advantage], f"advantages of seed {seed}")
            assert not out.advantage[~mask].any()
            assert not out.advantage.requires_grad
            if objective.needs_values:
                assert out.value_target is not None
                agree(flat(out.value_target, mask), [t for y in expected for t in y.target], f"targets of seed {seed}")
                assert not out.value_target.requires_grad


def test_credit_takes_the_coefficient_it_is_given():
    # The controller moves it: the field is only where it starts.
    batch = sampled(9)
    for name in ("ppo", "rloo"):
        objective = made(name, {})
        out = objective.credit(rollout(objective, batch), 0.9)
        assert out.advantage is not None
        expected = second.CREDIT[name](batch, kl_coefficient=0.9)
        agree(flat(out.advantage, out.completion_mask), [a for y in expected for a in y.advantage], name)


def test_a_group_of_equal_scores_earns_nothing():
    batch = [replace(y, score=second.number("1.5")) if y.prompt == 1 else y for y in sampled(2)]
    objective = made("grpo", {})
    out = credited(objective, rollout(objective, batch))
    assert out.advantage is not None
    equal = out.prompt_index == 1
    assert not out.advantage[equal].any()
    assert out.advantage[~equal].any()


@pytest.mark.parametrize(("name", "hyper"), runs(ROLLOUT_VARIANTS), ids=str)
def test_losses_and_gradients_are_those_of_the_second_implementation(name: str, hyper: dict[str, Any]):
    objective = made(name, hyper)
    for seed, drift in ((4, 0.0), (5, 0.3), (6, 2.0)):
        batch = second.CREDIT[name](sampled(seed, drift=drift), **hyper)
        mean_length = second.mean([second.number(y.length) for y in batch])
        record = credited(objective, rollout(objective, batch, padding=seed % 2))
        out = objective(record)
        place = f"seed {seed}"
        agree(out.losses.tolist(), [second.ROLLOUT[name](y, mean_length, **hyper) for y in batch], f"losses, {place}")
        assert close(out.loss.item(), out.losses.mean().item())
        agree(out.rewards.tolist(), [y.score for y in batch], f"rewards, {place}")
        for metric, expected in second.rollout_metrics(name, batch, hyper).items():
            if name == "ppo" or metric in out.metrics:
                assert close(out.metrics[metric].item(), expected), (metric, out.metrics[metric], float(expected))
        assert ("ptx/loss" in out.metrics) == objective.needs_demonstrations
        out.losses.sum().backward()
        for field in trained(objective):
            gradient = getattr(record, field).grad
            assert gradient is not None, f"no gradient reaches {field}"
            for row, y in enumerate(batch):
                for token in range(1 if field == "demonstration" else y.length):

                    def moved(by, y=y, field=field, token=token, mean_length=mean_length):
                        return second.ROLLOUT[name](y.raised(field, token, by), mean_length, **hyper)

                    got = gradient[row] if field == "demonstration" else gradient[row, token]
                    wanted = second.slope(moved)
                    assert close(got.item(), wanted), f"{place}, d / d {field}[{row}, {token}]: {got} not {wanted}"
            if field != "demonstration":
                assert not gradient[~record.completion_mask].any(), f"padding of {field} is trained"


def trained(objective: RolloutObjective) -> list[str]:
    asked = {"value": objective.needs_values, "demonstration": objective.needs_demonstrations}
    return ["policy", *(field for field, needed in asked.items() if needed)]


@pytest.mark.parametrize(("name", "hyper"), runs(ROLLOUT_VARIANTS), ids=str)
def test_micro_batches_give_the_losses_of_the_step(name: str, hyper: dict[str, Any]):
    objective = made(name, hyper)
    batch = sampled(7)
    whole = credited(objective, rollout(objective, batch))
    length = column([sum(y.length for y in batch) / len(batch)])[0]

    def part(rows: slice) -> Rollout:
        fields = {name: value[rows] for name, value in vars(whole).items() if value is not None}
        return Rollout(**fields | {"tokens_per_completion": length})

    losses = torch.cat([objective(part(rows)).losses for rows in (slice(0, 2), slice(2, 3), slice(3, None))])
    agree(losses.tolist(), objective(whole).losses.tolist(), "losses")


@pytest.mark.parametrize("kl", [-4.0, 0.0, 3.0, 4.81, 6.0, 6.5, 7.19, 7.21, 50.0])
@pytest.mark.parametrize("completions", [1, 64])
def test_the_adapted_coefficient_is_zieglers(kl: float, completions: int):
    objective = PPO(kl_target=6, kl_horizon=1000)
    expected = second.adapted_coefficient(0.15, kl, completions, kl_target=6, kl_horizon=1000)
    assert close(objective.next_kl_coefficient(0.15, kl, completions), expected)


def test_without_a_target_the_coefficient_stays():
    assert PPO().next_kl_coefficient(0.15, 80.0, 64) == 0.15


# Rankings

PREFERENCES = (1.0, 0.75, 0.5, 0.9)
WEIGHTS = (2.5, 1.0, 0.3, 1.7, 0.0)


def ranked(seed: int, name: str, *, certain: bool = False, ties: bool = True) -> list[Any]:
    """Prompts with 2 to 5 completions in any order; where ties are, one prompt has nothing but a tie."""
    rng = random.Random(seed)
    batch = []
    for place in range(6):
        size = 2 if name == "bradleyterry" else rng.randint(2, 5)
        rank = rng.sample(range(size), size)
        if ties and place % 2:
            rank = [min(one, rng.randrange(size)) for one in rank]
        if ties and place == 3:
            rank = [0] * size
        batch.append(
            second.Ranked(
                scores=tuple(second.number(rng.gauss(0, 2)) for _ in range(size)),
                rank=tuple(rank),
                rating=tuple(second.number(5 - one + rng.random()) for one in rank),
                preference=1.0 if certain else PREFERENCES[(place + seed) % 4],
                weight=WEIGHTS[(place + seed) % 5],
            )
        )
    return batch


def scored(batch: Sequence[Any]) -> RankingScores:
    def optional(name: str) -> Tensor | None:
        values = [getattr(one, name) for one in batch]
        return None if values[0] is None else column(values)

    rating = None if batch[0].rating is None else column([value for one in batch for value in one.rating])
    return RankingScores(
        scores=column([score for one in batch for score in one.scores]).requires_grad_(),
        rank=torch.tensor([place for one in batch for place in one.rank]),
        prompt_index=torch.tensor([index for index, one in enumerate(batch) for _ in one.scores]),
        margin=rating,
        preference=optional("preference"),
        weight=optional("weight"),
    )


def compare(name: str, hyper: dict[str, Any], batch: Sequence[Any], place: str) -> None:
    objective = find(name)(**hyper)
    record = scored(batch)
    out = objective(record)
    agree(out.losses.tolist(), [second.weighted(name, one, hyper) for one in batch], f"losses, {place}")
    assert close(out.loss.item(), out.losses.mean().item())
    agree(out.rewards.tolist(), [score for one in batch for score in one.scores], f"rewards, {place}")
    out.losses.sum().backward()
    assert record.scores.grad is not None
    wanted = []
    for one in batch:
        for which in range(len(one.scores)):
            loss: Callable[[Any], Any] = lambda by, one=one, which=which: second.weighted(  # noqa: E731
                name, one.raised(which, by), hyper
            )
            wanted.append(second.slope(loss))
    agree(record.scores.grad.tolist(), wanted, f"gradients, {place}")


@pytest.mark.parametrize(("name", "hyper"), runs(RANKING_VARIANTS), ids=str)
def test_rankings_have_the_losses_and_gradients_of_the_second_implementation(name: str, hyper: dict[str, Any]):
    certain, ties = find(name).needs_certain_labels, name != "bradleyterry"
    for seed in range(4):
        batch = ranked(seed, name, certain=certain, ties=ties)
        compare(name, hyper, batch, f"seed {seed}")
        bare = [replace(one, preference=None, weight=None) for one in batch]
        compare(name, hyper, bare, f"seed {seed}, without preference and weight")
        if not hyper.get("margin_weight"):
            compare(name, hyper, [replace(one, rating=None) for one in batch], f"seed {seed}, without ratings")


# The equations one by one


def test_estimators_of_the_kl_and_their_gradients():
    rng = random.Random(0)
    pairs = [(-rng.uniform(0, 6), -rng.uniform(0, 6)) for _ in range(30)] + [(-1.5, -1.5), (-0.0, -15.0), (-15.0, -0.0)]
    log_q = column([q for _, q in pairs])
    for name in ("k1", "k2", "k3"):
        log_p = column([p for p, _ in pairs]).requires_grad_()
        got = getattr(credit, name)(log_p, log_q)
        got.sum().backward()
        assert log_p.grad is not None
        exact = [(second.number(p), second.number(q)) for p, q in pairs]
        agree(got.tolist(), [getattr(second, name)(p, q) for p, q in exact], name)
        slopes = [second.slope(lambda by, p=p, q=q, name=name: getattr(second, name)(p + by, q)) for p, q in exact]
        agree(log_p.grad.tolist(), slopes, f"gradients of {name}")


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_reads_the_sampled_tokens_alone(shift_mean: bool):
    batch = [y.value for y in sampled(8)]
    mask = rows([[1.0] * len(row) for row in batch], padding=2).bool()
    values = torch.where(mask, rows(batch, padding=2), 1e6)
    got = credit.whitened(values, mask, shift_mean=shift_mean)
    expected = second.whitened(batch, shift_mean=shift_mean)
    agree(flat(got, mask), [value for row in expected for value in row], "whitened")
    assert not got[~mask].any()


# The second implementation itself


def test_the_second_generalised_advantage_is_that_of_a_hand_computed_example():
    # Rewards (1, 0, 2), values (0.5, 1, -1), γ = 1, λ = 1/2: δ = (1 + 1 - 0.5, 0 - 1 - 1, 2 + 1) = (1.5, -2, 3);
    # A_2 = 3, A_1 = -2 + 3/2 = -0.5, A_0 = 1.5 - 0.25 = 1.25.
    got = second.gae((1, 0, 2), (second.number("0.5"), 1, -1), 1, second.number("0.5"))
    assert [float(a) for a in got] == [1.25, -0.5, 3]


def test_whitening_of_the_second_implementation():
    # (1, 2, 6, 3): mean 3, squares 4 + 1 + 9 + 0 = 14, variance 14 / 4; without the shift the mean stays 3.
    scale = 3.5**0.5
    shifted, kept = (second.whitened([(1, 2), (6, 3)], shift_mean=shift) for shift in (True, False))
    assert [float(x) for row in shifted for x in row] == pytest.approx([-2 / scale, -1 / scale, 3 / scale, 0])
    assert [float(x) for row in kept for x in row] == pytest.approx([3 - 2 / scale, 3 - 1 / scale, 3 + 3 / scale, 3])
