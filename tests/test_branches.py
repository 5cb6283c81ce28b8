"""Branches as values: what is one, how it is spelt, sorted and shown."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repmlp.branches import BranchSpec, label, order, parse, parse_all, values

odd = st.integers(0, 5).map(lambda n: 2 * n + 1)


@pytest.mark.parametrize("same", [3, "3", "3x3", np.int64(3), BranchSpec((3, 3))])
def test_one_branch_has_one_value(same):
    assert parse(same) == BranchSpec((3, 3)) and values([same]) == [3] and label([same]) == "3x3"


@pytest.mark.parametrize(
    "text, spec, value, shown",
    [
        ("1x3", BranchSpec((1, 3)), "1x3", "1x3"),
        ("3x1", BranchSpec((3, 1)), "3x1", "3x1"),
        ("3d2", BranchSpec((3, 3), 2), "3d2", "3x3d2"),
        ("3s", BranchSpec((3, 3), 1, True), "3s", "3x3s"),
        ("3x3s", BranchSpec((3, 3), 1, True), "3s", "3x3s"),
        ("1x5d3s", BranchSpec((1, 5), 3, True), "1x5d3s", "1x5d3s"),
    ],
)
def test_spellings(text, spec, value, shown):
    assert parse(text) == spec and spec.value == value and spec.label == shown


@given(st.tuples(odd, odd), st.integers(1, 4), st.booleans())
def test_value_and_label_are_read_back(shape, dilation, shuffled):
    one = shape == (1, 1)
    spec = BranchSpec(shape, 1 if one else dilation, shuffled and not one)
    assert parse(spec.value) == parse(spec.label) == spec


@pytest.mark.parametrize("branch", [True, 0, 2, -3, 3.0, None, "x3", "3x", "3d0", "2x3", "1d2", "1s", "3 s", "", [3]])
def test_what_is_no_branch_is_named(branch):
    with pytest.raises(ValueError, match="branch"):
        parse(branch)


@pytest.mark.parametrize("branches", [[3, "3x3"], [1, 3, 1], ["3s", "3x3s"]])
def test_duplicates_are_named(branches):
    with pytest.raises(ValueError, match="twice"):
        parse_all(branches)


@pytest.mark.parametrize("branches", ["3", 3])
def test_a_list_is_asked_for(branches):
    with pytest.raises(ValueError, match="use a list"):
        parse_all(branches)


def test_what_fits_a_map():
    assert not parse("3d8").fits((8, 8)) and parse("3d7").fits((8, 8)) and parse("5d4").fits((8, 8))
    assert not parse("3d2").fits((1, 8)) and parse("1x3d2").fits((1, 8)) and parse("3d2").fits((8,))
    assert parse(7).fits((1, 1)) and parse("3s").fits((1, 1))
    with pytest.raises(ValueError, match=r"kernels=\[1, '3d8'\]: of the branch 3x3d8 .* 8x9; use a dilation below 8"):
        parse_all([1, "3d8"], (8, 9))
    for branch, size, below in (("3d4", (4, 3), 3), ("3d2", (1, 6), 2), ("1x3d9", (4, 7), 7)):
        with pytest.raises(ValueError, match=f"use a dilation below {below}$"):
            parse_all([branch], size)
        assert parse(re.sub(r"d\d", f"d{below - 1}", branch)).fits(size)


def test_along_a_sequence():
    """k and 1xk both have k taps along it; what would have taps beside it is no branch of a sequence."""
    assert [spec.value for spec in parse_all(["1x3", 1, "1x5d2s", "3s"], (12,))] == [1, 3, "3s", "5d2s"]
    with pytest.raises(ValueError, match="branch 3x3 stands there twice"):
        parse_all([3, "1x3"], (12,))
    with pytest.raises(ValueError, match="branch 3x1 on a sequence, which has one dimension"):
        parse_all([1, "3x1"], (12,))
    with pytest.raises(ValueError, match="map of 12; use a dilation below 12"):
        parse_all(["3d12"], (12,))


def test_sets_are_sorted_by_number_and_reach():
    sets = [[1, "3s"], [], [3], [1, 3, 5], [1], ["3s"], [1, 3], [1, 5]]
    assert sorted(sets, key=order) == [[], [1], [3], ["3s"], [1, 3], [1, 5], [1, "3s"], [1, 3, 5]]


def test_order_and_none():
    assert values(["3s", 3, 1, "3d2", "1x3", "3x1"]) == [1, "1x3", "3x1", 3, "3d2", "3s"]
    assert values([]) == [] and label([]) == "none" and label([3, 1]) == "1x1+3x3"
