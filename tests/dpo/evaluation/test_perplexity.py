"""Every token but the first is scored once; perplexity is that of all tokens; differences are paired."""

import math

import numpy as np
import pytest

from dpo.errors import DataError, ModelError
from dpo.estimates import Estimate
from dpo.evaluation.perplexity import Document, difference, perplexity, read_documents, windows


def documents(*texts):
    return [Document(text, f"f:{n}") for n, text in enumerate(texts, start=1)]


def letters(text):
    return [ord(letter) for letter in text]


def uniform(nats):
    """A model that holds each token equally probable."""
    return lambda parts: [-nats * len(scored) for _, scored in parts]


def by_letter(parts):
    """A model to which each token costs as many nats as its number says."""
    return [-float(sum(scored)) for _, scored in parts]


class TestWindows:
    @pytest.mark.parametrize("n", [2, 3, 7, 8, 9, 12, 13, 40, 41])
    @pytest.mark.parametrize(("window", "context"), [(8, 4), (8, 1), (8, 7), (2, 1), (100, 10)])
    def test_every_token_but_the_first_is_scored_once_behind_its_own_context(self, n, window, context):
        ids = tuple(range(n))
        parts = windows(ids, window, context)
        assert [token for _, scored in parts for token in scored] == list(ids[1:])
        for number, (before, scored) in enumerate(parts):
            assert len(before) + len(scored) <= window
            assert before + scored == ids[before[0] : scored[-1] + 1]
            assert len(before) == (1 if number == 0 else min(context, scored[0]))

    def test_a_short_text_is_one_window(self):
        assert windows((5, 6, 7), 8, 4) == [((5,), (6, 7))]

    def test_hand_numbers(self):
        assert windows((0, 1, 2, 3, 4, 5, 6), 4, 2) == [
            ((0,), (1, 2, 3)),
            ((2, 3), (4, 5)),
            ((4, 5), (6,)),
        ]

    @pytest.mark.parametrize(("window", "context"), [(4, 4), (4, 0), (1, 1)])
    def test_a_window_must_be_longer_than_its_context(self, window, context):
        with pytest.raises(ValueError, match="1 <= context < window"):
            windows((1, 2, 3), window, context)


class TestPerplexity:
    def test_a_uniform_model_is_as_unsure_as_its_vocabulary_is_large(self):
        found = perplexity(documents("abc", "defgh"), letters, uniform(math.log(50)))
        assert found.nats_per_token.value == pytest.approx(math.log(50))
        assert found.perplexity.value == pytest.approx(50)
        assert [one.tokens for one in found.readings] == [2, 4]

    def test_all_tokens_count_alike_not_all_documents(self):
        """Nats 2 over 2 tokens and 30 over 6: 32 / 8 = 4, where the mean over documents would be 3."""
        ids = {"a": [9, 1, 1], "b": [9, 5, 5, 5, 5, 5, 5]}
        found = perplexity(documents("a", "b"), ids.__getitem__, by_letter)
        assert [one.nats for one in found.readings] == [2.0, 30.0]
        assert found.nats_per_token.value == 4.0
        assert found.perplexity.value == pytest.approx(math.exp(4.0))
        assert found.nats_per_token.n == 2

    def test_a_long_document_is_cut_and_summed(self):
        found = perplexity(documents("abcdefghij"), letters, by_letter, window=4, context=2)
        assert found.readings[0].nats == sum(letters("bcdefghij"))
        assert found.readings[0].tokens == 9

    def test_one_document_has_no_interval(self):
        found = perplexity(documents("abc"), letters, uniform(1.0))
        assert found.nats_per_token == Estimate(1.0, 1.0, 1.0, 1)

    def test_the_interval_covers_the_truth(self):
        """Documents of 2 to 40 tokens and their own difficulty, 2 nats a token in expectation."""
        rng = np.random.default_rng(0)
        covered = 0
        for _ in range(100):
            sizes, hard = rng.integers(2, 41, 30), rng.gamma(4.0, 0.5, 30)
            nats = {str(n): -float(h) for n, h in enumerate(hard)}
            found = perplexity(
                documents(*nats),
                lambda text, sizes=sizes: [int(text)] * int(sizes[int(text)]),
                lambda parts, nats=nats: [nats[str(scored[0])] * len(scored) for _, scored in parts],
            )
            estimate = found.nats_per_token
            covered += estimate.low <= 2.0 <= estimate.high
            assert found.perplexity.low == pytest.approx(math.exp(estimate.low))
            assert found.perplexity.high == pytest.approx(math.exp(estimate.high))
        assert 88 <= covered <= 99

    def test_equal_calls_are_equal(self):
        texts = documents("abc", "xy", "klmnop")
        assert perplexity(texts, letters, by_letter) == perplexity(texts, letters, by_letter)

    @pytest.mark.parametrize("found", [[math.nan], [-math.inf], [], [-1.0, -1.0]])
    def test_a_broken_log_probability_is_named(self, found):
        with pytest.raises(ModelError, match=r"^f:2: got the log-probabilities"):
            perplexity(documents("abc", "bad"), letters, lambda parts: found if parts[0][0][0] == 98 else [-1.0])

    @pytest.mark.parametrize("text", ["", "a"])
    def test_a_text_with_nothing_to_score_is_named(self, text):
        with pytest.raises(DataError, match=rf"^f:2: got a text of {len(text)} tokens"):
            perplexity(documents("abc", text), letters, uniform(1.0))

    def test_no_documents(self):
        with pytest.raises(ValueError, match="got no documents"):
            perplexity([], letters, uniform(1.0))


