"""What is told of bad input."""

import pytest

from egjax.errors import EgjaxError, check_range


@pytest.mark.parametrize(
    ("value", "interval"),
    [
        (0.0, "(0, inf)"),
        (0.5, "[0, 0.5)"),
        (1.1, "(0, 1]"),
        (-1, "[0, 1]"),
        (float("nan"), "[0, 1]"),
    ],
)
def test_numbers_outside_of_an_interval_are_refused(value, interval):
    with pytest.raises(EgjaxError) as found:
        check_range(value, interval, where="--option")
    assert str(found.value) == f"--option: {value} is not in {interval}"


@pytest.mark.parametrize(
    ("value", "interval"),
    [(None, "(0, inf)"), (1e-9, "(0, inf)"), (0.0, "[0, 0.5)"), (1, "(0, 1]"), (1.0, "[0, 1]")],
)
def test_numbers_inside_pass(value, interval):
    check_range(value, interval, where="--option")
