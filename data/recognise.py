"""Which format the rows of a file have, told by their columns."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from dpo.data.format import Format
from dpo.data.formats import FORMATS
from dpo.data.parts import COMMON
from dpo.data.read import Row
from dpo.errors import DataError, nearest

_SHOWN = 6
"""Formats that are named where none fits."""


def recognise(rows: Sequence[Row], label: str | None = None) -> Format:
    """Return the first, and so most specific, format that the first rows of a file fit.

    Args:
        rows: the first rows, renamed where the user has columns of his own.
        label: which label to read, for rows that hold several.

    Raises:
        DataError: no format fits; the message lists the columns got, the nearest shapes and the nearest names. Or the
            rows hold several labels and `label` names none of them, or they hold one only and `label` is set.
    """
    place, seen = _place(rows), _first_values(rows)
    fitting = [known for known in FORMATS if known.holds(seen)]
    if not fitting:
        raise DataError(f"{place}: {_unknown(seen, rows)}")
    if fitting[0].label is None:
        if label is not None:
            raise DataError(
                f"{place}: got data.label={label}, expected none: rows of the format {fitting[0].name!r} hold one label"
                f" ({fitting[0].rule}). Leave data.label out."
            )
        return fitting[0]
    readings = {known.label: known for known in fitting if known.label is not None}
    if label not in readings:
        meanings = "\n".join(f"  {name}: {known.rule}" for name, known in readings.items())
        choices = " or ".join(f"data.label={name}" for name in readings)
        raise DataError(
            f"{place}: got data.label={'null' if label is None else label}, expected one of the labels that these rows"
            f" hold and that can disagree:\n{meanings}\nSet {choices}.{nearest(label or '', readings)}"
        )
    return readings[label]


def rename(row: Row, columns: Mapping[str, str]) -> Row:
    """Return a row with the user's columns under the names that formats know.

    Args:
        row: the row as the file has it.
        columns: our name: the file's name. A column of the file that has one of our names, and is no source itself, is
            hidden.
    """
    if not columns:
        return row
    hidden = {*columns, *columns.values()}
    kept = {name: value for name, value in row.values.items() if name not in hidden}
    named = {ours: row.values[theirs] for ours, theirs in columns.items() if theirs in row.values}
    return replace(row, values={**kept, **named})


def check_columns(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Check the names of `rename` against the formats and the first rows of a file, as they are before it.

    Raises:
        DataError: no format has a column of our name, or no row has one of the file's name.
    """
    known = sorted({*COMMON, *chain.from_iterable((*chain(*one.columns), *one.optional) for one in FORMATS)})
    got = sorted(set(chain.from_iterable(row.values for row in rows)))
    for ours, theirs in columns.items():
        if ours not in known:
            raise DataError(
                f"{_place(rows)}: got data.columns.{ours}={theirs}, expected a column that a format reads, such as"
                f" prompt, chosen, rejected, completion, label.{nearest(ours, known)} Write data.columns.OURS=THEIRS."
            )
        if theirs not in got:
            raise DataError(
                f"{_place(rows)}: got data.columns.{ours}={theirs}, expected one of the file's columns:"
                f" {', '.join(got) or '(none)'}.{nearest(theirs, got)} Correct the name."
            )


def _place(rows: Sequence[Row]) -> str:
    return rows[0].source if rows else "no rows"


def _first_values(rows: Sequence[Row]) -> dict[str, Any]:
    """Return each column with its first value that is not null."""
    seen: dict[str, Any] = {}
    for row in rows:
        seen.update({name: value for name, value in row.values.items() if value is not None and name not in seen})
    return seen


def _unknown(seen: Mapping[str, Any], rows: Sequence[Row]) -> str:
    known = sorted(set(chain.from_iterable(names for one in FORMATS for names in one.columns)))
    got = sorted(set(chain.from_iterable(row.values for row in rows)))
    hints = "".join(
        f" For the column {name!r}:{hint}" for name in got if name not in known and (hint := nearest(name, known))
    )
    shapes = "\n".join(
        f"  {one.name}: {', '.join('|'.join(names) for names in one.columns)}"
        for one in sorted(FORMATS, key=lambda one: _distance(one, seen))[:_SHOWN]
    )
    return (
        f"got the columns {', '.join(got) or '(none)'}, expected those of a format. Nearest are\n{shapes}\n"
        f"Rename the columns, or say what they are with data.columns.OURS=THEIRS.{hints}"
    )


def _distance(shape: Format, seen: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many of a format's columns are there, as a negative number, and how many are not."""
    found = sum(any(name in seen for name in names) for names in shape.columns)
    return -found, len(shape.columns) - found