class TestDifference:
    def test_it_is_paired(self):
        """Difficulty differs by nats between documents; the second model is 0.1 nats a token better on each."""
        texts = documents("aaaa", "zz", "mmmmmm", "abcdef", "yyy", "ooooo", "hh", "ccccccccc")
        worse = perplexity(texts, letters, lambda parts: [one - 0.1 * len(parts[0][1]) for one in by_letter(parts)])
        start = perplexity(texts, letters, by_letter)
        found = difference(worse, start)
        assert found.value == pytest.approx(0.1)
        assert found.half_width < 1e-6 < worse.nats_per_token.half_width
        assert found.n == 8
        assert difference(start, worse).value == pytest.approx(-0.1)

    def test_its_unit_is_a_token_over_all_documents(self):
        """Tokens 1 and 3; nats 2 - 1 and 9 - 6: 4 / 4 = 1."""
        texts = documents("ab", "cdef")
        second = perplexity(texts, letters, lambda parts: [{1: -1.0, 3: -6.0}[len(parts[0][1])]])
        first = perplexity(texts, letters, lambda parts: [{1: -2.0, 3: -9.0}[len(parts[0][1])]])
        assert difference(first, second).value == 1.0

    def test_models_that_read_different_texts(self):
        first, second = (perplexity(documents(text), letters, uniform(1.0)) for text in ("abc", "abcd"))
        with pytest.raises(ValueError, match="different documents"):
            difference(first, second)


class TestReadDocuments:
    def test_rows_and_lines(self, tmp_path):
        rows, plain = tmp_path / "held_out.jsonl", tmp_path / "held_out.txt"
        rows.write_text('{"text": "one\\ntwo"}\n{"text": "three"}\n')
        plain.write_text("one\n\ntwo\n")
        assert read_documents(str(rows)) == [Document("one\ntwo", f"{rows}:1"), Document("three", f"{rows}:2")]
        assert read_documents(str(plain)) == [Document("one", f"{plain}:1"), Document("two", f"{plain}:3")]
        assert len(read_documents(str(rows), limit=1)) == 1

    @pytest.mark.parametrize("row", ['{"prompt": "x"}', '{"text": 3}', '{"text": " "}'])
    def test_a_row_without_text_is_named(self, tmp_path, row):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "one"}\n' + row + "\n")
        with pytest.raises(DataError, match=r"rows\.jsonl:2: got .* expected plain text"):
            read_documents(str(path))
