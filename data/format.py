"""What a data format is."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from dpo.data.read import Row
from dpo.data.records import Preference

Columns = tuple[str, ...]
"""Names of which a row needs one, in order of preference."""


@final
@dataclass(frozen=True)
class Format:
    """A shape of preference data."""

    name: str
    rule: str
    """In words: how it says which completion is better."""
    columns: tuple[Columns, ...]
    """What a row must have: one column of each tuple."""
    convert: Callable[[Row], Preference]
    """Turns a gathered row into a record; raises `BadRow` for one that the format cannot hold."""
    fits: Callable[[Mapping[str, Any]], bool] = lambda _: True
    """Whether the values of the first rows are of the format's kind; asked only when the columns are there."""
    gather: Callable[[Iterable[Row]], Iterator[Row]] = iter
    """Puts together the rows that make one record; every row of the file goes into exactly one. By default each row is
    a record."""
    optional: Columns = ()
    """Columns that it reads where a row has them, beside those that every format reads."""
    label: str | None = None
    """Which of the rows' labels it reads, where they hold several that can disagree. Formats that differ in nothing
    else stand next to each other; None where there is one label."""
    evaluation_only: str = ""
    """Why nothing may be trained on such rows; empty where it may."""

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Return whether rows with these columns (name: first value that is not null) are of this format."""
        return all(any(name in values for name in names) for names in self.columns) and self.fits(values)
