"""The step-0 law: a policy that starts at its reference has the loss that theory gives, whatever the adapter."""

import math
from dataclasses import replace

import pytest

from dpo.losses import Objective, find, names
from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.kto import KTO
from dpo.model.reference import ReferenceLogps
from dpo.model.views import largest_drift, step_fields, view

LN2 = math.log(2)
CONSTANTS = {
    "aot": LN2,
    "apodown": 1.0,
    "apozero": 1.0,
    "apozerounpaired": 0.5,
    "bco": LN2,
    "bcopair": 2 * LN2,
    "cdpo": LN2,
    "discopop": (LN2 + 1) / 2,
    "dpo": LN2,
    "dponorm": LN2,
    "dpop": LN2,
    "exo": -(LN2 + math.log(0.999) / 2 + math.log(0.001) / 2),
    "fdpo": LN2,
    "hinge": 1.0,
    "ipo": 1.0,
    "kto": 0.5,
    "lddpo": LN2,
    "nca": 2 * LN2,
    "robustdpo": LN2,
    "sppo": 250_000.0,
    "trdpo": LN2,
}
"""What each formula gives at r = 0, with the class's own defaults."""
OF_THE_DATA = {"cpo", "mixture", "orpo", "rdpo", "rpo", "sft", "simpo", "slic", "wpo"}
"""Those whose start depends on likelihoods or lengths: tests/exact/test_step_zero.py has their formulas."""
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


def test_every_objective_is_accounted_for():
    # Reward models have no reference; what rollouts lose is measured from the policy that sampled them.
    compared = {name for name in names() if find(name).view in ("pairs", "judgements", "demonstrations")}
    assert compared == {*CONSTANTS, *OF_THE_DATA}


@pytest.fixture
def even(examples):
    """Certain labels and equal weights: what the constants are for."""
    return [replace(example, preference=1.0, weight=1.0) for example in examples]


@pytest.mark.parametrize("init", STARTS)
def test_the_loss_starts_at_its_constant(start, perturb, wide_model_folder, even, init):
    model = start(name=str(wide_model_folder), **STARTS[init])
    model.training()
    reference = ReferenceLogps(model)

    def scored(objective: Objective):
        whole = step_fields(model, reference, objective, even, [range(len(even))], mean_log_ratio=0.0)
        return replace(view(model, reference, objective, even), **whole)

    tolerance = 0.02 if init == "bfloat16" else 1e-5  # bfloat16: other batch shapes round otherwise
    for name, constant in CONSTANTS.items():
        objective = find(name)()
        record = scored(objective)
        assert largest_drift(record) <= tolerance
        slope = max(1.0, constant)  # of IPO and SPPO: how steep the loss is grows with it
        assert objective(record).loss.item() == pytest.approx(constant, abs=slope * tolerance), name

    perturb(model)
    for objective, constant in ((DPO(), LN2), (IPO(), 1.0), (KTO(), 0.5)):
        broken = scored(objective)
        assert (objective(broken).losses - constant).abs().max() > 0.01
        assert largest_drift(broken) > 0.02
