from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sae_ext.activations.batches import (
    Batch,
    BatchSource,
    BufferedRows,
    EpochRows,
    Stream,
    in_stored_order,
)
from sae_ext.activations.buffer import RingBuffer
from sae_ext.activations.dataset import InMemory
from sae_ext.errors import CorruptArtefact, UserError

NUMBERED = InMemory(np.arange(200, dtype=np.float32)[:, None])
"""200 rows of width 1, each holding its own number."""


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert wait_for(lambda: not reading()), reading()


def reading() -> list[str]:
    """Names of the threads that sources have started."""
    names = [thread.name for thread in threading.enumerate()]
    return [n for n in names if n.startswith(("read-batch", "order-epoch", "read-chunk"))]


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true within seconds."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def seen(source: BatchSource, batches: int) -> list[list[int]]:
    """Row numbers of the next batches; asserts that each row lies under its number."""
    found = []
    for _ in range(batches):
        x, rows = source.next()
        assert x.dtype == torch.float32
        assert rows.dtype == np.int64
        assert x[:, 0].tolist() == rows.tolist()
        found.append(rows.tolist())
    return found


class Failing(InMemory):
    """A dataset whose `gather` counts its calls, and fails in those that are named."""

    def __init__(self, *failures: int) -> None:
        super().__init__(np.arange(200, dtype=np.float32)[:, None])
        self.failures = failures
        self.calls = 0
        self._lock = threading.Lock()

    def gather(self, rows):
        with self._lock:
            self.calls += 1
            fails = self.calls in self.failures
        if fails:
            raise OSError("the disk is gone")
        return super().gather(rows)


# -- epochs in random order ----------------------------------------------------------------------


