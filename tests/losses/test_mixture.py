"""Mixture in hand numbers: what it adds up, what it asks for, and what it refuses."""

import math
import re
from dataclasses import dataclass, replace
from typing import final

import pytest
import torch

from dpo.losses import DemonstrationObjective, find, names
from dpo.losses.aot import AOT
from dpo.losses.bcopair import BCOPair
from dpo.losses.discopop import DiscoPOP
from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.kto import KTO
from dpo.losses.mixture import Mixture
from dpo.losses.objective import Part
from dpo.losses.reduce import demonstration_output, log_ratio
from dpo.losses.sft import SFT
from dpo.losses.simpo import SimPO
from dpo.losses.testing import example_batch
from dpo.losses.trdpo import TRDPO
from dpo.losses.wpo import WPO
from dpo.types import JudgementLogps, LossOutput, PairLogps


def pairs(rows, preference=None, weight=None, mean_log_ratio=0.0) -> PairLogps:
    """Rows of (L_w, L_l, reference L_w, reference L_l, |w|, |l|)."""
    pc, pr, rc, rr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if values is None else torch.tensor(values, dtype=torch.float64) for values in (preference, weight))
    mean = torch.tensor(mean_log_ratio, dtype=torch.float64)
    pc, pr = pc.requires_grad_(), pr.requires_grad_()
    return PairLogps(pc, pr, rc, rr, cl.long(), rl.long(), p, w, mean_log_ratio=mean)


def mixture(*parts) -> Mixture:
    return Mixture(parts=tuple(Part(weight, objective) for weight, objective in parts))


ROW = (-10.0, -14.0, -12.0, -13.0, 4, 10)
"""r_w = 2 nats over 4 tokens, r_l = -1 nat over 10 tokens; a_w = -2.5 and a_l = -1.4 nats a token."""
IPO_AND_SFT = mixture((0.5, IPO(tau=0.5, reduction="sum")), (3, SFT()))


def test_hand_numbers():
    # IPO: t = 1, (3 - 1)^2 = 4 with the slopes +-4. SFT: 10 / 4 = 2.5 with the slope -1/4.
    # 0.5 * 4 + 3 * 2.5 = 9.5; d / d L_w = 0.5 * 4 - 3/4 = 1.25, d / d L_l = 0.5 * -4 = -2.
    logps = pairs([ROW])
    out = IPO_AND_SFT(logps)
    out.loss.backward()
    assert out.loss.item() == 9.5
    assert (logps.policy_chosen.grad.item(), logps.policy_rejected.grad.item()) == (1.25, -2)
    assert (out.metrics["custom/ipo_loss"].item(), out.metrics["custom/sft_loss"].item()) == (4, 2.5)


def test_the_default_is_mixed_preference_optimisation():
    # At the reference in the first step: 0.8 ln 2 + 0.2 * 2 ln 2 + 12 / 4 nats a token.
    assert Mixture() == mixture((0.8, DPO()), (0.2, BCOPair()), (1.0, SFT()))
    out = Mixture()(pairs([(-12.0, -13.0, -12.0, -13.0, 4, 10)]))
    assert out.loss.item() == pytest.approx(1.2 * math.log(2) + 3, abs=1e-14)
    metrics = {name: value.item() for name, value in out.metrics.items() if name.startswith("custom/")}
    expected = {"custom/dpo_loss": math.log(2), "custom/bcopair_loss": 2 * math.log(2), "custom/sft_loss": 3}
    assert metrics == pytest.approx(expected)


def test_rewards_and_their_metrics_are_those_of_the_first_part():
    logps = pairs([ROW, (-3.0, -2.0, -2.0, -5.0, 1, 2)])
    for first, second in ((DPO(), SimPO()), (SimPO(), DPO())):
        alone, out = first(logps), mixture((0.3, first), (2.0, second))(logps)
        assert torch.equal(out.rewards, alone.rewards)
        assert {name: out.metrics[name] for name in alone.metrics} == dict(alone.metrics)


def test_rewards_of_a_first_part_over_demonstrations_are_those_of_both_completions():
    out = mixture((1, SFT()), (1, DPO()))(pairs([ROW]))
    assert out.rewards.tolist() == [[-10, -14]]
    assert out.metrics["reward/margin"].item() == 4


def test_the_example_s_weight_counts_once_for_every_part():
    # Losses 9.5 each; weights 3 and 0 over two examples. The metrics are weighted as the loss is: 0.5 * 6 + 3 * 3.75.
    out = IPO_AND_SFT(pairs([ROW, ROW], weight=[3.0, 0.0]))
    assert out.losses.tolist() == [3 * 9.5, 0]
    assert out.loss.item() == 1.5 * 9.5
    assert (out.metrics["custom/ipo_loss"].item(), out.metrics["custom/sft_loss"].item()) == (6, 3.75)


def test_a_soft_label_also_exchanges_what_is_imitated():
    # p = 3/4. IPO: 3/4 * 4 + 1/4 * 16 = 7. SFT: 3/4 * 2.5 + 1/4 * 1.4 = 2.225. 0.5 * 7 + 3 * 2.225.
    logps = pairs([ROW], preference=[0.75])
    out = IPO_AND_SFT(logps)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(10.175, abs=1e-12)
    # By L_l: IPO's slopes -4 and -8 in expectation -(3/4 * 4 + 1/4 * 8) = -5, SFT's -1/4 / 10.
    assert logps.policy_rejected.grad.item() == pytest.approx(0.5 * -5 + 3 * -0.025, abs=1e-12)


