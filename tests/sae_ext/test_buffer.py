from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sae_ext.activations.buffer import RingBuffer
from sae_ext.errors import CorruptArtefact, UserError


def numbered(first: int, n: int, dtype: torch.dtype = torch.float32):
    """Rows of width 2 that hold their number and its half, and the numbers."""
    rows = np.arange(first, first + n)
    return torch.tensor(rows[:, None] * [1, 0.5], dtype=dtype), rows


def held(buffer: RingBuffer) -> list[int]:
    """Numbers of the rows in the buffer; asserts that each row lies under its number."""
    x, rows = buffer.sample(len(buffer), 0)
    assert x[:, 0].tolist() == rows.tolist()
    return sorted(rows.tolist())


# -- adding --------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_whatever_the_chunks_the_last_rows_are_held(capacity, chunks):
    buffer = RingBuffer(capacity, 2)
    total = 0
    for n in chunks:
        buffer.add(*numbered(total, n))
        total += n
        assert buffer.added == total
        assert len(buffer) == min(total, capacity)
        assert held(buffer) == list(range(max(0, total - capacity), total)) if total else True


def test_a_buffer_stays_full_where_chunks_divide_its_capacity():
    buffer = RingBuffer(96, 2)
    lengths = []
    for start in range(0, 320, 32):
        buffer.add(*numbered(start, 32))
        lengths.append(len(buffer))
    assert lengths == [32, 64, *[96] * 8]


def test_rows_one_by_one_or_at_once_end_in_the_same_places():
    one, other = RingBuffer(7, 2), RingBuffer(7, 2)
    for number in range(25):
        one.add(*numbered(number, 1))
    other.add(*numbered(0, 3))
    other.add(*numbered(3, 22))
    for a, b in zip(one.sample(5, 3), other.sample(5, 3), strict=True):
        assert a.tolist() == b.tolist()


def test_what_is_added_may_be_changed_afterwards():
    buffer, (x, rows) = RingBuffer(4, 2), numbered(0, 4)
    buffer.add(x, rows)
    x += 100
    rows += 100
    assert held(buffer) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given_as", [torch.float32, torch.float64, torch.float16])
def test_rows_are_stored_in_the_buffers_dtype_and_given_as_float32(dtype, given_as):
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).to(given_as)
    buffer = RingBuffer(6, 3, dtype=dtype)
    buffer.add(x, np.arange(6))
    found, rows = buffer.sample(6, 0)
    assert found.dtype == torch.float32
    assert (found == x.to(dtype).float()[rows]).all()
    assert buffer.state()["x"].dtype == dtype


