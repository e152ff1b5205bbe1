"""Perplexity of held-out plain text: what alignment costs in the language that the model knew before."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
from scipy import stats

from dpo.data.read import read
from dpo.errors import DataError, ModelError
from dpo.estimates import LEVEL, Estimate, mean

Window: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids that are only read, and the ids behind them that are scored."""
Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Maps a text to token ids, as plain text: no chat template; a start token where the model has one."""
WindowLogps: TypeAlias = Callable[[Sequence[Window]], Sequence[float]]
"""Maps windows to the log-probability of each one's scored tokens, summed, in nats, in the same order."""


@final
@dataclass(frozen=True)
class Document:
    """A text that was not trained on."""

    text: str
    source: str
    """file:row, for messages."""


@final
@dataclass(frozen=True)
class Reading:
    """How well a model predicts one document."""

    nats: float
    """Minus the log-probability of its scored tokens, summed."""
    tokens: int
    """Scored tokens: all but the first, which nothing stands before."""


@final
@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts plain text."""

    nats_per_token: Estimate
    """Cross-entropy: all nats over all tokens; the interval is over documents."""
    perplexity: Estimate
    """exp of it: among how many equally likely tokens the model is as unsure."""
    readings: tuple[Reading, ...]
    """[document]."""


def perplexity(
    documents: Sequence[Document], encode: Encode, logps: WindowLogps, *, window: int = 512, context: int = 128
) -> Perplexity:
    """Return how well a model predicts the documents, each token but the first scored exactly once.

    A document longer than `window` tokens is cut in windows: each begins with the last `context` tokens of the one
    before, which are read again and not scored. Tokens early in a window see less of the document than they would in a
    longer window, which raises the number somewhat, for each model alike.

    Args:
        documents: Texts of at least two tokens.
        encode: Of the model's tokenizer.
        logps: Of the model.
        window: Longest stretch the model reads at once, in tokens (> context).
        context: Tokens read again before those scored, in all windows but a document's first (>= 1).

    Raises:
        DataError: a document of fewer than two tokens; names its row.
        ModelError: a log-probability is missing or not finite; names the document.
        ValueError: no documents, or a window that is not longer than its context.
    """
    if not documents:
        raise ValueError("perplexity: got no documents, expected at least one")
    readings = []
    for document in documents:
        ids = tuple(encode(document.text))
        if len(ids) < 2:
            raise DataError(
                f"{document.source}: got a text of {len(ids)} tokens, expected two or more, as the first is not "
                "scored. Delete the row, or join it with another."
            )
        parts = windows(ids, window, context)
        found = list(logps(parts))
        if len(found) != len(parts) or not all(map(math.isfinite, found)):
            raise ModelError(
                f"{document.source}: got the log-probabilities {found!r:.60} for {len(parts)} windows, expected a "
                "finite number for each. Check that the model's weights are finite."
            )
        readings.append(Reading(-math.fsum(found), len(ids) - 1))
    estimate = _per_token([one.nats for one in readings], [one.tokens for one in readings])
    return Perplexity(
        estimate,
        Estimate(math.exp(estimate.value), math.exp(estimate.low), math.exp(estimate.high), estimate.n),
        tuple(readings),
    )


def difference(first: Perplexity, second: Perplexity) -> Estimate:
    """Return nats a token of the first model minus those of the second, paired over documents.

    As some documents are hard for every model, its interval is much narrower than those of the two. exp of it is the
    ratio of the perplexities.

    Raises:
        ValueError: the two did not read the same documents, token by token.
    """
    tokens = [one.tokens for one in first.readings]
    if tokens != [one.tokens for one in second.readings]:
        raise ValueError("difference: got models that read different documents, expected the same ones and tokenizer")
    pairs = zip(first.readings, second.readings, strict=True)
    return _per_token([one.nats - other.nats for one, other in pairs], tokens)


def windows(ids: Sequence[int], window: int, context: int) -> list[Window]:
    """Cut a document in windows of at most `window` tokens; see `perplexity`.

    Raises:
        ValueError: a window that is not longer than its context, or a context of no token.
    """
    if not 1 <= context < window:
        raise ValueError(f"windows: got window={window} and context={context}, expected 1 <= context < window")
    found, start = [], 1
    while start < len(ids):
        begin = max(0, start - context)
        end = min(len(ids), begin + window)
        found.append((tuple(ids[begin:start]), tuple(ids[start:end])))
        start = end
    return found


def read_documents(path: str, limit: int | None = None) -> list[Document]:
    """Read plain texts: the column text of a file of rows, or the lines of a .txt file.

    Args:
        path: What `dpo.data.read.read` takes.
        limit: Read no more than this many.

    Raises:
        DataError: the file cannot be read, or a row holds no text; names the row.
    """
    column = "prompt" if path.endswith((".txt", ".txt.gz")) else "text"  # how the reader calls a line
    documents = []
    for row in read(path, limit):
        text = row.values.get(column)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{row.source}: got {text!r:.60} as text, expected plain text. Mend this row or delete it.")
        documents.append(Document(text, row.source))
    return documents


def _per_token(nats: Sequence[float], tokens: Sequence[int], seed: int = 0) -> Estimate:
    """Return Σ nats / Σ tokens with its BCa bootstrap interval over documents (Efron 1987)."""
    sums, counts = np.asarray(nats, dtype=float), np.asarray(tokens, dtype=float)
    value = float(sums.sum() / counts.sum())
    rates = sums / counts
    if len(sums) == 1 or np.ptp(rates) < 1e-12:
        return Estimate(value, value, value, len(sums))

    def ratio(drawn_sums: np.ndarray, drawn_counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return drawn_sums.sum(axis) / drawn_counts.sum(axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (sums, counts),
            ratio,
            paired=True,
            n_resamples=4000,
            confidence_level=LEVEL,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    if not (math.isfinite(low) and math.isfinite(high)):  # BCa's acceleration is undefined on some tiny samples
        spread = mean(list((sums - value * counts) / counts.mean()), seed)  # the ratio's linear part, about its value
        low, high = value + spread.low, value + spread.high
    return Estimate(value, low, high, len(sums))
