"""CPO in closed form, and as DPO against a uniform reference."""

import math

import pytest
import torch

from dpo.losses.cpo import CPO
from dpo.losses.dpo import DPO
from dpo.types import PairLogps


def pairs(rows, preference=None, weight=None, reference=None) -> PairLogps:
    """Rows of (L_w, L_l, |w|, |l|); the reference's log-prob is the same for every completion."""
    pc, pr, cl, rl = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    p, w = (None if values is None else torch.tensor(values, dtype=torch.float64) for values in (preference, weight))
    uniform = None if reference is None else torch.full_like(pc, reference)
    return PairLogps(pc.requires_grad_(), pr.requires_grad_(), uniform, uniform, cl.long(), rl.long(), p, w)


ROW = (-4.0, -14.0, 4, 7)
"""a_w = -1 nat a token, a_l = -2; z = 0.1 (-4 + 14) = 1."""
LOW, HIGH = 0.31326168751822286, 1.3132616875182228
"""-log sigma(1) and -log sigma(-1)."""


def test_loss_at_equal_log_probs():
    # z = 0: ln 2 - alpha a_w, a_w = -12 / 3.
    assert CPO()(pairs([(-12.0, -12.0, 3, 60)])).loss.item() == pytest.approx(math.log(2) + 4, abs=1e-14)


def test_imitation_is_each_completion_s_own_mean():
    # 1 nat on 1 token and 40 nats on 10 tokens: 1 and 4, mean 2.5. One mean over all tokens would be 41/11.
    losses = CPO()(pairs([(-1.0, -1.0, 1, 1), (-40.0, -40.0, 10, 1)])).losses - math.log(2)
    torch.testing.assert_close(losses, torch.tensor([1, 4], dtype=torch.float64))


def test_without_imitation_it_is_dpo_against_a_uniform_reference():
    rows = [ROW, (-9.0, -3.0, 2, 5), (-700.0, -0.5, 300, 1)]
    logps = pairs(rows, preference=[1.0, 0.7, 0.5], weight=[1.0, 2.0, 0.5], reference=-55.0)
    torch.testing.assert_close(CPO(beta=0.3, alpha=0)(logps).losses, DPO(beta=0.3)(logps).losses)
