"""UltraFeedback as its makers published it: up to four completions, each rated in four aspects.

Source: the card of openbmb/UltraFeedback, MIT.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from dpo.data.check import BadRow, Drop
from dpo.data.format import Format
from dpo.data.parts import as_dict, as_list, as_number, as_text, prompt_of, record
from dpo.data.read import Row
from dpo.data.records import Preference

_UNRATED = "N/A"


def _convert(row: Row) -> Preference:
    completions = [as_dict(one, "completions") for one in as_list(row.values.get("completions"), "completions")]
    # One without any rating has no place in the order, and the others need not go with it.
    rated = [(one, ratings) for one in completions if (ratings := _ratings(one))]
    if len(rated) < 2:
        raise BadRow(Drop.ALONE)
    said = (as_text(one.get("critique"), "critique") for one, _ in rated)
    # Not read: overall_score, which is 10 for some of the worst answers, and custom_system_prompt, which one completion
    # was written under but none was rated by. What is compared has one prompt.
    return record(
        row,
        prompt_of(row.values),
        [as_text(one.get("response"), "response") for one, _ in rated],
        [fmean(ratings) for _, ratings in rated],
        feedback=[text for text in said if text.strip()],
    )


def _ratings(completion: Mapping[str, Any]) -> list[float]:
    aspects = as_dict(completion.get("annotations") or {}, "annotations")
    given = [as_dict(aspect or {}, name).get("Rating") for name, aspect in aspects.items()]
    return [as_number(rating, "Rating") for rating in given if rating not in (None, _UNRATED)]


def _fits(values: Mapping[str, Any]) -> bool:
    completions = values["completions"]
    return isinstance(completions, list) and any(isinstance(one, dict) and "annotations" in one for one in completions)


ULTRAFEEDBACK = Format(
    "UltraFeedback",
    "a higher mean of the aspects' ratings is better; a completion without any rating is left out",
    (("instruction",), ("completions",)),
    _convert,
    _fits,
)
