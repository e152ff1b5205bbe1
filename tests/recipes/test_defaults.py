"""A recipe and `dpo objectives` name the same values: an objective's recipe takes the defaults of its class."""

import pytest

from dpo import losses, recipes
from dpo.data import DataConfig

NAMES = [name for name in losses.names() if name in recipes.names()]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_the_defaults_that_its_objective_states(name: str) -> None:
    objectives = [run.objective.build() for run in recipes.find(name)(DataConfig.model_validate({"train": "x"}))]
    assert [one for one in objectives if type(one) is losses.find(name)] == [losses.find(name)()]
