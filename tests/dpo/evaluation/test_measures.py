"""Held-out comparisons are counted as they should be."""

import pytest

from dpo.estimates import share
from dpo.evaluation.measures import pair_accuracy


class TestPairAccuracy:
    def test_a_tie_is_half_a_hit(self):
        assert pair_accuracy([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == share(2.5, 4)

    def test_unequal_lengths(self):
        with pytest.raises(ValueError, match="shorter"):
            pair_accuracy([1.0, 2.0], [0.0])
