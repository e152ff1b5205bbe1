"""Any number of completions of one prompt, with scores, ranks or votes.

The rated format can hold every record: it is the one that data sets are converted to.
"""

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import (
    BESIDE_PROMPT,
    PROMPT,
    as_list,
    as_number,
    completion_of,
    record,
    scores_of_ranks,
    share,
    shared_prompt,
    votes_of,
)
from dpo.data.read import Row
from dpo.data.records import Messages, Preference


def _texts(row: Row, at_least: int = 0) -> tuple[Messages, list[str]]:
    found = [completion_of(one, "completions") for one in as_list(row.values.get("completions"), "completions")]
    if len(found) < at_least:
        raise BadRow(Drop.ALONE)
    return shared_prompt(row.values, (before for before, _ in found)), [text for _, text in found]


def _rated(row: Row) -> Preference:
    prompt, completions = _texts(row)
    scores = row.values.get("scores")
    if scores is not None:
        scores = [as_number(score, "scores") for score in as_list(scores, "scores")]
    return record(row, prompt, completions, scores)


def _ranked(row: Row) -> Preference:
    prompt, completions = _texts(row, at_least=2)
    ranks = [as_number(rank, "ranks") for rank in as_list(row.values.get("ranks"), "ranks")]
    return record(row, prompt, completions, scores_of_ranks(ranks))


def _voted(row: Row) -> Preference:
    prompt, completions = _texts(row, at_least=2)
    votes = votes_of(row.values, len(completions))
    # One number tells how sure a label is, and of three completions each two can have another.
    return record(row, prompt, completions, votes, agreement=share(votes) if len(votes) == 2 else None)


RANKED = Format(
    "ranked",
    "a smaller rank is better, whether ranks count from 0 or from 1",
    (PROMPT, ("completions",), ("ranks",)),
    _ranked,
    optional=BESIDE_PROMPT,
)
VOTED = Format(
    "voted",
    "more votes are better; of two completions, the winner's share of the votes is the agreement",
    (PROMPT, ("completions",), ("votes",)),
    _voted,
    optional=BESIDE_PROMPT,
)
RATED = Format(
    "rated",
    "a higher score is better; completions without scores are all worth imitating",
    (PROMPT, ("completions",)),
    _rated,
    optional=(*BESIDE_PROMPT, "scores"),
)