@pytest.mark.parametrize("readers", [0, 1, 3])
@pytest.mark.parametrize("batch_rows", [1, 7, 10, 64, 150])
def test_every_epoch_is_the_seeds_permutation_of_the_rows(batch_rows, readers):
    rows = np.arange(20, 84)
    with EpochRows(NUMBERED, rows, batch_rows, seed=3, readers=readers) as source:
        order = [row for batch in seen(source, 4 * 64 // batch_rows + 1) for row in batch]
    for epoch in range(4):
        expected = np.random.default_rng([3, epoch]).permutation(rows).tolist()
        assert order[epoch * 64 : (epoch + 1) * 64] == expected
        assert sorted(expected) == rows.tolist()


def test_seeds_give_different_orders():
    first, again, other = (
        seen(EpochRows(NUMBERED, np.arange(100), 100, seed, readers=0), 2) for seed in (3, 3, 4)
    )
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]


def test_a_row_lands_anywhere_and_next_to_any_other():
    n, epochs = 8, 4000
    source = EpochRows(NUMBERED, np.arange(n), n, seed=1, readers=0)
    orders = np.array(seen(source, epochs))
    positions = np.array([np.bincount(column, minlength=n) for column in orders.T])
    assert chisquare(positions.ravel(), ddof=2 * n - 2).pvalue > 1e-3
    pairs = np.bincount((orders[:, :-1] * n + orders[:, 1:]).ravel(), minlength=n * n)
    assert chisquare(pairs.reshape(n, n)[~np.eye(n, dtype=bool)]).pvalue > 1e-3


@given(
    st.integers(0, 25),
    st.integers(0, 5),
    st.integers(1, 70),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_epochs_go_on_from_a_state_as_if_never_stopped(done, between, batch_rows, readers, others):
    rows = np.arange(5, 60)
    with (
        EpochRows(NUMBERED, rows, batch_rows, 1, readers=readers) as whole,
        EpochRows(NUMBERED, rows, batch_rows, 1, readers=others) as resumed,
    ):
        seen(whole, done)
        state = whole.state()
        expected = seen(whole, 5)
        seen(resumed, between)  # a state may be taken over at any moment
        resumed.restore(state)
        assert seen(resumed, 5) == expected
        assert resumed.state() == whole.state()


@pytest.mark.parametrize("readers", [0, 1, 4])
def test_a_state_counts_what_was_handed_out_not_what_was_read_ahead(readers):
    data = Failing()
    with EpochRows(data, np.arange(50), 10, 0, readers=readers) as source:
        seen(source, 2)
        assert wait_for(lambda: data.calls >= 2 + readers)
        assert source.state() == {"cursor": torch.tensor(20)}


@pytest.mark.parametrize(("readers", "ahead"), [(0, 0), (1, 1), (3, 3)])
def test_so_many_batches_are_read_ahead_and_no_more(readers, ahead):
    data = Failing()
    with EpochRows(data, np.arange(50), 10, 0, readers=readers) as source:
        seen(source, 1)
        assert wait_for(lambda: data.calls == 1 + ahead)
        time.sleep(0.02)
        assert data.calls == 1 + ahead


@pytest.mark.parametrize("readers", [0, 1, 3])
@pytest.mark.parametrize("failure", [1, 2, 5])
def test_an_error_while_reading_is_raised_and_the_batch_is_not_lost(readers, failure):
    data = Failing(failure)
    with EpochRows(data, np.arange(50), 10, 0, readers=readers) as source:
        found: list[list[int]] = []
        for _ in range(9):
            cursor = int(source.state()["cursor"])
            try:
                found += seen(source, 1)
            except OSError:
                assert int(source.state()["cursor"]) == cursor
    assert len(found) == 8
    assert found == seen(EpochRows(NUMBERED, np.arange(50), 10, 0, readers=0), 8)


def test_a_closed_source_leaves_no_thread_and_may_go_on():
    source = EpochRows(NUMBERED, np.arange(50), 10, 0, readers=2)
    assert reading() == []
    first = seen(source, 2)
    assert reading() != []
    source.close()
    assert reading() == []
    source.close()
    whole = seen(EpochRows(NUMBERED, np.arange(50), 10, 0, readers=0), 12)
    assert first + seen(source, 10) == whole
    source.close()


def test_a_source_that_failed_or_was_forgotten_leaves_no_thread():
    def fail() -> None:
        with EpochRows(Failing(3), np.arange(50), 10, 0, readers=2) as source:
            seen(source, 9)

    with pytest.raises(OSError, match="disk"):
        fail()
    assert reading() == []
    seen(EpochRows(NUMBERED, np.arange(50), 10, 0, readers=2), 1)
    gc.collect()
    assert wait_for(lambda: not reading())


@pytest.mark.parametrize(("batch_rows", "members"), [(10, 1), (10, 2), (10, 3), (7, 7), (11, 4)])
def test_the_members_parts_together_are_the_batch(batch_rows, members):
    whole = EpochRows(NUMBERED, np.arange(50), batch_rows, 0, readers=0)
    data = [Failing() for _ in range(members)]
    shared = [
        EpochRows(data[rank], np.arange(50), batch_rows, 0, readers=0, share=(rank, members))
        for rank in range(members)
    ]
    for _ in range(7):
        parts = [seen(source, 1)[0] for source in shared]
        assert [row for part in parts for row in part] == seen(whole, 1)[0]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert {int(source.state()["cursor"]) for source in shared} == {
            int(whole.state()["cursor"])
        }
    assert [d.calls for d in data] == [7] * members


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": np.arange(0)}, "no rows to draw batches from"),
        ({"batch_rows": 0}, "batch_rows must be at least 1 for each of 1 members, got 0"),
        ({"batch_rows": 3, "share": (0, 4)}, "at least 1 for each of 4 members, got 3"),
        ({"share": (2, 2)}, "rank < members"),
        ({"share": (-1, 2)}, "rank < members"),
        ({"readers": -1}, "readers must be 0 or more, got -1"),
    ],
)
def test_epochs_that_cannot_be_are_refused(changes, told):
    arguments = {"rows": np.arange(9), "batch_rows": 4, "seed": 0} | changes
    with pytest.raises(UserError, match=told):
        EpochRows(NUMBERED, **arguments)


# -- a stream ------------------------------------------------------------------------------------


def test_rows_are_streamed_in_stored_order_epoch_after_epoch():
    chunks = in_stored_order(NUMBERED, np.array([3, 5, 6, 8, 9]), 2)(0)
    found = [next(chunks) for _ in range(7)]
    assert [batch.rows.tolist() for batch in found] == [
        [3, 5], [6, 8], [9], [3, 5], [6, 8], [9], [3, 5],
    ]  # fmt: skip
    assert found[1].x.tolist() == [[6], [8]]


