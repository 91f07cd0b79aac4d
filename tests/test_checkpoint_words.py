"""Sizes and lists as messages say them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbn_convert.checkpoint.words import and_more, human_size


@given(st.integers(0, 10**18))
def test_sizes_are_short_and_close(count: int) -> None:
    number, unit = human_size(count).split()
    factor = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * factor == pytest.approx(count, rel=0.06)
    assert unit == "TB" or float(number) < 1000


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_950, "1.0 MB"), (2.1e9, "2.1 GB")],
)
def test_sizes_read_as_people_write_them(count: int, text: str) -> None:
    assert human_size(int(count)) == text


@pytest.mark.parametrize(
    ("names", "shown", "text"),
    [
        ("a", 1, "a"),
        ("ab", 1, "a and 1 more"),
        ("abc", 3, "a, b, c"),
        ("abcde", 3, "a, b, c and 2 more"),
    ],
)
def test_lists_say_how_much_they_leave_out(names: str, shown: int, text: str) -> None:
    assert and_more([*names], shown) == text
