from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_ext.activations.dataset import InMemory, Percentages
from sae_ext.errors import UserError

SPLITS = ("train", "validation", "test")


def numbered(n: int, **arguments) -> InMemory:
    """n rows of width 2, each holding its number and its negative."""
    x = np.arange(n, dtype=np.float32)[:, None] * [1, -1]
    return InMemory(x, **arguments)


# -- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_any_floating_dtype_are_gathered_as_float32_in_the_order_asked_for(dtype):
    x = torch.tensor([[0.5, 1], [2, 3], [4, -5]], dtype=dtype)
    data = InMemory(x)
    found = data.gather(np.array([2, 0, 2]))
    assert data.d_in == 2
    assert found.dtype == torch.float32
    assert found.tolist() == [[4, -5], [0.5, 1], [4, -5]]


def test_rows_in_order_come_in_batches_with_a_shorter_last_one():
    data = numbered(10)
    batches = list(data.in_order(np.array([1, 3, 4, 8, 9]), 2))
    assert [b[:, 0].tolist() for b in batches] == [[1, 3], [4, 8], [9]]


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.zeros(4), r"x must have rows and columns, .* got shape \[4\]"),
        (np.zeros((0, 4)), r"rows and columns, .* got shape \[0, 4\]"),
        (np.zeros((4, 0)), r"rows and columns, .* got shape \[4, 0\]"),
        (np.zeros((4, 2), np.int64), "floating-point numbers, got int64"),
        (torch.zeros(4, 2, dtype=torch.int32), "floating-point numbers, got int32"),
        ([["a"]], "floating-point numbers, got <U1"),
        ([[1.0], [float("nan")], [float("inf")]], "as float32 in row 1 and 1 more"),
        (np.array([[1.0], [2.0], [1e39]]), "as float32 in row 2: leave"),
    ],
)
def test_arrays_that_are_no_rows_are_refused(x, told):
    with pytest.raises(UserError, match=told):
        InMemory(x)


# -- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [["a", "b", "a"], [3, 1, 2], [0.5, -1.0, 2.0], [True, False, True]]
)
def test_a_column_gives_the_values_of_the_rows_as_they_are(values):
    data = numbered(3, columns={"label": values})
    assert data.column("label", np.array([2, 0, 0])).tolist() == [values[2], values[0], values[0]]


@pytest.mark.parametrize(
    "values", [["a", "", "b", ""], ["a", None, "b", None], [1, float("nan"), 2, float("nan")]]
)
def test_a_missing_value_is_refused_only_where_it_is_asked_for(values):
    data = numbered(4, columns={"label": values})
    assert len(data.column("label", np.array([0, 2]))) == 2
    with pytest.raises(UserError, match="'label' has no value for row 3 and 2 more: give"):
        data.column("label", np.array([2, 3, 1, 1]))


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    data = numbered(2, columns={"topic": ["a", "b"], "year": [1, 2]})
    with pytest.raises(UserError, match="no column 'label': choose from topic, year"):
        data.column("label", np.array([0]))
    with pytest.raises(UserError, match="no column 'label': there are none"):
        numbered(2).column("label", np.array([0]))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["a"], r"one value per row of x, 2, got shape \[1\]"),
        ([["a"], ["b"]], r"one value per row of x, 2, got shape \[2, 1\]"),
        ([object(), object()], "must hold texts or numbers"),
        ([1, None], "must hold texts or numbers"),
        ([1j, 2j], "must hold texts or numbers"),
    ],
)
def test_columns_that_do_not_fit_are_refused(values, told):
    with pytest.raises(UserError, match=told):
        numbered(2, columns={"label": values})


# -- splits --------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(0, 40), st.integers(0, 40), st.integers(0, 3))
def test_percentages_share_every_row_out_once(n, validation, test, seed):
    data = numbered(n, split=Percentages(validation, test, seed))
    parts = [data.rows(split)[:].tolist() for split in SPLITS]
    assert sorted(parts[0] + parts[1] + parts[2]) == list(range(n))
    assert all(part == sorted(part) for part in parts)
    assert [len(parts[1]), len(parts[2])] == [n * validation // 100, n * test // 100]


def test_the_seed_decides_which_rows_are_held_out():
    first, again, other = (
        numbered(100, split=Percentages(seed=seed)).rows("test")[:].tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first != list(range(10))


def test_a_given_split_is_kept_in_ascending_order():
    data = numbered(6, split={"train": [5, 0, 2], "test": np.array([3])})
    assert [data.rows(split)[:].tolist() for split in SPLITS] == [[0, 2, 5], [], [3]]


@pytest.mark.parametrize(
    ("split", "told"),
    [
        ({"train": [0], "holdout": [1]}, "'holdout' is not one of train, validation, test"),
        ({"train": [0, 4]}, "no row 4, x has rows 0 to 3"),
        ({"train": [-1]}, "no row -1"),
        ({"train": [0, 1], "test": [1, 0]}, "takes row 0 and 1 more twice"),
        ({"train": [2, 2]}, "takes row 2 twice"),
        ({"train": [True, False]}, "must be a list of row numbers, .* of bool"),
        ({"train": [[1]]}, r"must be a list of row numbers, got shape \[1, 1\]"),
        (Percentages(50, 50), "got validation 50 and test 50"),
        (Percentages(-1, 5), "got validation -1 and test 5"),
    ],
)  # fmt: skip
def test_splits_that_cannot_be_are_refused(split, told):
    with pytest.raises(UserError, match=told):
        numbered(4, split=split)


# -- identity ------------------------------------------------------------------------------------


def test_equal_content_has_an_equal_key_whatever_holds_it():
    x = np.arange(8.0).reshape(4, 2)
    first = InMemory(x, {"label": ["a", "b", "a", "b"]}, {"train": [0, 1]})
    wide = np.array(["a", "b", "a", "b"], dtype="U30")
    again = InMemory(
        torch.from_numpy(np.asfortranarray(x)), {"label": wide}, {"train": np.array([1, 0])}
    )
    assert first.key == again.key
    assert len(first.key) == 16


def test_whatever_training_reads_changes_the_key():
    x = np.arange(8.0).reshape(4, 2)
    keys = [
        InMemory(x, {"label": list("abab")}, {"train": [0, 1]}).key,
        InMemory(x + np.eye(4, 1), {"label": list("abab")}, {"train": [0, 1]}).key,
        InMemory(x.reshape(4, 2)[:, ::-1], {"label": list("abab")}, {"train": [0, 1]}).key,
        InMemory(x, {"label": list("abaa")}, {"train": [0, 1]}).key,
        InMemory(x, {"topic": list("abab")}, {"train": [0, 1]}).key,
        InMemory(x, {"label": list("abab")}, {"train": [0, 2]}).key,
        InMemory(x, {"label": list("abab")}, {"test": [0, 1]}).key,
        InMemory(x, {"label": list("abab")}).key,
        InMemory(x, {}, {"train": [0, 1]}).key,
    ]
    assert len(set(keys)) == len(keys)


def test_a_message_can_say_which_row_it_means():
    assert numbered(4).where(3) == "row 3 of x"
