"""What an objective says of itself is complete, and reaches whoever asks."""

import re
from dataclasses import dataclass
from typing import Any, final

import pytest

from dpo.losses import PairObjective, find, names
from dpo.losses.describe import FLOWING, describe


@pytest.mark.parametrize("name", names())
def test_every_objective_states_formula_paper_and_each_hyper_parameter(name: str):
    one = describe(name)
    assert (one.name, one.view, one.paper) == (name, find(name).view, find(name).paper)
    assert one.needs_reference == find(name)().needs_reference
    assert re.fullmatch(r"[A-Z].*[.]", one.summary)
    assert len(one.summary) <= 120
    formula = r"\bloss(_t)? = " if one.view == "rollouts" else r"^loss "  # a rollout's begins with the credit
    assert re.search(formula, one.text, flags=re.MULTILINE), "the formula begins with 'loss'"
    assert f"Paper: {one.paper}." in one.text
    assert "\nDiffers: " in one.text
    for parameter in one.parameters:
        assert len(parameter.text) > 20, f"{name}.{parameter.name} has no string under it"
        assert parameter.default == getattr(find(name)(), parameter.name)


def test_hyper_parameters_are_those_that_can_be_given():
    assert [one.name for one in describe("kto").parameters] == ["beta", "desirable_weight", "undesirable_weight"]
    assert [one.name for one in describe("mixture").parameters] == ["parts"]


def test_a_number_s_text_says_its_range():
    for name in names():
        for one in describe(name).parameters:
            if isinstance(one.default, int | float) and not isinstance(one.default, bool):
                assert re.search(r"[<>]|to 1|0 or|whole", one.text), f"{name}.{one.name}: {one.text}"


@final
@dataclass(frozen=True, kw_only=True)
class Own(PairObjective):
    """Mine.

    loss = 0,
    whatever comes.

    Paper: none.
    """

    first: float = 0.5
    """What it is,
    on two lines."""
    second: int = 3
    needs_reference = False
    paper = "none"

    def __call__(self, logps):
        raise NotImplementedError


def test_a_class_of_one_s_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dpo.losses.describe.find", lambda _: Own)
    one = describe("mine:Own")
    assert (one.summary, one.text) == ("Mine.", "loss = 0, whatever comes.\n\nPaper: none.")
    texts = [(parameter.name, parameter.default, parameter.text) for parameter in one.parameters]
    assert texts == [("first", 0.5, "What it is, on two lines."), ("second", 3, "")]


def test_what_is_required_and_what_has_no_source(monkeypatch: pytest.MonkeyPatch):
    space: dict[str, Any] = {"PairObjective": PairObjective, "dataclass": dataclass}
    exec("@dataclass(frozen=True, kw_only=True)\nclass New(PairObjective):\n    'Made in a prompt.'\n    beta: float\n"
         "    needs_reference = True\n    paper = 'none'\n    def __call__(self, logps): ...", space)  # fmt: skip
    monkeypatch.setattr("dpo.losses.describe.find", lambda _: space["New"])
    one = describe("mine:New")
    assert (one.summary, one.needs_reference) == ("Made in a prompt.", True)
    assert [(p.name, p.required, p.default, p.text) for p in one.parameters] == [("beta", True, None, "")]


def test_paragraphs_and_named_lines_stay_apart():
    assert FLOWING.sub(" ", "a\nb\n\nc\nPaper: d\ne\nDiffers: f") == "a b\n\nc\nPaper: d e\nDiffers: f"
