"""The 8-bit screen lists exactly what float arithmetic would, whatever the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

_C = pytest.importorskip("sae_ext._C", reason="the kernels are not built")

from guarded import Guarded, arrays, code_out, random  # noqa: E402
from implementations import CPU  # noqa: E402

screens = pytest.mark.skipif(
    _C.isa() != "avx512vnni", reason=f"{_C.isa()} has no screen: it needs avx512vnni"
)
MAX = torch.finfo(torch.float32).max
SAMPLED_ROWS = 43 * 6
"""Of a longer batch, those whose candidates are counted before anything is listed."""


def gathered(x: Tensor, W_enc: Tensor, b_enc: Tensor, clip: float = math.inf) -> tuple[Any, ...]:
    """The float path: every entry computed; row_ptr, col, val, saturated."""
    rows, d_in, d_sae = *x.shape, len(W_enc)
    n = rows * d_sae
    out = code_out(rows, n, torch.float32)
    CPU.call(
        "gather",
        {
            "exec": CPU.exec(torch.float32, 1), "support_ptr": torch.arange(rows + 1) * d_sae,
            "support_col": torch.arange(d_sae, dtype=torch.int32).repeat(rows), "xc": x,
            "W_enc": W_enc, "b_enc": b_enc, "clip": clip, "rows": rows, "d_in": d_in,
            "support_length": n, "scratch": Guarded((n,), torch.float32, "scratch"),
            "counts": None, "out": out,
        },
    )  # fmt: skip
    row_ptr, col, val, _, counters = out
    nnz = int(counters.inside[0])
    return row_ptr.inside, col.inside[:nnz], val.inside[:nnz], int(counters.inside[1])


def prepared(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, clip: float = math.inf, limit: float = math.inf,
    threads: int = 1, capacity: int | None = None, first: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of a call of `screen`; arrays for every entry, or `capacity` long."""
    rows, d_in, d_sae = *x.shape, len(W_enc)
    capacity = first + rows * d_sae if capacity is None else capacity
    needed = _C.screen_scratch(rows=rows, d_in=d_in, d_sae=d_sae, threads=threads)
    return {
        "exec": CPU.exec(torch.float32, threads), "xc": x, "W_enc": W_enc, "b_enc": b_enc,
        "clip": clip, "rows": rows, "d_in": d_in, "d_sae": d_sae, "limit": limit,
        "scratch": Guarded((needed,), torch.uint8, "scratch", align=64),
        "list_col": Guarded((capacity,), torch.int32, "scratch"),
        "list_val": Guarded((capacity,), torch.float32, "scratch"),
        "out": code_out(rows, capacity, torch.float32, first),
    }  # fmt: skip


def assert_lists_what_float_lists(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, clip: float = math.inf
) -> int:
    """Screen, and compare with the float path bit by bit; returns the number of candidates."""
    row_ptr, col, val, saturated = gathered(x, W_enc, b_enc, clip)
    arguments = prepared(x, W_enc, b_enc, clip=clip, capacity=len(col))
    assert CPU.call("screen", arguments) == _C.OK
    seen_ptr, seen_col, seen_val, _, counters = arguments["out"]
    assert torch.equal(seen_ptr.inside, row_ptr)
    assert torch.equal(seen_col.inside, col)
    assert torch.equal(seen_val.inside.isnan(), val.isnan())
    assert torch.equal(seen_val.inside[~val.isnan()], val[~val.isnan()])
    assert counters.inside[[0, 1, 3]].tolist() == [len(col), saturated, 0]
    assert counters.inside[2] >= len(col)
    return int(counters.inside[2])


# ---- Kinds of numbers ------------------------------------------------------------------------------

Kind = Callable[[int, int, int], Tensor]


def scattered(value: float, base: Kind, share: float = 0.02) -> Kind:
    """Some elements replaced."""

    def make(n: int, d: int, seed: int) -> Tensor:
        numbers = base(n, d, seed)
        places = torch.rand(n, d, generator=torch.Generator().manual_seed(seed + 1)) < share
        places[0, 0] = True
        numbers[places] = value
        return numbers

    return make


def gaussian(n: int, d: int, seed: int) -> Tensor:
    return random(n, d, dtype=torch.float32, seed=seed)


