"""What an objective says of itself: its docstring, and the strings under its fields, as the command line shows them."""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, final

from dpo.losses import find
from dpo.losses.objective import Objective, View

FLOWING = re.compile(r"(?<!\n)\n(?!\n|Paper:|Differs:)")
"""A line's end within a paragraph: a terminal has lines of its own length."""


@final
@dataclass(frozen=True)
class Parameter:
    """A hyper-parameter."""

    name: str
    default: Any
    """None where it is required."""
    required: bool
    text: str
    """Meaning, unit, range and direction of effect."""


@final
@dataclass(frozen=True)
class Description:
    """An objective in words."""

    name: str
    """As `find` takes it."""
    summary: str
    """One line."""
    text: str
    """The rest of the docstring: formula, paper, differences."""
    view: View
    needs_reference: bool
    paper: str
    parameters: tuple[Parameter, ...]


def describe(name: str) -> Description:
    """Describe the objective of that name or import path, with its default hyper-parameters.

    Raises:
        ConfigError: there is none.
    """
    kind = find(name)
    texts = _under_fields(kind)
    summary, _, text = inspect.cleandoc(kind.__doc__ or "").partition("\n")
    parameters = tuple(_parameter(f, texts) for f in fields(kind) if f.init)  # pyright: ignore[reportArgumentType]
    asked: Any = kind if any(one.required for one in parameters) else kind()  # a mixture's needs are its parts'
    return Description(
        name=name,
        summary=summary,
        text=FLOWING.sub(" ", text.strip()),
        view=kind.view,
        needs_reference=asked.needs_reference,
        paper=kind.paper,
        parameters=parameters,
    )


def _parameter(field: Field[Any], texts: Mapping[str, str]) -> Parameter:
    made = None if field.default_factory is MISSING else field.default_factory()
    required = field.default is MISSING and field.default_factory is MISSING
    default = made if field.default is MISSING else field.default
    return Parameter(field.name, default, required, texts.get(field.name, ""))


def _under_fields(kind: type[Objective]) -> dict[str, str]:
    """Return the string under each field. Python keeps none of them, so they are read from the source."""
    try:
        (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError):  # a class made where no source file is, such as in a prompt
        return {}
    assert isinstance(parsed, ast.ClassDef)
    found: dict[str, str] = {}
    for field, below in zip(parsed.body, parsed.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value.value if isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                found[field.target.id] = " ".join(text.split())
    return found
