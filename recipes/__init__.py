"""Ready runs as typed Python functions: they choose, they never compute.

A recipe is a module of this package that holds a function of the same name: it maps the dataset to the runs to carry
out, in order. `dpo train NAME data.train=FILE` carries it out, and so does the file itself run as a script. The package
`reproductions` beside them is no recipe: it redoes published results in miniature.
"""

if __name__ != "dpo.recipes":
    raise ImportError("Import dpo.recipes, not recipes: the bare name would make a second copy of every class.")

import pkgutil
from importlib import import_module

from dpo import losses
from dpo.errors import ConfigError, nearest
from dpo.settings import Recipe


def names() -> tuple[str, ...]:
    """Return the names of all recipes, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg))


def find(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ConfigError: there is none; the message holds the nearest one.
    """
    known = names()
    if name in losses.names() and name not in known:
        raise ConfigError(
            f"{name!r} is an objective without a recipe of its own. Give it to another recipe: "
            f"dpo train dpo objective.name={name}."
        )
    if name not in known:
        raise ConfigError(
            f"{name!r} is neither a recipe ({', '.join(known)}) nor a file.{nearest(name, known)} "
            "Name a recipe or a YAML file of a run."
        )
    return getattr(import_module(f"{__name__}.{name}"), name)
