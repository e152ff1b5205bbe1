"""The page of a survey: one file without scripts, that asks nothing of any network."""

from collections.abc import Sequence
from pathlib import Path

from dpo.data.findings import findings
from dpo.data.render import Overlong
from dpo.data.surveyed import Survey
from dpo.data.tokens import Token
from dpo.data.write import check_place, replacing
from dpo.errors import DataError
from dpo.evaluation.report.sections import sections, span
from dpo.evaluation.report.template import template

GAP = Token(-1, " … ", False)
"""Stands for the tokens that are left out of a long sample."""


def page(survey: Survey, overlong: Overlong = "drop") -> str:
    """Return the page.

    Args:
        survey: what to show.
        overlong: what becomes of over-long records.
    """
    tokens = survey.tokens
    return template("dataset.html.jinja").render(
        survey=survey,
        findings=findings(survey, overlong),
        sections=sections(survey),
        sample=excerpt(tokens.sample) if tokens else (),
        span=span,
    )


def check_page(path: Path) -> None:
    """See that the page can be written, before the work that makes it.

    Raises:
        DataError: it cannot, or the ending is not .html.
    """
    if path.suffix != ".html":
        raise DataError(f"{path}: got the ending {path.suffix!r}, expected '.html'. Name the page so.")
    check_place(path)


def write(survey: Survey, path: Path, overlong: Overlong = "drop") -> None:
    """Write the page; it is afterwards whole, or as before.

    Raises:
        DataError: as `check_page`, and where the disk refuses.
    """
    check_page(path)
    text = page(survey, overlong)
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def excerpt(tokens: Sequence[Token], most: int = 120) -> tuple[Token, ...]:
    """Return a sample with the middle of a long prompt, and of a long completion, left out.

    Args:
        tokens: of the prompt, then of the completion.
        most: tokens shown of each (>= 2).
    """
    parts = ([token for token in tokens if token.scored is scored] for scored in (False, True))
    return tuple(token for part in parts for token in _short(part, most))


def _short(tokens: Sequence[Token], most: int) -> list[Token]:
    if len(tokens) <= most:
        return list(tokens)
    gap = Token(GAP.id, GAP.text, tokens[0].scored)
    return [*tokens[: most // 2], gap, *tokens[len(tokens) - most // 2 :]]
