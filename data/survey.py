"""What to know about preference data before training on it: one pass over the records, then numbers and digests only.

A record leaves some 150 bytes behind, so that a million of them are surveyed in less memory than their texts take.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, final

import numpy as np

from dpo.data.load import Checked
from dpo.data.near import Places, Signatures, Sketcher, match
from dpo.data.records import Pair, Preference
from dpo.data.split import prompt_key
from dpo.data.statistics import Lengths, separation
from dpo.data.surveyed import Leaks, Names, Pairs, Repeats, Side, Survey, Thumbs, Twins, Votes
from dpo.data.tokens import survey_tokens
from dpo.estimates import share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES = 3
"""Pairs of records that are named for each kind of fault."""

_NAMES = 10_000  # different names that are counted apart
_LARGEST = 20  # names that are shown
_OTHERS = "(others)"

Digests = np.ndarray[tuple[int], np.dtype[np.uint64]]


def survey(checked: Checked, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Survey:
    """Return what to know about checked data; each side is read once, with a tokenizer the training side twice.

    Args:
        checked: at least one training record.
        tokenizer: the model's; without it nothing is said of tokens.
    """
    sketcher = Sketcher(len(checked.train) + len(checked.eval))
    train = _Scan(checked.train, sketcher, 0)
    evaluation = _Scan(checked.eval, sketcher, len(checked.train)) if len(checked.eval) else None
    signatures = sketcher.all()
    config = checked.config
    return Survey(
        source=checked.report.source,
        report=checked.report,
        eval_report=checked.eval_report,
        sources=checked.sources if len(checked.sources) > 1 else (),
        train=train.side(signatures),
        eval=evaluation.side(signatures) if evaluation else None,
        leaks=_leaks(train, evaluation, signatures) if evaluation else None,
        tokens=survey_tokens(checked.train, tokenizer, config.max_length, config.seed) if tokenizer else None,
    )


@final
class _Scan:
    """One pass over a side, whose signatures begin at `start`."""

    def __init__(self, records: Sequence[Preference], sketcher: Sketcher, start: int) -> None:
        self.records, self.start = records, start
        self._sketcher = sketcher
        self._exact, self._near = array("Q"), array("Q")
        self._prompt_words, self._completion_words = array("I"), array("I")
        self._desirable, self._undesirable = array("I"), array("I")
        self._pairs, self._pair_records = array("Q"), array("I")
        self._shares = np.zeros(3)  # of a record's pairs in which the longer, the shorter, neither wins; summed up
        self._paired = self._uneven = 0
        self._completions, self._groups, self._sources = Counter[int](), Counter[str](), Counter[str]()
        self._agreement, self._voted, self._soft, self._undecided = 0.0, 0, 0, 0
        self._weightless = self._feedback = self._unscored = 0
        for place, record in enumerate(records):
            self._take(place, record)
        self.exact: Digests = np.frombuffer(self._exact, dtype=np.uint64)
        self.near: Digests = np.frombuffer(self._near, dtype=np.uint64)

    def side(self, signatures: Signatures) -> Side:
        """Return what was found."""
        thumbs = len(self._desirable) + len(self._undesirable)
        return Side(
            records=len(self.records),
            completions=tuple(sorted(self._completions.items())),
            unscored=self._unscored,
            prompt_words=Lengths.of(self._prompt_words),
            completion_words=Lengths.of(self._completion_words) if self._completion_words else None,
            repeats=_repeats(self, signatures),
            pairs=self._pair_findings() if self._pairs else None,
            thumbs=Thumbs(share(len(self._desirable), thumbs), separation(self._desirable, self._undesirable))
            if thumbs
            else None,
            votes=Votes(self._voted, self._agreement / self._voted, self._soft, self._undecided)
            if self._voted
            else None,
            weightless=self._weightless,
            feedback=self._feedback,
            groups=_names(self._groups) if self._groups else None,
            sources=_names(self._sources),
        )

    def _take(self, place: int, record: Preference) -> None:
        key = prompt_key(record.prompt)
        digest = _digest(key)
        self._exact.append(_number(digest))
        self._near.append(_number(_digest(self._sketcher.add(record.prompt))))
        self._prompt_words.append(sum(len(message.content.split()) for message in record.prompt))
        lengths = {text: len(text.split()) for text in record.completions}
        self._completion_words.extend(lengths[text] for text in record.completions)
        self._completions[len(record.completions)] += 1
        if record.scores is None:
            self._unscored += bool(record.completions)
        elif len(record.scores) == 1:
            labelled = self._desirable if record.scores[0] > 0 else self._undesirable
            labelled.extend(lengths.values())
        if pairs := record.pairs():
            self._take_pairs(place, pairs, digest, lengths)
        if record.agreement is not None:
            self._voted += 1
            self._agreement += record.agreement
            self._soft += record.agreement < 1
            self._undecided += record.agreement == 0.5
        self._weightless += record.weight == 0
        self._feedback += bool(record.feedback)
        if record.group is not None:
            _count(self._groups, record.group)
        _count(self._sources, record.source.rpartition(":")[0] or record.source)

    def _take_pairs(self, place: int, pairs: Sequence[Pair], prompt: bytes, lengths: dict[str, int]) -> None:
        digests = {text: _digest(text.strip()) for text in lengths}
        won = [0, 0, 0]
        for pair in pairs:
            better, worse = digests[pair.chosen], digests[pair.rejected]
            # The last bit says which way round: a pair and its contrary differ in it alone.
            both = _number(_digest(prompt + min(better, worse) + max(better, worse)))
            self._pairs.append(both & ~1 | (better < worse))
            self._pair_records.append(place)
            gap = lengths[pair.chosen] - lengths[pair.rejected]
            won[0 if gap > 0 else 1 if gap < 0 else 2] += 1
        self._shares += np.asarray(won) / len(pairs)
        self._paired += 1
        self._uneven += won[2] < len(pairs)

    def _pair_findings(self) -> Pairs:
        keys: Digests = np.frombuffer(self._pairs, dtype=np.uint64)
        owners = np.frombuffer(self._pair_records, dtype=f"u{self._pair_records.itemsize}")
        different, first = np.unique(keys, return_index=True)
        contrary = np.flatnonzero(different[1:] >> np.uint64(1) == different[:-1] >> np.uint64(1))
        longer, shorter, neither = (float(share) for share in self._shares / self._paired)
        decided = longer + shorter
        return Pairs(
            n=len(keys),
            restated=len(keys) - len(different),
            contradictions=len(contrary),
            examples=self.named((int(owners[first[n]]), int(owners[first[n + 1]])) for n in contrary),
            longer_wins=share(longer / decided * self._uneven, self._uneven) if decided else None,
            equal_length=neither,
            by_length=share(min((max(longer, shorter) + neither / 2) * self._paired, self._paired), self._paired),
            longer=longer >= shorter,
        )

    def named(self, places: Iterable[tuple[int, int]]) -> Twins:
        """Return the sources of the first few of these pairs of records."""
        return tuple(
            (self.records[min(one, other)].source, self.records[max(one, other)].source)
            for one, other in islice(places, EXAMPLES)
        )


def _repeats(scan: _Scan, signatures: Signatures) -> Repeats:
    _, exact = np.unique(scan.exact, return_index=True)
    _, near, group = np.unique(scan.near, return_index=True, return_inverse=True)
    exact.sort()
    # Of prompts that differ in punctuation only the first is compared further.
    kept = np.sort(near)
    alike = match(signatures, scan.start + kept)
    found = np.flatnonzero(alike >= 0)
    first = near[group]
    punctuated = exact[first[exact] != exact]
    twins = [(int(first[n]), int(n)) for n in punctuated[:EXAMPLES]]
    twins += [(int(kept[alike[n]]), int(kept[n])) for n in found[:EXAMPLES]]
    return Repeats(
        prompts=len(exact),
        repeated=len(scan.records) - len(exact),
        near=len(punctuated),
        similar=len(found),
        examples=scan.named(twins[:EXAMPLES]),
    )


def _leaks(train: _Scan, evaluation: _Scan, signatures: Signatures) -> Leaks:
    exact = np.isin(evaluation.exact, train.exact)
    near = np.isin(evaluation.near, train.near) & ~exact
    _, kept = np.unique(train.near, return_index=True)
    rest = np.flatnonzero(~exact & ~near)
    places = np.concatenate([kept, evaluation.start + rest])
    alike = match(signatures, places, border=len(kept))[len(kept) :]
    found = np.flatnonzero(alike >= 0)

    def first(places: Places, of: Callable[[_Scan], Digests]) -> list[tuple[int, int]]:
        return [(int(np.argmax(of(train) == of(evaluation)[n])), int(n)) for n in places[:EXAMPLES]]

    twins = [
        *first(np.flatnonzero(exact), lambda scan: scan.exact),
        *first(np.flatnonzero(near), lambda scan: scan.near),
        *((int(kept[alike[n]]), int(rest[n])) for n in found[:EXAMPLES]),
    ]
    return Leaks(
        records=len(evaluation.records),
        repeated=int(exact.sum()),
        near=int(near.sum()),
        similar=len(found),
        examples=tuple(
            (train.records[one].source, evaluation.records[other].source) for one, other in twins[:EXAMPLES]
        ),
    )


def _names(counts: Counter[str]) -> Names:
    return Names(len(counts), tuple(counts.most_common(_LARGEST)))


def _count(counts: Counter[str], name: str) -> None:
    counts[name if name in counts or len(counts) < _NAMES else _OTHERS] += 1


def _digest(value: str | bytes) -> bytes:
    return blake2b(value.encode() if isinstance(value, str) else value, digest_size=8).digest()


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little")