def outliers(n: int, d: int, seed: int) -> Tensor:
    """Heavy tails, and a few columns a hundred times as large as the rest."""
    numbers = gaussian(n, d, seed) / gaussian(n, d, seed + 1).abs().clamp(min=1e-3)
    numbers[:, :: max(1, d // 3)] *= 100
    return numbers


def one_hot(n: int, d: int, seed: int) -> Tensor:
    numbers = torch.zeros(n, d)
    numbers[torch.arange(n), (torch.arange(n) * 7 + seed) % d] = 1.0
    return numbers


def of_all_scales(n: int, d: int, seed: int) -> Tensor:
    """Rows from the smallest numbers there are to nearly the largest."""
    return gaussian(n, d, seed) * 10 ** torch.linspace(-44, 36, n)[:, None]


def some_rows_zero(n: int, d: int, seed: int) -> Tensor:
    numbers = gaussian(n, d, seed)
    numbers[::2] = 0.0
    return numbers


KINDS: dict[str, Kind] = {
    "gaussian": gaussian,
    "outliers": outliers,
    "some rows zero": some_rows_zero,
    "all zero": lambda n, d, _: torch.zeros(n, d),
    "negative zero": lambda n, d, _: torch.full((n, d), -0.0),
    "constant": lambda n, d, seed: torch.linspace(-2, 3, n)[:, None].expand(n, d).contiguous(),
    "one-hot": one_hot,
    "halves": lambda n, d, seed: gaussian(n, d, seed).mul(2).round().div(2),
    "1e-30": lambda n, d, seed: 1e-30 * gaussian(n, d, seed),
    "1e30": lambda n, d, seed: 1e30 * gaussian(n, d, seed),
    # On either side of where rows are too small or too large to be rounded to 8 bits.
    "1e-11": lambda n, d, seed: 1.27e-11 * gaussian(n, d, seed),
    "1e15": lambda n, d, seed: 1.27e15 * gaussian(n, d, seed),
    "denormal": lambda n, d, seed: 1e-40 * gaussian(n, d, seed),
    "all scales": of_all_scales,
    "mixed magnitudes": lambda n, d, seed: gaussian(n, d, seed) * 10 ** (6 * gaussian(n, d, seed + 1)),
    "a few NaN": scattered(math.nan, gaussian),
    "zeros and a few NaN": scattered(math.nan, lambda n, d, _: torch.zeros(n, d)),
    "a few inf": scattered(math.inf, gaussian),
    "a few -inf": scattered(-math.inf, gaussian),
    "a few of the largest": scattered(MAX, gaussian),
    "all of the largest": lambda n, d, seed: MAX * gaussian(n, d, seed).sign(),
}  # fmt: skip


def every_third(value: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    def make(x: Tensor, W_enc: Tensor, seed: int) -> Tensor:
        bias = gaussian(1, len(W_enc), seed)[0]
        bias[::3] = value
        return bias

    return make


def dots(x: Tensor, W_enc: Tensor) -> Tensor:
    """<x_b, w_j> of the float path, to the bit: a listed entry of x, or minus one of -x."""
    zero = torch.zeros(len(W_enc))
    out = torch.zeros(len(x), len(W_enc))
    for sign in (1.0, -1.0):
        row_ptr, col, val, _ = gathered(sign * x, W_enc, zero)
        row = torch.repeat_interleave(torch.arange(len(x)), row_ptr.diff())
        out[row, col.long()] = sign * val
    return out


def close_to_zero(x: Tensor, W_enc: Tensor, seed: int) -> Tensor:
    """Each feature's bias all but cancels one row's product: up to 3 units above or below, or exactly."""
    row = (torch.arange(len(W_enc)) + seed) % len(x)
    bias = -dots(x, W_enc)[row, torch.arange(len(W_enc))]
    units = (torch.arange(len(W_enc)) + seed) % 7 - 3
    for _ in range(3):
        up, down = (bias.nextafter(torch.tensor(side)) for side in (math.inf, -math.inf))
        bias = torch.where(units > 0, up, torch.where(units < 0, down, bias))
        units -= units.sign()
    return bias


BIASES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "zero": lambda x, W_enc, seed: torch.zeros(len(W_enc)),
    "negative zero": lambda x, W_enc, seed: torch.full((len(W_enc),), -0.0),
    "gaussian": lambda x, W_enc, seed: gaussian(1, len(W_enc), seed)[0],
    "sparse": lambda x, W_enc, seed: -2.5 * W_enc.norm(dim=1) * x.norm(dim=1).mean() / x.shape[1] ** 0.5,
    "close to zero": close_to_zero,
    "1e-45": lambda x, W_enc, seed: torch.full((len(W_enc),), 1e-45),
    "-1e-45": lambda x, W_enc, seed: torch.full((len(W_enc),), -1e-45),
    "1e30": every_third(1e30),
    "-1e30": every_third(-1e30),
    "inf": every_third(math.inf),
    "-inf": every_third(-math.inf),
    "NaN": every_third(math.nan),
    "largest": every_third(MAX),
    "-largest": every_third(-MAX),
}  # fmt: skip


@screens
@settings(max_examples=1000)
@given(
    rows=st.sampled_from([1, 5, 6, 7, 13]),
    d_in=st.sampled_from([1, 2, 3, 4, 5, 17, 768, 1030]),
    d_sae=st.sampled_from([1, 63, 64, 65, 129, 1000]),
    x=st.sampled_from(sorted(KINDS)),
    w=st.sampled_from(sorted(KINDS)),
    bias=st.sampled_from(sorted(BIASES)),
    clip=st.sampled_from([math.inf, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_screen_lists_what_float_arithmetic_lists(rows, d_in, d_sae, x, w, bias, clip, seed):
    xc, W_enc = KINDS[x](rows, d_in, seed), KINDS[w](d_sae, d_in, seed + 7)
    assert_lists_what_float_lists(xc, W_enc, BIASES[bias](xc, W_enc, seed), clip)


@screens
@pytest.mark.parametrize("x", KINDS)
def test_the_screen_lists_what_float_arithmetic_lists_with_every_pair_of_kinds(x):
    xc = KINDS[x](7, 33, 1)
    for make_weights in KINDS.values():
        W_enc = make_weights(130, 33, 2)
        for make_bias in BIASES.values():
            assert_lists_what_float_lists(xc, W_enc, make_bias(xc, W_enc, 3))


@screens
@settings(max_examples=300)
@given(
    d_in=st.integers(1, 200),
    kinds=st.tuples(
        *[st.sampled_from(["gaussian", "outliers", "halves", "constant", "1e-11", "1e15"])] * 2
    ),
    seed=st.integers(0, 10_000),
)
@example(d_in=1, kinds=("constant", "constant"), seed=0)
def test_entries_a_rounding_away_from_zero_fall_on_the_right_side(d_in, kinds, seed):
    xc, W_enc = KINDS[kinds[0]](7, d_in, seed), KINDS[kinds[1]](400, d_in, seed + 7)
    bias = close_to_zero(xc, W_enc, seed)
    pre = dots(xc, W_enc) + bias
    close = pre.abs() <= 4e-7 * bias.abs() + 1e-44
    assert close.sum() >= 400, "each feature has an entry on the edge"
    assert_lists_what_float_lists(xc, W_enc, bias)


@screens
def test_more_features_than_16_bits_number_are_listed_in_order():
    xc, W_enc = gaussian(13, 4, 0), gaussian(70_000, 4, 1)
    bias = BIASES["sparse"](xc, W_enc, 0)
    assert assert_lists_what_float_lists(xc, W_enc, bias) < 13 * 70_000 / 4


@screens
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_widest_rows_do_not_overflow_the_integers(sign):
    d_in = 65_536
    xc = torch.ones(7, d_in)
    W_enc = torch.stack([torch.ones(d_in), -torch.ones(d_in), sign * (-1.0) ** torch.arange(d_in)])
    for bias in (-65_536.0, -65_535.9, 0.0, 65_536.0, 65_536.1):
        assert_lists_what_float_lists(sign * xc, W_enc, torch.full((3,), bias))


@screens
def test_wide_rows_whose_every_rounding_loses_in_one_direction_are_bounded():
    d_in = 65_536
    # 1.49 is rounded to 1 beside a 127: what is lost is nearly parallel to what is kept.
    xc = torch.full((7, d_in), 1.49)
    xc[:, 0] = 127.0
    W_enc = torch.full((3, d_in), 1.49)
    W_enc[:, 0] = torch.tensor([127.0, -127.0, 0.0])
    W_enc[2, 1] = 127.0
    for below in (1.0, 0.9, 0.99, 0.9999, 1.0001):
        assert_lists_what_float_lists(xc, W_enc, -below * dots(xc, W_enc)[0])


@screens
@pytest.mark.parametrize("case", ["sums that cancel", "sums that overflow"])
def test_dot_products_that_leave_the_range_of_floats_on_their_way_are_not_bounded(case):
    d_in = 65_536
    # A partial sum may overflow even where the whole does not: only float arithmetic itself knows.
    xc = torch.full((7, d_in), 1.2e17)
    W_enc = torch.full((65, d_in), 1.2e17)
    bias = torch.full((65,), -math.inf)
    if case == "sums that cancel":
        W_enc *= 1 - 2 * (torch.arange(d_in) // 8 % 2)
        bias[:] = -1e38
    assert assert_lists_what_float_lists(xc, W_enc, bias) == 7 * 65


@screens
def test_most_silent_features_are_no_candidates():
    xc, W_enc = gaussian(64, 768, 0), gaussian(1000, 768, 1)
    bias = BIASES["sparse"](xc, W_enc, 0)
    active = len(gathered(xc, W_enc, bias)[1])
    candidates = assert_lists_what_float_lists(xc, W_enc, bias)
    assert 0 < active <= candidates < 0.03 * 64_000


# ---- The call --------------------------------------------------------------------------------------


def a_batch(rows: int = 13, d_in: int = 1030, d_sae: int = 1000) -> tuple[Tensor, Tensor, Tensor]:
    """A few percent of the entries active, in several blocks of features."""
    xc, W_enc = outliers(rows, d_in, 0), gaussian(d_sae, d_in, 1)
    return xc, W_enc, BIASES["sparse"](xc, W_enc, 0) * 0.7


@screens
@pytest.mark.parametrize("rows", [1, 13])
def test_the_screen_is_bitwise_equal_for_any_number_of_threads_and_run_to_run(rows):
    numbers = a_batch(rows)
    seen = []
    for threads in (1, 2, 3, 4, 64, 64):
        arguments = prepared(*numbers, clip=200.0, threads=threads)
        CPU.call("screen", arguments)
        nnz = int(arguments["out"][4].inside[0])
        seen.append(
            [
                a.inside[: nnz if i in (1, 2) else None]
                for i, a in enumerate(arguments["out"])
                if i != 3
            ]
        )
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, seen[0], strict=True))


@screens
@pytest.mark.parametrize("rows", [13, 300])
def test_too_many_candidates_are_reported_and_nothing_is_listed(rows):
    xc, W_enc = gaussian(rows, 64, 0), gaussian(200, 64, 1)
    numbers = xc, W_enc, torch.zeros(200)
    arguments = prepared(*numbers)
    CPU.call("screen", arguments)
    share = int(arguments["out"][4].inside[2]) / (rows * 200)
    assert 0.5 < share < 0.7
    arguments = prepared(*numbers, limit=share + 0.05)
    assert CPU.call("screen", arguments) == _C.OK
    arguments = prepared(*numbers, limit=share - 0.05)
    assert CPU.call("screen", arguments) == _C.TOO_DENSE
    row_ptr, col, val, _, counters = arguments["out"]
    assert counters.inside[[0, 1, 3]].tolist() == [0, 0, 0]
    sampled = 200 * min(rows, SAMPLED_ROWS)
    assert share - 0.05 < int(counters.inside[2]) / sampled < share + 0.05
    assert row_ptr.inside.tolist() == [0] + [-77] * rows
    assert col.untouched()
    assert val.untouched()


@screens
@pytest.mark.parametrize("place", ["first", "middle", "last", "spread"])
def test_the_sample_of_rows_is_spread_over_the_batch(place):
    rows, busy = 3000, 600
    start = {"first": 0, "middle": 1200, "last": rows - busy, "spread": 0}[place]
    x = torch.full((rows, 8), -1.0)
    x[start : None if place == "spread" else start + busy : 5 if place == "spread" else 1] = 1.0
    for limit, code in ((0.18, _C.TOO_DENSE), (0.22, _C.OK)):
        assert (
            CPU.call("screen", prepared(x, torch.ones(64, 8), torch.zeros(64), limit=limit)) == code
        )


@screens
def test_the_limit_is_a_share_of_the_entries():
    xc, W_enc, bias = gaussian(6, 64, 0), gaussian(100, 64, 1), torch.full((100,), -math.inf)
    bias[:25] = math.inf
    for limit, code in ((0.24, _C.TOO_DENSE), (0.25, _C.OK), (0.0, _C.TOO_DENSE)):
        assert CPU.call("screen", prepared(xc, W_enc, bias, limit=limit)) == code
    bias[:] = -math.inf
    assert CPU.call("screen", prepared(xc, W_enc, bias, limit=0.0)) == _C.OK


@screens
@pytest.mark.parametrize("first", [0, 17])
@pytest.mark.parametrize("threads", [1, 3])
def test_too_short_arrays_are_reported_and_left_alone(first, threads):
    numbers = a_batch()
    _, col, val, saturated = gathered(*numbers, clip=200.0)
    nnz = len(col)
    assert nnz > 30
    for missing in (nnz + first, 30, 1):
        arguments = prepared(
            *numbers, clip=200.0, capacity=first + nnz - missing, first=first, threads=threads
        )
        assert CPU.call("screen", arguments) == _C.OVERFLOW
        assert arguments["out"][1].untouched()
        assert arguments["out"][2].untouched()
        assert arguments["out"][4].inside[[0, 1, 3]].tolist() == [first + nnz, 0, 1]
    arguments = prepared(*numbers, clip=200.0, capacity=first + nnz, first=first, threads=threads)
    assert CPU.call("screen", arguments) == _C.OK
    row_ptr, seen_col, seen_val, _, counters = (
        a if isinstance(a, int) else a.inside for a in arguments["out"]
    )
    assert (row_ptr[0], row_ptr[-1]) == (first, first + nnz)
    assert torch.equal(seen_col[first:], col)
    assert torch.equal(seen_val[first:], val)
    assert bool((seen_col[:first] == -77).all()), "rows listed before are not touched"
    assert bool(seen_val[:first].isnan().all())
    assert counters[[0, 1, 3]].tolist() == [first + nnz, saturated, 0]


@screens
def test_nothing_active_needs_no_arrays_at_all():
    xc, W_enc, _ = a_batch()
    arguments = prepared(xc, W_enc, torch.full((1000,), -1e9), capacity=0)
    assert CPU.call("screen", arguments) == _C.OK
    assert arguments["out"][0].inside.tolist() == [0] * 14
    assert arguments["out"][4].inside.tolist() == [0] * 4


@screens
def test_the_counters_go_on_from_call_to_call():
    arguments = prepared(*a_batch(), clip=200.0)
    CPU.call("screen", arguments)
    once = arguments["out"][4].inside.clone()
    assert 0 < once[1] < once[0] < once[2]
    CPU.call("screen", arguments)
    assert arguments["out"][4].inside.tolist() == [once[0], 2 * once[1], 2 * once[2], 0]


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("xc", "W_enc", "b_enc", "scratch", "list_col", "list_val")),
        *({name: n} for name in ("rows", "d_in", "d_sae") for n in (0, -1)),
        *({name: 2**31} for name in ("rows", "d_sae")),
        *({"clip": n} for n in (0.0, -1.0, math.nan)),
        {"exec": (2, *CPU.exec(torch.float32)[1:])},
        {"exec": (_C.CPU, 3, *CPU.exec(torch.float32)[2:])},
        {"exec": CPU.exec(torch.float32, 0)},
    ],
    ids=str,
)
def test_null_pointers_and_impossible_sizes_are_refused(change):
    arguments = {**prepared(*a_batch(5, 17, 65)), **change}
    with pytest.raises(ValueError, match="screen: a pointer is null or a size"):
        CPU.call("screen", arguments)
    for name, array in arrays(arguments):
        assert array.untouched(), name


@screens
@pytest.mark.parametrize("offset", [1, 8, 32])
def test_scratch_that_does_not_start_at_a_cache_line_is_refused(offset):
    arguments = prepared(*a_batch(5, 17, 65))
    with pytest.raises(ValueError, match="screen: a pointer is null or a size"):
        CPU.call(
            "screen", {**arguments, "scratch": arguments["scratch"].inside.data_ptr() + offset}
        )


@screens
@pytest.mark.parametrize("size", ["rows", "d_in", "d_sae", "threads"])
@pytest.mark.parametrize("n", [0, -1])
def test_impossible_sizes_need_no_scratch(size, n):
    sizes = {"rows": 5, "d_in": 17, "d_sae": 65, "threads": 2}
    assert _C.screen_scratch(**sizes) > 0
    assert _C.screen_scratch(**{**sizes, size: n}) == 0


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_a_missing_place_for_the_code_is_refused(place):
    arguments = prepared(*a_batch(5, 17, 65))
    out = arguments["out"]
    with pytest.raises(ValueError, match="screen: a pointer is null or a size"):
        CPU.call("screen", {**arguments, "out": (*out[:place], None, *out[place + 1 :])})


def test_what_the_screen_is_not_offered_for_is_said_without_a_look_at_the_numbers():
    arguments = prepared(*a_batch(5, 17, 65))
    execs = [CPU.exec(torch.float64), CPU.exec(torch.bfloat16)]
    if _C.cuda()["built"]:
        execs.append((_C.CUDA, *CPU.exec(torch.float32)[1:]))
    for exec in execs:
        assert CPU.call("screen", {**arguments, "exec": exec}) == _C.UNSUPPORTED
    assert CPU.call("screen", {**arguments, "d_in": 65_537}) == _C.UNSUPPORTED
    offered = CPU.call("screen", arguments)
    assert offered == (_C.OK if _C.isa() == "avx512vnni" else _C.UNSUPPORTED)