@pytest.mark.parametrize("first", [0, 1, 2, 3, 7, 100])
def test_a_stream_can_be_begun_at_any_chunk(first):
    stream = in_stored_order(NUMBERED, np.arange(10), 3)
    whole, later = stream(0), stream(first)
    for _ in range(first):
        next(whole)
    for _ in range(6):
        assert next(later).rows.tolist() == next(whole).rows.tolist()


@pytest.mark.parametrize(("n", "chunk_rows", "told"), [(0, 3, "no rows"), (5, 0, "chunk_rows")])
def test_streams_of_nothing_are_refused(n, chunk_rows, told):
    with pytest.raises(UserError, match=told):
        in_stored_order(NUMBERED, np.arange(n), chunk_rows)


# -- batches from a buffer -----------------------------------------------------------------------


def chunked(*sizes: int) -> Stream:
    """A finite stream of chunks of the given sizes, its rows numbered from 0."""
    starts = np.cumsum([0, *sizes])

    def chunks(first: int) -> Iterator[Batch]:
        for number in range(first, len(sizes)):
            rows = np.arange(starts[number], starts[number + 1])
            yield Batch(torch.tensor(rows[:, None], dtype=torch.float32), rows)

    return chunks


def buffered(stream: Stream, capacity: int = 40, batch_rows: int = 8, **arguments) -> BufferedRows:
    arguments = {"min_rows": 20} | arguments
    return BufferedRows(stream, RingBuffer(capacity, 1, seed=5), batch_rows, **arguments)


@pytest.mark.parametrize("fresh", [0.1, 0.25, 1, 1.5])
def test_the_buffer_takes_in_what_is_asked_for_and_no_more(fresh):
    with buffered(chunked(*[7] * 60), fresh=fresh) as source:
        for draw in range(25):
            seen(source, 1)
            assert source.buffer.added == 20 + int(fresh * 8 * draw)


@pytest.mark.parametrize("fresh", [1, 0.25])
def test_each_row_is_used_about_once_per_fresh_row(fresh):
    stream = chunked(*[50] * 400)
    with buffered(stream, 500, 50, min_rows=500, fresh=fresh) as source:
        used = np.bincount([row for batch in seen(source, 200) for row in batch])
    settled = used[500 : int(50 * fresh * 200) - 500]  # came and went while batches were drawn
    assert settled.mean() == pytest.approx(1 / fresh, rel=0.05)


@pytest.mark.parametrize("sizes", [[400], [1] * 400, [0, 3, 0, 0, 90, 1, 300, 6], [41] * 10])
def test_how_the_stream_is_cut_into_chunks_changes_nothing(sizes):
    with buffered(chunked(*sizes)) as source, buffered(chunked(*[10] * 40)) as even:
        assert seen(source, 40) == seen(even, 40)


def test_a_batch_holds_no_place_of_the_buffer_twice():
    with buffered(chunked(*[9] * 50), batch_rows=20) as source:
        for batch in seen(source, 15):
            assert len(set(batch)) == 20


def test_neighbours_in_the_stream_are_mixed():
    with buffered(chunked(*[100] * 10), 400, 20, min_rows=400) as source:
        batches = np.array(seen(source, 25))
    assert np.abs(np.diff(batches, axis=1)).mean() > 50


@pytest.mark.parametrize("sizes", [[], [19], [10, 9], [0, 0]])
def test_a_stream_that_ends_before_enough_rows_is_refused(sizes):
    with buffered(chunked(*sizes)) as source:
        for _ in range(2):
            told = rf"ended after {sum(sizes)} rows, before the min_rows \(20\)"
            with pytest.raises(UserError, match=told):
                source.next()


def test_a_stream_that_ends_later_just_stops_feeding():
    with buffered(chunked(20, 5)) as source:
        found = seen(source, 30)
        assert source.buffer.added == 25
    assert {row for batch in found[2:] for row in batch} == set(range(25))


@given(
    st.integers(0, 12),
    st.integers(0, 4),
    st.lists(st.integers(0, 33), min_size=3, max_size=6),
    st.sampled_from([0.3, 1.0, 2.2]),
)
def test_buffered_rows_go_on_from_a_state_as_if_never_stopped(done, between, sizes, fresh):
    stream = chunked(30, *sizes)
    with buffered(stream, fresh=fresh) as whole, buffered(stream, fresh=fresh) as resumed:
        seen(whole, done)
        state = whole.state()
        expected = [whole.next() for _ in range(6)]
        seen(resumed, between)
        resumed.restore(state)
        for x, rows in expected:
            again = resumed.next()
            assert again.rows.tolist() == rows.tolist()
            assert again.x.equal(x)
        last, other = whole.state(), resumed.state()
        assert last.keys() == other.keys()
        assert all(value.equal(other[name]) for name, value in last.items())