def test_one_part_alone_is_that_objective_times_its_weight():
    logps = pairs([ROW], preference=[0.9], weight=[2.0])
    torch.testing.assert_close(mixture((0.25, DPO()))(logps).losses, 0.25 * DPO()(logps).losses)


def test_parts_of_one_class_are_numbered():
    out = mixture((1, DPO()), (1, IPO()), (2, DPO(beta=1)))(pairs([ROW]))
    custom = [name for name in out.metrics if name.startswith("custom/")]
    assert custom == ["custom/dpo_loss_1", "custom/ipo_loss", "custom/dpo_loss_2"]
    # z = 0.1 * 3 and z = 3.
    assert out.metrics["custom/dpo_loss_1"].item() == pytest.approx(math.log1p(math.exp(-0.3)))
    assert out.metrics["custom/dpo_loss_2"].item() == pytest.approx(math.log1p(math.exp(-3)))


NEEDS = (
    "needs_reference",
    "needs_mismatched",
    "needs_tokens",
    "needs_collision",
    "needs_mean_log_ratio",
    "batch_coupled",
)


@pytest.mark.parametrize(
    ("parts", "asked"),
    [
        ([SimPO(), SFT()], set()),
        ([SimPO(), DPO()], {"needs_reference"}),
        ([SimPO(), BCOPair()], {"needs_reference", "needs_mean_log_ratio"}),
        ([WPO(), SFT()], {"needs_reference", "needs_tokens", "needs_collision"}),
        ([AOT(), BCOPair()], {"needs_reference", "needs_mean_log_ratio", "batch_coupled"}),
    ],
)
def test_it_asks_for_what_its_parts_ask_for_together(parts, asked):
    made = mixture(*((1, part) for part in parts))
    assert {name for name in NEEDS if getattr(made, name)} == asked
    made(example_batch(made))  # and a record that holds just that is enough


def test_it_pulls_at_the_reference_where_all_parts_do():
    assert mixture((1, DPO()), (1, SFT())).pulls_at_reference
    assert not mixture((1, DPO()), (1, DiscoPOP())).pulls_at_reference


def test_a_missing_field_of_a_part_is_named():
    with pytest.raises(ValueError, match=r"PairLogps\.mean_log_ratio must hold"):
        Mixture()(replace(pairs([ROW]), mean_log_ratio=None))


@final
@dataclass(frozen=True, kw_only=True)
class _ReadsItAll(DemonstrationObjective):
    """A demonstration objective that reads the reference and the running mean."""

    needs_reference = True
    needs_mean_log_ratio = True
    paper = "none"

    def __call__(self, logps: JudgementLogps) -> LossOutput:
        losses = log_ratio(logps.policy, logps.reference, "reference") - logps.mean_log_ratio
        return demonstration_output(logps, losses, logps.policy)


def test_a_part_over_demonstrations_is_given_all_that_the_pair_holds_of_the_chosen_one():
    # r_w = 2 nats, less the running mean of 0.5.
    out = mixture((1, _ReadsItAll()), (1, DPO()))(pairs([ROW], mean_log_ratio=0.5))
    assert out.metrics["custom/_readsitall_loss"].item() == 1.5


def test_it_is_written_out_by_its_parts_alone():
    # What it asks for follows from the parts, and is no hyper-parameter.
    assert repr(mixture((1, DPO()))) == "Mixture(parts=(Part(weight=1, objective=DPO(beta=0.1)),))"
    assert hash(mixture((1, DPO()))) == hash(mixture((1, DPO())))
    with pytest.raises(TypeError, match="needs_reference"):
        Mixture(needs_reference=False)  # pyright: ignore[reportCallIssue]


def refused(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


def test_no_parts_are_refused():
    with refused("Mixture.parts must be a tuple of one Part or more, got (): write parts=("):
        Mixture(parts=())


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf, True])
def test_a_weight_that_weighs_nothing_or_no_number_is_refused(weight):
    with refused(f"Mixture.parts[1].weight must be a finite number > 0, got {weight!r}:"):
        mixture((1, DPO()), (weight, SFT()))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (KTO(), "must read pairs or demonstrations, got KTO("),
        (mixture((1, DPO())), "must be no mixture itself, got Mixture("),
        (TRDPO(), "must leave the reference in place, got TRDPO("),
    ],
)
def test_an_objective_that_cannot_be_a_part_is_refused(objective, message):
    with refused(f"Mixture.parts[1].objective {message}"):
        mixture((1, DPO()), (1, objective))


def test_demonstrations_alone_are_refused():
    with refused("Mixture.parts must hold an objective that compares pairs, got (Part("):
        mixture((1, SFT()), (2, SFT(reduction="sum")))


def test_every_objective_over_pairs_can_be_a_part():
    for name in names():
        part = find(name)()
        if part.view in ("pairs", "demonstrations") and not isinstance(part, TRDPO | Mixture):
            made = mixture((2, DPO()), (0.5, part))
            out = made(example_batch(made))
            assert out.losses.isfinite().all()
