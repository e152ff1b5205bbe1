"""Objectives are found by name: the package's by their file, a user's by import path."""

import sys
from pathlib import Path

import pytest

import dpo.losses
from dpo.errors import ConfigError
from dpo.losses import DPO, IPO, KTO, SFT, KWise, Objective, find, names

OWN = '''
from dataclasses import dataclass
from typing import final

from dpo.losses import PairObjective


@final
@dataclass(frozen=True, kw_only=True)
class {name}(PairObjective):
    """Mine. Paper: mine."""

    needs_reference = False
    paper = "mine"

    def __call__(self, logps):
        raise NotImplementedError


class Unfinished(PairObjective):
    pass


class Other:
    pass
'''


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_losses.py").write_text(OWN.format(name="Mine"))
    (tmp_path / "my_broken_losses.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_losses", None)


def test_names_are_those_of_the_files():
    assert set(names()) >= {"dpo", "ipo", "kto", "sft", "bradleyterry", "kwise", "plackettluce", "ppo", "rloo", "grpo"}
    assert list(names()) == sorted(names())
    assert not {"objective", "reduce", "testing", "credit", "pairobjective"} & set(names())


@pytest.mark.parametrize(
    ("name", "kind"), [("dpo", DPO), ("ipo", IPO), ("kto", KTO), ("sft", SFT), ("IPO", IPO), ("KWise", KWise)]
)
def test_find_returns_the_class(name: str, kind: type[Objective]):
    assert find(name) is kind
    assert kind.__module__ == f"dpo.losses.{name.lower()}"


def test_every_name_is_also_an_attribute():
    for name in names():
        kind = find(name)
        assert getattr(dpo.losses, kind.__name__) is kind


def test_a_new_objective_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "newpo.py").write_text(OWN.format(name="NewPO"))
    monkeypatch.setattr(dpo.losses, "__path__", [*dpo.losses.__path__, str(tmp_path)])
    try:
        assert "newpo" in names()
        assert find("newpo").__name__ == "NewPO"
        from dpo.losses import NewPO  # pyright: ignore[reportAttributeAccessIssue]

        assert NewPO is find("newpo")
    finally:
        sys.modules.pop("dpo.losses.newpo", None)
        vars(dpo.losses).pop("newpo", None)


def test_unknown_name_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError, match=r"'idpo' is none of aot, .*, wpo\. Did you mean '\w+po'\?.*package.module"):
        find("idpo")


@pytest.mark.parametrize("helper", ["objective", "reduce", "testing", "credit", "__init__", ""])
def test_a_helper_module_is_no_objective(helper: str):
    with pytest.raises(ConfigError, match="is none of"):
        find(helper)


def test_unknown_attribute_is_an_attribute_error():
    for name in ("Dpo", "Nothing", "Reduce"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(dpo.losses, name)


@pytest.mark.usefixtures("own_module")
def test_own_class_by_import_path():
    kind = find("my_losses:Mine")
    assert kind.__name__ == "Mine"
    assert issubclass(kind, Objective)


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_losses:Other", "expected a class below dpo.losses.Objective"),
        ("my_losses:Unfinished", "expected a class below dpo.losses.Objective that defines __call__"),
        ("my_losses:dataclass", "expected a class below"),
        ("my_losses:Absent", "cannot be imported: module 'my_losses' has no attribute 'Absent'"),
        ("my_absent_losses:Mine", "cannot be imported: No module named 'my_absent_losses'.*PYTHONPATH"),
        ("my_broken_losses:Mine", "No module named 'a_package_that_is_not_installed'"),
        (":Mine", "cannot be imported"),
    ],
)
def test_bad_import_path_is_a_config_error(path: str, message: str):
    with pytest.raises(ConfigError, match=message):
        find(path)
