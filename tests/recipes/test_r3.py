"""R3 shows the orderings that it claims, at its smallest size, and its exact policies are those of closed forms."""

import math
import runpy
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from dpo.recipes.reproductions.r3_overoptimisation import (
    ANSWERS,
    OPTIMISERS,
    REWARDS,
    Curve,
    best_of,
    gibbs_at,
    measure,
    report,
    rewards,
)
from dpo.recipes.reproductions.tabular import column, kl

EXACT = ("best-of-n", "Gibbs")
SCRIPT = Path(__file__).parents[2] / "recipes" / "reproductions" / "r3_overoptimisation.py"
UNIFORM = torch.full((ANSWERS,), -math.log(ANSWERS), dtype=torch.float64)


def test_best_of_n_equals_an_enumeration():
    # Every triple of 5 answers is as likely as any other; its best is what is written.
    reward = column([0.3, -1.0, 2.0, 0.0, 0.7])
    wins = torch.zeros(5, dtype=torch.float64)
    for drawn in product(range(5), repeat=3):
        wins[max(drawn, key=lambda answer: reward[answer].item())] += 1
    torch.testing.assert_close(best_of(3, reward).exp(), wins / 5**3)


@pytest.mark.parametrize("n", [1, 4, 64, 512])
def test_best_of_ns_kl_is_the_formula(n: int):
    # log n - (n - 1) / n is the KL over infinitely many answers; over finitely many it is less, by O(n / answers).
    policy = best_of(n, torch.arange(ANSWERS, dtype=torch.float64))
    away, bound = kl(policy, UNIFORM).item(), math.log(n) - (n - 1) / n
    assert policy.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert bound - n / ANSWERS < away <= bound + 1e-12


def test_the_gibbs_law_earns_most_at_its_kl():
    reward = torch.randn(ANSWERS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    away = kl(best_of(16, reward), UNIFORM).item()
    law = gibbs_at(reward, away)
    assert kl(law, UNIFORM).item() == pytest.approx(away, abs=1e-9)
    slope = (law - UNIFORM).diff() / reward.diff()
    torch.testing.assert_close(slope, slope[0].expand_as(slope))  # log(policy / reference) is linear in the reward
    assert law.exp() @ reward > best_of(16, reward).exp() @ reward
    torch.testing.assert_close(gibbs_at(reward, 0), UNIFORM, rtol=0, atol=1e-3)


def test_the_rewards_are_the_papers():
    # Two models: 1 and 3 have mean 2, variance 1, minimum 1; 0 and 0 are certain.
    found = rewards(column([5.0, 6.0]), torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64))
    assert {name: models.tolist() for name, models in found.items()} == {
        "gold": [[5, 6]],
        "one model": [[1, 0], [3, 0]],
        "mean": [[2, 0]],
        "mean - variance": [[1, 0]],
        "minimum": [[1, 0]],
    }


@pytest.fixture(scope="module")
def curves() -> list[Curve]:
    return measure((1, 16, 128, 512), seeds=3, optimisers=EXACT) + measure(
        (1, 8, 64), seeds=2, updates=200, optimisers=("RLOO",)
    )


def by_reward(curves: list[Curve], optimiser: str) -> dict[str, Curve]:
    return {curve.reward: curve for curve in curves if curve.optimiser == optimiser}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_learned_rewards_part_from_the_true_one(curves: list[Curve], optimiser: str):
    found = by_reward(curves, optimiser)
    best = found["gold"].gold
    assert (best.diff(dim=0) > 0).all()  # optimising the true reward never stops to pay
    assert torch.equal(best, found["gold"].proxy)
    for name in REWARDS:
        gold, proxy = found[name].gold.mean(1), found[name].proxy.mean(1)
        assert (proxy.diff() > 0).all()
        assert gold[1] > 0
        assert gold[-1] < best.mean(1)[-1]
        assert ((proxy - gold).diff() > 0).all()


@pytest.mark.parametrize("optimiser", EXACT)
def test_one_models_policy_turns_and_cautious_ensembles_resist(curves: list[Curve], optimiser: str):
    found = by_reward(curves, optimiser)
    single = found["one model"].gold.mean(1)
    assert single[-1] < single[1]  # lower at 5.2 nats than at 1.8
    assert found["one model"].fall.mean() > 0
    end = {name: curve.gold[-1].mean() for name, curve in found.items()}
    assert max(end["one model"], end["mean"]) < min(end["mean - variance"], end["minimum"])


def test_the_mean_beats_one_model_in_best_of_n(curves: list[Curve]):
    found = by_reward(curves, "best-of-n")
    assert (found["mean"].gold[1:] > found["one model"].gold[1:]).all()


def test_policies_that_stay_too_near_are_an_error():
    with pytest.raises(RuntimeError, match=r"^r3: RLOO ended at a KL of 0\.\d\d nats, expected 5\.24: give"):
        measure((1, 512), seeds=1, updates=2, optimisers=("RLOO",))


def test_the_report_holds_every_curve(curves: list[Curve], tmp_path: Path):
    made = report([curve for curve in curves if curve.optimiser in EXACT])
    assert [row[:2] for row in made.rows] == [(o, r) for o in EXACT for r in ("gold", *REWARDS)]
    assert {len(row) for row in made.rows} == {len(made.header)}
    assert "3 seeds" in made.protocol
    assert len(made.figure.axes) == len(EXACT)
    made.save(tmp_path / "r3.svg")
    assert (tmp_path / "r3.svg").read_bytes().startswith(b"<?xml")


def test_the_script_says_what_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    assert "usage: r3_overoptimisation.py" in said
    assert "R3: " in said
