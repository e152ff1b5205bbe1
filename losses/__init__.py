"""The objectives: one paper, one class, one file. They see tensors and nothing else.

`find("ipo")` returns the class `IPO` of the module `ipo`: a module of this package holds an objective where its name
is that of a class in it, lower-cased. A new objective is therefore one new file and no edit elsewhere, and
`dpo.losses.testing.check` holds it to the laws that all of them obey. `from dpo.losses import IPO` works as well;
type checkers follow `from dpo.losses.ipo import IPO`.
"""

if __name__ != "dpo.losses":
    raise ImportError("Import dpo.losses, not losses: the bare name would make a second copy of every class.")

import inspect
import pkgutil
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, TypeGuard

from dpo.errors import ConfigError, nearest
from dpo.losses.objective import (
    AdaptsKL,
    DemonstrationObjective,
    JudgementObjective,
    MovesReference,
    Objective,
    PairObjective,
    Part,
    RankingObjective,
    RolloutObjective,
)

__all__ = [
    "AdaptsKL",
    "DemonstrationObjective",
    "JudgementObjective",
    "MovesReference",
    "Objective",
    "PairObjective",
    "Part",
    "RankingObjective",
    "RolloutObjective",
    "find",
    "name_of",
    "names",
]


def names() -> tuple[str, ...]:
    """Return the names of the package's objectives, sorted."""
    return tuple(sorted(name for name in _modules() if _held_by(name)))


def find(name: str) -> type[Objective]:
    """Return an objective's class by its name here ("ipo", in any case) or its import path ("package.module:Class").

    Raises:
        ConfigError: no objective has that name, or the path does not lead to a final class below `Objective`.
    """
    if ":" in name:
        return _imported(name)
    held = _held_by(name.lower()) if name.lower() in _modules() else None
    if held is None:
        known = names()
        raise ConfigError(
            f"objective: {name!r} is none of {', '.join(known)}.{nearest(name.lower(), known)} "
            "A class of your own is named by its import path, as package.module:Class."
        )
    return held


def name_of(objective: Objective) -> str:
    """Return the name by which `find` knows an objective's class."""
    kind = type(objective)
    own = kind.__name__.lower()
    return own if own in _modules() and _held_by(own) is kind else f"{kind.__module__}:{kind.__qualname__}"


def _modules() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def _held_by(module: str) -> type[Objective] | None:
    members = vars(import_module(f"{__name__}.{module}"))
    return next((m for name, m in members.items() if name.lower() == module and _is_objective(m)), None)


def _is_objective(member: object) -> TypeGuard[type[Objective]]:
    made = inspect.isclass(member) and issubclass(member, Objective) and not inspect.isabstract(member)
    return made and is_dataclass(member)


def _imported(path: str) -> type[Objective]:
    module, _, name = path.partition(":")
    try:
        member = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # TypeError: a relative import
        raise ConfigError(
            f"objective: {path!r} cannot be imported: {error}. "
            "Write package.module:Class, and put the package's folder on PYTHONPATH or install it."
        ) from error
    if not _is_objective(member):
        raise ConfigError(
            f"objective: {path!r} is {member!r}, expected a class below dpo.losses.Objective that defines __call__ and "
            "is decorated with @dataclass(frozen=True, kw_only=True)."
        )
    return member


def __getattr__(name: str) -> Any:
    """Import an objective's class on first use: `from dpo.losses import DPO`."""
    held = _held_by(name.lower()) if name.lower() in _modules() else None
    if held is None or held.__name__ != name:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return held
