"""What a run trains and evaluates on: prompts and completions as token ids, with what is known of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from dpo.data.records import Messages
from dpo.data.shelf import Kind, turn_of, turn_row

if TYPE_CHECKING:
    import pyarrow


@final
@dataclass(frozen=True, slots=True)
class Example:
    """One example as token ids."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    """Pairs and comparisons: (chosen, rejected). Rankings: two or more, best first. Demonstrations: (own,). Judgements:
    (own,), or (own, mismatched) where asked for. Prompts: ()."""
    preference: float
    """P(chosen preferred), or of rankings P(the better of any two preferred), 0.5 to 1; 1 in the other views."""
    desirable: bool
    """The label of a judgement; True outside judgements."""
    weight: float
    """Multiplies the example's loss (>= 0)."""
    source: str
    """`file:row`."""
    prompt_messages: Messages
    texts: tuple[str, ...]
    """The completions as the file has them, for showing. Prompts: (an answer that people gave,), to measure samples by,
    or () where the file has none."""
    group: str | None = None
    """Annotator or population."""
    scores: tuple[float, ...] = ()
    """Comparisons and rankings: people's score of each completion, not increasing; () in the other views. Completions
    of equal score share their place. A pair in whose row nobody scored holds (1, 0)."""


def _schema() -> "pyarrow.Schema":
    import pyarrow as pa

    text, number, ids = pa.string(), pa.float64(), pa.list_(pa.int32())
    return pa.schema(
        {
            "prompt": ids,
            "completions": pa.list_(ids),
            "preference": number,
            "desirable": pa.bool_(),
            "weight": number,
            "source": text,
            "prompt_messages": pa.list_(pa.struct({"role": text, "content": text, "extra": text})),
            "texts": pa.list_(text),
            "group": text,
            "scores": pa.list_(number),
        }
    )


def _to_row(example: Example) -> dict[str, Any]:
    own = {name: getattr(example, name) for name in Example.__slots__}
    return {**own, "prompt_messages": [turn_row(turn) for turn in example.prompt_messages]}


def _from_row(row: Mapping[str, Any]) -> Example:
    return Example(
        **{
            **row,
            "prompt": tuple(row["prompt"]),
            "completions": tuple(map(tuple, row["completions"])),
            "prompt_messages": tuple(map(turn_of, row["prompt_messages"])),
            "texts": tuple(row["texts"]),
            "scores": tuple(row["scores"]),
        }
    )


EXAMPLES = Kind(_schema, _to_row, _from_row)
"""Examples as rows of a table."""