def test_a_state_inside_a_chunk_begins_the_stream_at_that_chunk():
    begun = []

    def stream(first: int) -> Iterator[Batch]:
        begun.append(first)
        return chunked(*[9] * 30)(first)

    with buffered(stream) as source:
        seen(source, 3)
        state = source.state()
        assert (int(state["chunk"]), int(state["place"])) == (4, 0)
        seen(source, 1)
        state = source.state()
        assert (int(state["chunk"]), int(state["place"])) == (4, 8)
        source.restore(state)
        seen(source, 1)
    assert begun == [0, 4]


def test_the_state_of_another_buffer_is_refused():
    with buffered(chunked(400)) as source, buffered(chunked(400), capacity=30) as other:
        seen(source, 20)
        with pytest.raises(CorruptArtefact, match="saved buffer"):
            other.restore(source.state())


def test_an_error_in_the_stream_is_raised_and_no_row_is_lost():
    failures = [2, 5]

    def stream(first: int) -> Iterator[Batch]:
        for number, chunk in enumerate(chunked(*[9] * 30)(first), start=first):
            if number in failures:
                failures.remove(number)
                raise OSError("the disk is gone")
            yield chunk

    found = []
    with buffered(stream) as source:
        for _ in range(22):
            with contextlib.suppress(OSError):
                found += seen(source, 1)
    assert failures == []
    with buffered(chunked(*[9] * 30)) as whole:
        assert found == seen(whole, 20)


def test_closing_ends_the_stream_and_its_thread():
    ended, held = [], []

    def chunks(first: int) -> Iterator[Batch]:
        try:
            yield from chunked(*[9] * 30)(first)
        finally:
            ended.append(first)

    def stream(first: int) -> Iterator[Batch]:
        held.append(chunks(first))  # not left to the garbage collector
        return held[-1]

    source = buffered(stream)
    assert reading() == []
    first = seen(source, 2)
    assert reading() != []
    source.close()
    assert reading() == []
    assert ended == [0]
    source.close()
    with buffered(chunked(*[9] * 30)) as whole:
        assert first + seen(source, 5) == seen(whole, 7)
    source.close()


def test_the_next_chunk_is_read_while_the_current_one_is_used():
    read = []

    def stream(first: int) -> Iterator[Batch]:
        for chunk in chunked(*[100] * 5)(first):
            read.append(threading.current_thread() is threading.main_thread())
            yield chunk

    with buffered(stream) as source:
        seen(source, 1)
        assert wait_for(lambda: len(read) == 2)
        time.sleep(0.02)
        assert read == [False, False]


def test_the_members_parts_of_a_buffered_batch_together_are_the_batch():
    members = 3
    whole = buffered(chunked(*[9] * 30))
    shared = [buffered(chunked(*[9] * 30), share=(rank, members)) for rank in range(members)]
    for _ in range(6):
        parts = [seen(source, 1)[0] for source in shared]
        assert [len(part) for part in parts] == [2, 3, 3]
        assert [row for part in parts for row in part] == seen(whole, 1)[0]
    for source in (whole, *shared):
        source.close()


def test_a_stored_dataset_can_be_streamed_through_the_buffer():
    with buffered(in_stored_order(NUMBERED, np.arange(0, 200, 2), 33)) as source:
        found = {row for batch in seen(source, 60) for row in batch}
    assert found <= set(range(0, 200, 2))
    assert len(found) > 90


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"min_rows": 41}, r"between batch_rows \(8\) and the buffer's capacity \(40\), got 41"),
        ({"min_rows": 7}, r"between batch_rows \(8\) .* got 7"),
        ({"fresh": 0}, "fresh must be above 0, got 0"),
        ({"fresh": float("nan")}, "fresh must be above 0, got nan"),
        ({"batch_rows": 0}, "batch_rows must be at least 1"),
        ({"share": (3, 3)}, "rank < members"),
    ],
)
def test_buffered_rows_that_cannot_be_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        buffered(chunked(400), **changes)
