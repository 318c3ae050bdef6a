"""The flat vector: all W, then all b, as views."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpcore.core.layout import Layout

SIZES = st.lists(st.integers(1, 7), min_size=2, max_size=6).map(tuple)


@given(SIZES, st.booleans())
def test_the_views_cover_every_entry_of_the_vector_once_weights_first(sizes, bias):
    layout = Layout(sizes, bias)
    flat = np.arange(layout.size)
    W, b = layout.views(flat)
    assert len(W) == len(b) == layout.layers + 1 == len(sizes)
    assert W[0] is None
    assert b[0] is None
    parts = [*W[1:], *(b[1:] if bias else [])]
    np.testing.assert_array_equal(np.concatenate([x.ravel() for x in parts]), flat)
    assert layout.weights == sum(x.size for x in W[1:])
    assert [x.shape for x in W[1:]] == list(itertools.pairwise(sizes))
    assert [None if x is None else x.shape for x in b[1:]] == [
        (n,) if bias else None for n in sizes[1:]
    ]


@given(SIZES, st.booleans())
def test_views_share_the_vectors_memory_and_are_row_major(sizes, bias):
    layout = Layout(sizes, bias)
    flat = np.zeros(layout.size, np.float32)
    W, b = layout.views(flat)
    for i, view in enumerate([*W[1:], *(x for x in b[1:] if x is not None)], 1):
        assert np.shares_memory(view, flat)
        assert view.flags.c_contiguous
        view[...] = i
    assert (flat != 0).all()
    assert flat.sum() == sum(
        i * x.size for i, x in enumerate([*W[1:], *(x for x in b[1:] if x is not None)], 1)
    )


@given(SIZES, st.booleans(), st.data())
def test_learned_parameters_stand_behind_all_else(sizes, bias, data):
    learned = tuple(data.draw(st.sampled_from([0, 1, n])) for n in sizes[1:])
    layout, without = Layout(sizes, bias, learned=learned), Layout(sizes, bias)
    flat = np.arange(layout.size)
    a = layout.slopes(flat)
    assert [None if x is None else x.size for x in a] == [None, *(n or None for n in learned)]
    assert layout.weights == without.weights
    found = np.concatenate([flat[: without.size], *(x for x in a if x is not None)])
    np.testing.assert_array_equal(found, flat)
    for view, same in zip(layout.views(flat), without.views(flat), strict=True):
        assert all(x is y is None or np.array_equal(x, y) for x, y in zip(view, same, strict=True))
    assert without.slopes(flat) == (None,) * len(sizes)


@given(SIZES, st.booleans(), st.data())
def test_the_name_of_an_entry_leads_to_that_entry(sizes, bias, data):
    layout = Layout(
        sizes, bias, learned=tuple(data.draw(st.sampled_from([0, 1, n])) for n in sizes[1:])
    )
    flat = np.arange(layout.size)
    (W, b), a = layout.views(flat), layout.slopes(flat)
    names = [layout.name(i) for i in range(layout.size)]
    assert [eval(name, {"W": W, "b": b, "a": a}) for name in names] == list(range(layout.size))


def test_a_position_past_the_end_has_no_name():
    with pytest.raises(IndexError):
        Layout((2, 3)).name(9)
    assert Layout((2, 3)).name(8) == "b[1][2]"
    with pytest.raises(IndexError):
        Layout((2, 3), bias=False).name(6)