@pytest.mark.parametrize(
    ("x", "rows", "told"),
    [
        (torch.zeros(3, 4), np.arange(3), r"rows of width 2 .* got \[3, 4\]"),
        (torch.zeros(2), np.arange(2), r"rows of width 2 .* got \[2\]"),
        (torch.zeros(3, 2), np.arange(2), r"got \[3, 2\] and \[2\]"),
        (torch.zeros(3, 2, dtype=torch.int64), np.arange(3), "floating-point rows, got torch.int64"),
        (torch.tensor([[0, 0], [0, torch.nan]]), np.array([7, 8]), "row 8 is not finite"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused_and_change_nothing(x, rows, told):
    buffer = RingBuffer(4, 2)
    buffer.add(*numbered(0, 3))
    with pytest.raises(UserError, match=told):
        buffer.add(x, rows)
    assert held(buffer) == [0, 1, 2]


def test_a_value_too_large_for_the_storage_dtype_is_refused():
    buffer = RingBuffer(4, 1, dtype=torch.float16)
    with pytest.raises(
        UserError, match=r"row 5 is not finite as torch\.float16: .* torch\.float32"
    ):
        buffer.add(torch.tensor([[1e6]]), np.array([5]))


def test_a_buffer_without_room_is_refused():
    with pytest.raises(UserError, match="at least 1 row, got 0"):
        RingBuffer(0, 2)


# -- drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 10, 150, 300])
def test_a_draw_holds_no_row_twice(n):
    buffer = RingBuffer(300, 2)
    buffer.add(*numbered(0, 450))
    for draw in range(20):
        x, rows = buffer.sample(n, draw)
        assert len(set(rows.tolist())) == n
        assert x.tolist() == [[row, row / 2] for row in rows.tolist()]


def test_the_seed_and_the_number_of_the_draw_decide_what_is_drawn():
    def drawn(seed: int, draw: int) -> list[int]:
        buffer = RingBuffer(100, 2, seed=seed)
        buffer.add(*numbered(0, 100))
        return buffer.sample(20, draw)[1].tolist()

    assert drawn(0, 0) == drawn(0, 0)
    assert len({tuple(drawn(seed, draw)) for seed in (0, 1) for draw in (0, 1)}) == 4


@pytest.mark.parametrize("n", [2, 8, 12])
def test_every_place_of_a_draw_is_uniform_over_the_rows(n):
    buffer = RingBuffer(12, 2)
    buffer.add(*numbered(0, 12))
    draws = np.array([buffer.sample(n, draw)[1] for draw in range(3000)])
    counts = np.array([np.bincount(column, minlength=12) for column in draws.T])
    for place in counts:
        assert chisquare(place).pvalue > 1e-4
    pairs = np.bincount(draws[:, 0] * 12 + draws[:, 1], minlength=144).reshape(12, 12)
    assert chisquare(pairs[~np.eye(12, dtype=bool)]).pvalue > 1e-4


def test_parts_of_a_draw_together_are_the_draw():
    buffer = RingBuffer(50, 2)
    buffer.add(*numbered(0, 50))
    whole = buffer.sample(10, 4)[1].tolist()
    parts = [buffer.sample(10, 4, part) for part in (slice(0, 3), slice(3, 10))]
    assert [len(x) for x, _ in parts] == [3, 7]
    assert [row for _, rows in parts for row in rows.tolist()] == whole


def test_a_small_draw_takes_no_memory_for_the_whole_buffer():
    buffer = RingBuffer(1_000_000, 1)
    buffer.add(torch.zeros(1_000_000, 1), np.arange(1_000_000))
    tracemalloc.start()
    for draw in range(3):
        buffer.sample(64, draw)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_nothing_can_be_drawn_from_an_empty_buffer():
    with pytest.raises(UserError, match="5 rows cannot be drawn from a buffer that is empty"):
        RingBuffer(10, 2).sample(5, 0)


@pytest.mark.parametrize(("n", "filled"), [(5, 4), (11, 10), (11, 30)])
def test_more_rows_than_the_buffer_holds_cannot_be_drawn(n, filled):
    buffer = RingBuffer(10, 2)
    buffer.add(*numbered(0, filled))
    told = f"{n} rows cannot be drawn from a buffer that holds {min(filled, 10)} of at most 10"
    with pytest.raises(UserError, match=told):
        buffer.sample(n, 0)


# -- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("filled", [0, 6, 10, 13, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_buffer_goes_on_bit_for_bit(filled, dtype):
    first = RingBuffer(10, 2, dtype=dtype, seed=3)
    first.add(*numbered(0, filled))
    state = first.state()
    second = RingBuffer(10, 2, dtype=dtype, seed=3)
    second.add(*numbered(500, 15))
    second.restore(state)
    for step in range(4):
        for buffer in (first, second):
            buffer.add(*numbered(100 + 7 * step, 7))
        (x, rows), (again, numbers) = first.sample(5, step), second.sample(5, step)
        assert rows.tolist() == numbers.tolist()
        assert x.equal(again)


def test_a_state_does_not_change_with_the_buffer():
    buffer = RingBuffer(4, 2)
    buffer.add(*numbered(0, 4))
    state = buffer.state()
    buffer.add(*numbered(50, 4))
    assert state["rows"].tolist() == [0, 1, 2, 3]
    assert state["x"][:, 0].tolist() == [0, 1, 2, 3]
    assert int(state["added"]) == 4


@pytest.mark.parametrize(
    "other",
    [RingBuffer(9, 2), RingBuffer(11, 2), RingBuffer(10, 3), RingBuffer(10, 2, dtype=torch.float16)],
    ids=["smaller", "larger", "wider", "other dtype"],
)  # fmt: skip
def test_the_state_of_another_buffer_is_refused(other):
    buffer = RingBuffer(10, 2)
    buffer.add(*numbered(0, 25))
    with pytest.raises(CorruptArtefact, match=r"saved buffer .* start anew without it"):
        other.restore(buffer.state())
