"""What a notebook shows of a run and of a comparison: HTML without scripts, everything from outside escaped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo.estimates import LEVEL
from dpo.evaluation.records import Comparison
from dpo.evaluation.report.page import page
from dpo.evaluation.report.template import template

FRAME_HEIGHT = 640
"""Of a comparison's page within a notebook, in CSS pixels; the page scrolls."""


def result_view(title: str, summary: Mapping[str, Any], folder: Path) -> str:
    """Return a table of the measures of a run with their intervals, those of each group apart.

    Args:
        title: of the run.
        summary: the content of its summary.json.
        folder: where it lies.
    """
    parts = {title: summary["measures"], **{f"Group {name}": own for name, own in summary.get("groups", {}).items()}}
    return template("notebook.html.jinja").render(parts=parts, folder=str(folder), level=f"{100 * LEVEL:g}")


def comparison_view(comparison: Comparison, folder: Path) -> str:
    """Return the whole page of a comparison in a frame of its own, whose styles and links stay inside."""
    framed = template("frame.html.jinja")
    return framed.render(page=page(comparison), title=comparison.title, folder=str(folder), height=FRAME_HEIGHT)
