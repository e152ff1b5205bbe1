"""Prompts that are nearly the same: equal but for punctuation, or with most pairs of words in common.

The second kind is found through MinHash signatures (Broder 1997) and banding, in time that grows as n log n; of every
value of a signature one byte is kept (b-bit minwise hashing, arXiv:0910.3349), so a prompt takes 60 bytes.
"""

import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import final

import numpy as np
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

from dpo.data.records import Messages

SIMILAR = 0.8
"""Prompts are similar from this share of common word pairs on (Jaccard, as the signatures estimate it)."""

_BANDS, _ROWS = 12, 5  # prompts that share 80 % meet in a band with a chance of 99 %, that share 50 % of 32 %
_SEED = 1
_AT_ONCE = 50_000  # word pairs whose signatures are computed together
_CHUNK = 20_000  # comparisons made together: bounds the memory

Places = np.ndarray[tuple[int], np.dtype[np.int64]]
Signatures = np.ndarray[tuple[int, int], np.dtype[np.uint8]]


@cache
def _spaced() -> dict[int, str]:
    """What stands for a character: a space for punctuation, and spaces around signs that are words by themselves."""
    table = {}
    for code in range(0x10000):  # beyond it is the punctuation of dead scripts only
        sign = chr(code)
        if unicodedata.category(sign).startswith("P"):
            table[code] = " "
        elif "\u3040" <= sign <= "\u30ff" or "\u3400" <= sign <= "\u9fff":
            table[code] = f" {sign} "
    return table


def words(text: str) -> list[str]:
    """Return the words without case and punctuation, each Chinese or Japanese sign a word.

    A text of nothing but punctuation keeps it.
    """
    folded = text.casefold()
    return folded.translate(_spaced()).split() or folded.split()


@final
class Sketcher:
    """Collects the signatures of prompts in order.

    Args:
        count: how many prompts there are.
    """

    def __init__(self, count: int) -> None:
        self._rows: Signatures = np.zeros((count, _BANDS * _ROWS), dtype=np.uint8)
        self._filled = 0
        self._waiting: list[list[str]] = []
        self._size = 0

    def add(self, prompt: Messages) -> str:
        """Take a prompt and return its words: prompts with the same words are equal but for case and punctuation.

        The system text is part of the words, and none of the signature: rows that share a long one would all be alike.
        """
        turns = [(message.role, words(message.content)) for message in prompt]
        spoken = [word for role, said in turns if role != "system" for word in said]
        pairs = [f"{first} {second}" for first, second in pairwise(spoken)] or spoken or [""]
        self._waiting.append(pairs)
        self._size += len(pairs)
        if self._size >= _AT_ONCE:
            self._flush()
        return "\n".join(" ".join((role, *said)) for role, said in turns)

    def all(self) -> Signatures:
        """Return the signatures of all prompts taken so far."""
        self._flush()
        return self._rows[: self._filled]

    def _flush(self) -> None:
        if self._waiting:
            found = RMinHash.digests_from_token_sets(self._waiting, _BANDS * _ROWS, _SEED)
            end = self._filled + len(found)
            self._rows[self._filled : end] = np.asarray(found, dtype=np.uint32).astype(np.uint8)  # the lowest byte
            self._filled, self._waiting, self._size = end, [], 0


def match(signatures: Signatures, places: Places, border: int | None = None) -> Places:
    """Return for each prompt which similar one stands before it, or -1 where none was found.

    A prompt is compared with the first and with the nearest of those it shares a band with, not with all of them: what
    is found is similar, and a few similar ones are missed.

    Args:
        signatures: of prompts.
        places: which of them to compare, in order.
        border: look up only the prompts from here on, and only among those before it.

    Returns:
        positions within `places`.
    """
    found: Places = np.full(len(places), -1, dtype=np.int64)
    for band in range(_BANDS):
        keys = np.zeros(len(places), dtype=np.uint64)
        for column in range(band * _ROWS, (band + 1) * _ROWS):
            keys = keys << np.uint64(8) | signatures[places, column]
        for earlier, later in _candidates(keys, border):
            open_ = found[later] < 0
            earlier, later = earlier[open_], later[open_]
            for start in range(0, len(later), _CHUNK):
                one, other = earlier[start : start + _CHUNK], later[start : start + _CHUNK]
                alike = (signatures[places[one]] == signatures[places[other]]).mean(axis=1) >= SIMILAR
                found[other[alike]] = one[alike]
    return found


def _candidates(keys: np.ndarray, border: int | None) -> Iterable[tuple[Places, Places]]:
    """Yield (earlier, later) prompts of one key: each with the first of its key, then with the nearest before it."""
    order = np.argsort(keys, kind="stable")
    places = np.arange(len(order))
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = keys[order[1:]] != keys[order[:-1]]
    first = np.maximum.accumulate(np.where(begins, places, 0))
    if border is None:
        nearest, wanted = places - 1, ~begins
    else:
        nearest = np.maximum.accumulate(np.where(order < border, places, -1))
        wanted = (order >= border) & (nearest >= first)
    yield order[first[wanted]], order[wanted]
    yield order[nearest[wanted]], order[wanted]
