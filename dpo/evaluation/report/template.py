"""How templates become pages: everything that comes from outside is escaped."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from dpo.evaluation.report.text import clean, setting, shorten


def template(name: str) -> Template:
    """Return a template of this package."""
    environment = Environment(
        loader=PackageLoader("dpo.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shorten": shorten, "setting": setting}
    return environment.get_template(name)


def _finalize(value: Any) -> Any:
    """What a template prints; text from outside may hold characters that no page can."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
