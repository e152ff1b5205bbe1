"""The step-0 law: a policy that starts at its reference has the loss that theory gives, whatever the adapter."""

import math
from dataclasses import replace

import pytest

from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.kto import KTO
from dpo.model.reference import ReferenceLogps
from dpo.model.views import largest_drift, mismatched, view

OBJECTIVES = [(DPO(beta=0.1), math.log(2)), (IPO(tau=0.5), 1 / (4 * 0.5**2)), (KTO(), 0.5)]
STARTS = {
    "default": {},
    "gaussian": {"lora": {"init": "gaussian"}},
    "orthogonal": {"lora": {"init": "orthogonal"}},
    "dora": {"lora": {"dora": True}},
    "rslora": {"lora": {"rank_stabilised": True}},
    "nf4": {"quantization": "nf4"},
    "full": {"lora": None},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture
def even(examples):
    """Certain labels and equal weights: what the constants are for."""
    return [replace(example, preference=1.0, weight=1.0) for example in examples]


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize(("objective", "constant"), OBJECTIVES, ids=["dpo", "ipo", "kto"])
def test_the_loss_starts_at_its_constant(start, perturb, wide_model_folder, even, init, objective, constant):
    model = start(name=str(wide_model_folder), **STARTS[init])
    model.training()
    reference = ReferenceLogps(model)

    def scored():
        whole = mismatched(model, reference, objective, even, [range(len(even))])
        return replace(view(model, reference, objective, even), **whole)

    record = scored()
    tolerance = 0.02 if init == "bfloat16" else 1e-5  # bfloat16: other batch shapes round otherwise
    assert objective(record).loss.item() == pytest.approx(constant, abs=tolerance)
    assert largest_drift(record) <= tolerance

    perturb(model)
    broken = scored()
    assert (objective(broken).losses - constant).abs().max() > 0.01
    assert largest_drift(broken) > 0.02
