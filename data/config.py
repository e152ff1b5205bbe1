"""What a run is told of its data."""

from typing import Annotated, Literal, final

from pydantic import BaseModel, ConfigDict, Field

from dpo.data.check import OnBadRow
from dpo.data.render import Overlong


@final
class Source(BaseModel):
    """A further set to train on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: str = Field(min_length=1)
    """As `DataConfig.train`."""
    columns: dict[str, str] = {}
    """As `DataConfig.columns`."""
    label: str | None = None
    """As `DataConfig.label`."""
    limit: int | None = Field(None, ge=1)
    """As `DataConfig.limit`."""
    share: float = Field(1.0, gt=0, le=1)
    """As `DataConfig.share`."""
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Multiplies the loss of its examples (>= 0)."""


@final
class Filter(BaseModel):
    """Which rows are wanted, beside being sound. What is left out is counted and is no fault."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    min_gap: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Pairs whose scores differ by less are left out (> 0, on the scale of the data)."""
    min_agreement: float | None = Field(None, ge=0.5, le=1)
    """Rows whose voters agree less are left out; a row without votes is certain."""
    min_words: int | None = Field(None, ge=1)
    """Rows with a shorter completion are left out."""
    max_words: int | None = Field(None, ge=1)
    """Rows with a longer completion are left out."""


@final
class DataConfig(BaseModel):
    """Which rows to train and evaluate on, and what becomes of those that do not fit."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: str = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .txt, each also .gz; .parquet), or `owner/name[:split]` of a hub data set."""
    eval: str | None = None
    """A second such source to evaluate on; training rows with one of its prompts are dropped."""
    columns: dict[str, str] = {}
    """Columns under names of your own, as {ours: yours}: {prompt: question, chosen: good, rejected: bad}. It holds for
    `train` and `eval`."""
    label: str | None = None
    """Which label to read where a set has two, for instance helpfulness or harmlessness."""
    mix: tuple[Source, ...] = ()
    """Further sets to train on."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the prompts of `train` that is used, above 0 to 1, drawn by `seed`."""
    filter: Filter = Filter()
    """Which of the sound rows are wanted."""
    per_prompt: int | None = Field(None, ge=1)
    """Most training examples of one prompt, drawn by `seed`; None takes all."""
    group_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | Literal["equal"] = {}
    """Multiplies the loss of a group's training examples (>= 0; 1 for the others). equal: the loss of every group
    counts the same in total, however few its rows are."""
    eval_share: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts in `train` (and `mix`) that evaluate, 0 to below 1; unused where `eval` is set."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of prompt and completion together."""
    overlong: Overlong = "drop"
    """What becomes of longer examples: drop, truncate_prompt (keep its end) or truncate_completion (keep its start)."""
    on_bad_row: OnBadRow = "drop"
    """drop counts a faulty row under its reason; error stops at the first (ties, duplicates, over-long rows aside)."""
    max_dropped_share: float = Field(0.5, ge=0, le=1)
    """Larger shares of dropped rows are an error."""
    limit: int | None = Field(None, ge=1)
    """Read only so many rows of each source; None reads all."""
    seed: int = 0
    """Salt of the split, of shares and caps, and of the choice of mismatched completions."""
