"""The step-0 law: a policy that starts at its reference has the loss that theory gives, whatever the adapter."""

import math
from dataclasses import replace

import pytest

from dpo.losses import Objective, find, names
from dpo.losses.dpo import DPO
from dpo.losses.ipo import IPO
from dpo.losses.kto import KTO
from dpo.model.embedded import EMBEDDED
from dpo.model.reference import ReferenceLogps
from dpo.model.views import drift, step_fields, view

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


def losses_at_the_start(model, examples, tolerance: float) -> None:
    model.training()
    reference = ReferenceLogps(model)
    for name, constant in CONSTANTS.items():
        objective = find(name)()
        record = scored(model, reference, objective, examples)
        assert drift(record) <= tolerance
        slope = 10.0 if name == "dpop" else max(1.0, constant)  # how much the loss makes of what is rounded
        assert objective(record).loss.item() == pytest.approx(constant, abs=slope * tolerance), name


def scored(model, reference: ReferenceLogps, objective: Objective, examples):
    whole = step_fields(model, reference, objective, examples, [range(len(examples))], mean_log_ratio=0.0)
    return replace(view(model, reference, objective, examples), **whole)


@pytest.mark.parametrize("init", STARTS)
def test_the_loss_starts_at_its_constant(start, perturb, wide_model_folder, even, init):
    model = start(name=str(wide_model_folder), **STARTS[init])
    losses_at_the_start(model, even, 0.02 if init == "bfloat16" else 1e-5)  # other batch shapes round otherwise
    perturb(model)
    for objective, constant in ((DPO(), LN2), (IPO(), 1.0), (KTO(), 0.5)):
        broken = scored(model, ReferenceLogps(model), objective, even)
        assert (objective(broken).losses - constant).abs().max() > 0.01
        assert drift(broken) > 0.02


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("init", STARTS)
def test_so_does_that_of_the_embedded_model(start, even, monkeypatch, init):
    """SmolLM2-135M as shipped: 30 layers, grouped heads, tied embeddings, and log-probs of real size."""
    monkeypatch.undo()  # the suite's own cache folder, which would fetch the model anew for every test
    model = start(name=EMBEDDED, **STARTS[init])
    losses_at_the_start(model, even, 0.1 if init == "bfloat16" else 1e-5)  # bfloat16 steps by 0.06 at logits above 8
