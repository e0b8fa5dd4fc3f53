"""What is measured: metrics of a step, intervals."""

import math

import pytest

from lab.evaluate import interval, wilson


def test_intervals_on_known_values():
    assert interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        [2.5 - 2.054260, 2.5 + 2.054260], abs=1e-5
    )
    assert all(map(math.isnan, interval([3.0])))
    assert wilson(8, 10) == pytest.approx([0.490162, 0.943318], abs=1e-5)
    assert wilson(0, 10) == pytest.approx([0.0, 0.277533], abs=1e-5)
    assert wilson(10, 10) == pytest.approx([0.722467, 1.0], abs=1e-5)
    assert wilson(2.5, 5) == pytest.approx([0.170491, 0.829509], abs=1e-4)
    assert all(map(math.isnan, wilson(0, 0)))
