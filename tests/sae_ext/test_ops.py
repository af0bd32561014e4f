"""A compiled training step against the reference: numbers, trajectories, determinism, edges."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_weights import (
    batch,
    copied,
    dense,
    identity,
    made_up,
    state,
    stretched,
    support_of,
    top_k,
)
from torch import Tensor

from sae_ext import coding, native, ops, reference, step_cpu
from sae_ext.ops import AdamState, Parameters, SparseCode, Step
from sae_ext.parameters import Objective, StepResult, Update

compiled = pytest.mark.skipif(native.MISSING is not None, reason="the kernels are not built")
screens = pytest.mark.skipif(
    ops.implementation() != "cpu-avx512vnni", reason="this processor or build has no screen"
)
BACKENDS = [pytest.param("cpu", marks=compiled), "reference"]
pytestmark = pytest.mark.filterwarnings("error")

# What makes a step take each way, whatever its density.
WAYS = {
    "screened": {"_CANDIDATES": math.inf, "_SCREEN_ROWS": (1, 8192), "DENSE_ABOVE": math.inf},
    "multiplied": {"_CANDIDATES": -1.0, "DENSE_ABOVE": math.inf},
    "dense": {"_CANDIDATES": -1.0, "DENSE_ABOVE": -1.0},
}
SMALL = {
    "_PRE_BYTES": 1,
    "_SCREEN_BYTES": 1,
    "_DENSE_BYTES": 1,
    "_FIRST_L0": 1,
    "_PROBE_ROWS": 5,
}


def way_of(step: Step) -> str:
    """Which way the only call of a Step went, by the buffers it left behind."""
    if step._spaces.dense.room("dW_dec"):
        return "dense"
    always = step._spaces.always
    return (
        "gathered" if always.room("support") else "multiplied" if always.room("pre") else "screened"
    )


@pytest.fixture
def go(monkeypatch) -> Callable[..., None]:
    """Sets the kernels' constants: `go("dense", small=True)` for one way in many chunks of rows."""

    def choose(way: str | None = None, *, small: bool = False, **values: Any) -> None:
        for name, value in {
            **WAYS.get(way or "", {}),
            **(SMALL if small else {}),
            **values,
        }.items():
            monkeypatch.setattr(coding if hasattr(coding, name) else step_cpu, name, value)

    return choose


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads, and puts the number back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def distance(got: Tensor, expected: Tensor) -> float:
    return (got.double() - expected.double()).norm().item()


def assert_near(got: Tensor, expected: Tensor, name: str, tolerance: float = 1e-11) -> None:
    error = distance(got, expected)
    assert error <= tolerance * (1 + expected.norm().item()), f"{name} is off by {error:g}"


def assert_same(got: StepResult, expected: StepResult, rel: float = 1e-12) -> None:
    """Equal up to rounding in the sums, exactly in the counts."""
    for name in ("loss", "squared_error", "l1"):
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=rel), name
    if expected.grad_norm is None:
        assert got.grad_norm is None
    else:
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=rel)
    assert (got.nnz, got.saturated) == (expected.nnz, expected.saturated)
    assert torch.equal(got.fired, expected.fired)


def assert_identical(
    got: Parameters, adam: AdamState, expected: Parameters, other: AdamState
) -> None:
    assert adam.step == other.step
    for name, tensor in state(expected, other).items():
        assert torch.equal(state(got, adam)[name], tensor), name


# ---- Numbers ---------------------------------------------------------------------------------------

sizes = st.sampled_from([1, 2, 3, 7, 16, 31, 64, 65, 97, 130])
# From no active entry, over a few and half of them, to all.
biases = st.sampled_from([-30.0, -1.5, 0.0, 30.0])
options = st.fixed_dictionaries(
    {
        "clip": st.sampled_from([None, 1e-3, 0.8]),
        "decoder_norm": st.sampled_from(["unit", "free"]),
        "weight_decay": st.sampled_from([0.0, 0.3]),
        "max_grad_norm": st.sampled_from([None, 0.1, 1e9]),
        "train_b_dec": st.booleans(),
    }
)
weights = st.sets(st.sampled_from(["recon_weight", "l1_weight", "feature_weight"]))


def weights_of(x: Tensor, d_sae: int, chosen: set[str]) -> dict[str, Tensor]:
    """Weights of rows and features that differ from row to row; some are 0."""
    feature_weight = batch(1, d_sae, seed=6)[0].abs()
    feature_weight[::3] = 0.0
    all_of_them = {
        "recon_weight": x[:, 0].abs(),
        "l1_weight": x[:, -1].clamp(min=0),
        "feature_weight": feature_weight,
    }
    return {name: all_of_them[name].to(x.dtype) for name in chosen}


def problem(d_in: int, d_sae: int, bias: float, seed: int, decoder_norm: str) -> Parameters:
    params = made_up(d_in, d_sae, bias=bias, seed=seed)
    params.b_enc[0] = 0.5  # one feature fires whatever the others do
    return stretched(params) if decoder_norm == "free" else params


@compiled
@pytest.mark.parametrize("way", ["multiplied", "dense", "gathered"])
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sampled_from([1, 2, 5, 33, 97]),
    d_in=sizes,
    d_sae=sizes,
    bias=biases,
    chosen=options,
    weighted=weights,
    share=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_steps_in_float64_equal_the_reference(
    go, way, rows, d_in, d_sae, bias, chosen, weighted, share, seed
):
    go(way, small=True)
    params = problem(d_in, d_sae, bias, seed, chosen["decoder_norm"])
    ours, theirs = copied(params), copied(params)
    adam, adam_theirs = AdamState.zeros(ours), AdamState.zeros(theirs)
    cpu, oracle = Step("cpu"), Step("reference")
    for i in range(3):
        x = batch(rows, d_in, seed=seed + i)
        # eps well above rounding: where a gradient is all rounding, Adam would amplify it.
        arguments = {"l1": 0.7, "lr": 0.01, "eps": 1e-2, **chosen, **weights_of(x, d_sae, weighted)}
        if way == "gathered":
            listed = torch.rand(rows, d_sae, generator=torch.Generator().manual_seed(i)) < share
            listed[:, 0] |= torch.arange(rows) % 2 == 0
            arguments["support"] = support_of(listed)
        got = cpu(ours, adam, x, **arguments)
        assert_same(got, oracle(theirs, adam_theirs, x, **arguments))
        assert adam.step == adam_theirs.step == i + 1
        for name, tensor in state(theirs, adam_theirs).items():
            assert_near(state(ours, adam)[name], tensor, name)
    assert way_of(cpu) == way


# Sizes on either side of registers, blocks and tiles: rows, d_in, d_sae, bias.
SHAPES = {
    "sparse": (512, 96, 512, -1.2),
    "half": (300, 33, 257, 0.0),
    "all active": (64, 130, 64, 10.0),
    "one row": (1, 7, 1000, -0.5),
}


def errors(
    way: str, shape: tuple[int, int, int, float], seed: int, arguments: dict[str, Any]
) -> dict[str, tuple[float, float]]:
    """How far a float32 step is from the float64 one, by name: ours, and PyTorch's.

    The same float32 numbers go in; only the arithmetic differs.
    """
    rows, d_in, d_sae, bias = shape
    exact = copied(problem(d_in, d_sae, bias, seed, arguments["decoder_norm"]), torch.float32)
    x = batch(rows, d_in, seed=seed + 1).float()
    seen: dict[str, dict[str, Tensor]] = {}
    for name, dtype in (
        ("ours", torch.float32),
        ("pytorch", torch.float32),
        ("oracle", torch.float64),
    ):
        params = copied(exact, dtype)
        adam, step = AdamState.zeros(params), Step("cpu" if name == "ours" else "reference")
        # With beta1 = 0 the first moment is the gradient.
        result = step(params, adam, x.to(dtype), lr=0.01, beta1=0.0, eps=1e-3, **arguments)
        assert name != "ours" or way_of(step) == way
        sums = {k: getattr(result, k) for k in ("loss", "squared_error", "l1", "grad_norm")}
        seen[name] = {
            **state(params, adam),
            **{k: torch.tensor([v], dtype=torch.float64) for k, v in sums.items() if v is not None},
        }
    return {
        name: tuple(distance(seen[who][name], expected) / expected.norm().item() for who in seen)[
            :2
        ]
        for name, expected in seen["oracle"].items()
        if expected.any()
    }


@compiled
@pytest.mark.parametrize("settings_of", ["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "way", [pytest.param("screened", marks=screens), "multiplied", "dense", "gathered"]
)
def test_float32_errs_at_most_twice_as_much_as_pytorch_does(go, way, shape, settings_of):
    go(way)
    rows, d_in, d_sae, _ = SHAPES[shape]
    runs: dict[str, list[tuple[float, float]]] = {}
    for seed in range(5):
        arguments: dict[str, Any] = {"l1": 1.0, "decoder_norm": "unit"}
        if settings_of == "all":
            x = batch(rows, d_in, seed=seed + 1)
            arguments |= weights_of(x, d_sae, {"recon_weight", "l1_weight", "feature_weight"})
            # Above half of the entries where all are active.
            clip = 0.9 + max(0.0, SHAPES[shape][3])
            arguments |= {"clip": clip, "decoder_norm": "free", "max_grad_norm": 0.5}
        if way == "gathered":
            arguments["support"] = support_of(top_k(batch(rows, d_sae, seed=seed), d_sae // 3))
        for name, pair in errors(way, SHAPES[shape], seed, arguments).items():
            runs.setdefault(name, []).append(pair)
    for name, pairs in runs.items():
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        # A sum that PyTorch happens to get exactly right is no measure: half an ulp is allowed.
        assert ours <= 2 * theirs + 2**-24, f"{name}: {ours:g} against PyTorch's {theirs:g}"


@screens
@pytest.mark.parametrize("small", [False, True], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("bias", [-30.0, -1.5, 0.0, 30.0])
def test_screening_and_multiplying_give_the_same_steps(go, bias, small):
    ends, seen = [], []
    for way in ("screened", "multiplied"):
        go(way, small=small)
        params = copied(made_up(48, 200, bias=bias), torch.float32)
        adam, step = AdamState.zeros(params), Step("cpu")
        results = [
            step(params, adam, batch(97, 48, seed=i), l1=1.0, lr=0.01, eps=1e-2, clip=1.5)
            for i in range(3)
        ]
        assert way_of(step) == way
        ends.append(state(params, adam))
        seen.append(results)
    for ours, theirs in zip(*seen, strict=True):
        assert ours.nnz == pytest.approx(theirs.nnz, abs=2)  # a rounding decides at 0
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for name, tensor in ends[0].items():
        assert_near(tensor, ends[1][name], name, tolerance=1e-4)


@screens
def test_left_to_itself_a_step_screens_what_is_sparse_and_multiplies_what_is_dense():
    ways = []
    for bias in (-3.0, 1.0):
        params, step = copied(made_up(64, 300, bias=bias), torch.float32), Step("cpu")
        step(params, AdamState.zeros(params), batch(97, 64), l1=1.0, lr=0.01)
        ways.append(way_of(step))
    assert ways == ["screened", "dense"]


@screens
def test_a_few_rows_are_not_worth_rounding_the_weights_for():
    ways = []
    for rows in (31, 32):
        params, step = copied(made_up(64, 300, bias=-3.0), torch.float32), Step("cpu")
        step(params, AdamState.zeros(params), batch(rows, 64), l1=1.0, lr=0.01)
        ways.append(way_of(step))
    assert ways == ["multiplied", "screened"]


@screens
def test_the_few_rows_that_are_left_over_from_screening_are_multiplied(go):
    params, x = copied(made_up(64, 300, bias=-2.5), torch.float32), batch(130, 64).float()
    go(_SCREEN_ROWS=(32, 64))
    mixed = copied(params, torch.float32)
    step = Step("cpu")
    seen = step(mixed, AdamState.zeros(mixed), x, l1=1.0, lr=0.01, eps=1e-2)
    assert step._spaces.always.room("screen")
    assert step._spaces.always.room("pre") >= 2 * 300
    other = copied(params)
    expected = Step("reference")(
        other, AdamState.zeros(other), x.double(), l1=1.0, lr=0.01, eps=1e-2
    )
    assert_same(seen, expected, rel=1e-5)
    for name, tensor in other.tensors().items():
        assert_near(mixed.tensors()[name], tensor, name, tolerance=1e-5)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("silent_first", [True, False])
def test_the_first_rows_alone_do_not_decide_whether_a_step_is_dense(dtype, silent_first):
    params = copied(made_up(12, 50), dtype)
    params.W_enc_rows.abs_()
    x = batch(2000, 12).abs()
    x[: 300 if silent_first else 2000] *= -1
    x[:300] *= 1 if silent_first else -1
    step = Step("cpu")
    seen = step(params, AdamState.zeros(params), x, l1=1.0, lr=0.01)
    assert (seen.nnz / (2000 * 50) > 0.5) == silent_first
    assert (way_of(step) == "dense") == silent_first


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_that_turns_out_dense_leaves_no_room_for_its_entries(dtype):
    params, step = copied(made_up(48, 400), dtype), Step("cpu")
    seen = step(params, AdamState.zeros(params), batch(500, 48), l1=1.0, lr=0.01)
    assert way_of(step) == "dense"
    assert seen.nnz > 500 * 150
    for name in ("col", "val", "list_col", "list_val"):
        assert step._spaces.always.room(name) <= 500 * coding._FIRST_L0, name


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_features_than_16_bits_number(dtype):
    rows, d_in, d_sae = 40, 8, 70_000
    params = copied(made_up(d_in, d_sae, bias=-2.5), dtype)
    params.b_enc[-3:] = 1.0
    ours, theirs = copied(params, dtype), copied(params, torch.float64)
    adam, adam_theirs = AdamState.zeros(ours), AdamState.zeros(theirs)
    x = batch(rows, d_in).to(dtype)
    got = Step("cpu")(ours, adam, x, l1=0.5, lr=0.01, eps=1e-2)
    expected = Step("reference")(theirs, adam_theirs, x.double(), l1=0.5, lr=0.01, eps=1e-2)
    assert_same(got, expected, rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert got.fired[-3:].min() > 0
    for name, tensor in state(theirs, adam_theirs).items():
        tolerance = 1e-5 if dtype == torch.float32 else 1e-11
        assert_near(state(ours, adam)[name].double(), tensor, name, tolerance)


@compiled
@pytest.mark.parametrize("way", [pytest.param("screened", marks=screens), "multiplied"])
def test_arrays_one_entry_too_short_are_grown_and_nothing_is_lost(go, way):
    go(way)
    params, x = copied(made_up(20, 90, bias=-0.5), torch.float32), batch(64, 20)
    whole = ops.encode(x, params)
    nnz, rows = len(whole.col), 64
    assert nnz % rows, "the first arrays hold a whole number of entries per row"
    go(way, _FIRST_L0=nnz // rows)  # room for nnz - nnz % rows
    for spare in (0, 1):
        space = native.Workspace()
        space.get("col", torch.int32, nnz - 1 + spare)
        space.get("val", torch.float32, nnz - 1 + spare)
        code = coding.encode(space, x.float() - params.b_dec, params, None).code
        assert torch.equal(code.row_ptr, whole.row_ptr)
        assert torch.equal(code.col, whole.col)
        assert torch.equal(code.val, whole.val)
        assert (space.room("col") > nnz) == (spare == 0)


@compiled
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.sampled_from([1, 40, 97]), d_in=sizes, d_sae=sizes, bias=biases)
def test_encode_lists_exactly_the_positive_entries_and_decode_adds_them_up(
    go, rows, d_in, d_sae, bias
):
    go(small=True)
    params, x = made_up(d_in, d_sae, bias=bias), batch(rows, d_in)
    code = ops.encode(x, params, clip=2.0)
    pre, z = reference.activations(x, params, 2.0)
    assert torch.equal(dense(code, d_sae) > 0, pre > 0)
    assert len(code.col) == int((pre > 0).sum())
    assert_near(dense(code, d_sae), z, "z")
    for b in range(rows):
        columns = code.col[code.row_ptr[b] : code.row_ptr[b + 1]]
        assert bool((columns.diff() > 0).all())
    assert_near(ops.decode(code, params), z @ params.W_dec + params.b_dec, "x̂")


# ---- Trajectories ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_two_hundred_steps_stay_with_autograd_and_torch_optim(backend, decoder_norm):
    free = decoder_norm == "free"
    params = made_up(24, 96, bias=-1.0)
    leaves = Parameters(**{k: t.requires_grad_() for k, t in copied(params).tensors().items()})
    trained = list(leaves.tensors().values())
    if free:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    else:
        optimizer = torch.optim.Adam(trained, lr=1e-3)
    arguments = {"max_grad_norm": 1.0, "weight_decay": 0.1} if free else {}
    adam, step = AdamState.zeros(params), Step(backend)
    silent, shortened = 0, 0
    for i in range(200):
        x = batch(64, 24, seed=i)
        seen = step(
            params, adam, x, l1=1.0, lr=1e-3, clip=2.0, decoder_norm=decoder_norm, **arguments
        )
        optimizer.zero_grad()
        loss = reference.loss(x, leaves, Objective(1.0, 2.0, decoder_norm=decoder_norm))
        loss.backward()
        if free:
            norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            assert seen.grad_norm == pytest.approx(norm, rel=1e-6)
            shortened += norm > 1
        with torch.no_grad():
            if not free:
                grad = leaves.W_dec.grad
                assert grad is not None
                grad -= (grad * leaves.W_dec).sum(1, keepdim=True) * leaves.W_dec
            optimizer.step()
            if not free:
                leaves.W_dec /= leaves.W_dec.norm(dim=1, keepdim=True)
        assert seen.loss == pytest.approx(loss.item(), rel=1e-7)
        silent += int((seen.fired == 0).sum())
    assert silent > 0, "no feature ever rested, so none moved by momentum alone"
    assert not free or shortened > 0
    for name, expected in leaves.tensors().items():
        torch.testing.assert_close(
            params.tensors()[name], expected.detach(), rtol=1e-6, atol=1e-8, msg=name
        )


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_that_turns_sparse_and_dense_again_stays_with_the_reference(dtype):
    params = copied(made_up(24, 96), dtype)
    ours, theirs = copied(params, dtype), copied(params)
    adam, adam_theirs = AdamState.zeros(ours), AdamState.zeros(theirs)
    step, oracle, ways = Step("cpu"), Step("reference"), []
    for i in range(100):
        if i >= 70:
            # What was pushed below zero does not come back by itself.
            ours.b_enc += 0.1
            theirs.b_enc += 0.1
        x = batch(64, 24, seed=i).to(dtype)
        arguments = {"l1": 80.0 if 10 <= i < 70 else 0.0, "lr": 4e-3, "eps": 1e-3}
        got = step(ours, adam, x, **arguments)
        expected = oracle(theirs, adam_theirs, x.double(), **arguments)
        ways.append("dense" if step._spaces.dense.room("dW_dec") else "sparse")
        # In float32 a rounding may decide on which side of 0 an entry falls, in PyTorch's as well.
        rel = 1e-3 if dtype == torch.float32 else 1e-11
        assert got.loss == pytest.approx(expected.loss, rel=rel)
    assert (set(ways[:10]), set(ways[60:70]), set(ways[-15:])) == ({"dense"}, {"sparse"}, {"dense"})
    for name, tensor in theirs.tensors().items():
        assert_near(ours.tensors()[name], tensor, name, 5e-3 if dtype == torch.float32 else 1e-11)


# ---- The same bits ---------------------------------------------------------------------------------

# Ways whose products are all our own; torch.mm promises nothing about its order of additions.
OWN_WAYS = [pytest.param("screened", marks=screens), "gathered"]


def some_steps(
    params: Parameters, adam: AdamState, way: str, numbers: range, fresh: bool = False
) -> list[tuple[Any, ...]]:
    """Steps with every option on; what they reported."""
    step, seen = Step("cpu"), []
    for i in numbers:
        step = Step("cpu") if fresh else step
        x = batch(301, 48, seed=i).to(params.b_dec.dtype)
        arguments = weights_of(x, 200, {"recon_weight", "l1_weight", "feature_weight"})
        if way == "gathered":
            arguments["support"] = support_of(top_k(batch(301, 200, seed=i), 20))
        result = step(
            params, adam, x, l1=1.0, lr=1e-3, clip=1.5, max_grad_norm=0.5, weight_decay=0.1,
            **arguments,
        )  # fmt: skip
        assert way_of(step) == way
        seen.append((*result[:5], result.fired.tolist(), result.grad_norm))
    return seen


@compiled
@pytest.mark.parametrize("way", [*OWN_WAYS, "multiplied", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_bitwise_equal_for_any_number_of_threads_and_run_to_run(go, threads, way, dtype):
    if way == "screened" and dtype == torch.float64:
        pytest.skip("the screen is for float32")
    go(way, small=True)
    outcomes = []
    for count in (1, 2, 4, 4):
        threads(count)
        params = copied(made_up(48, 200, bias=-0.5), dtype)
        adam = AdamState.zeros(params)
        outcomes.append((some_steps(params, adam, way, range(3)), params, adam))
    for seen, params, adam in outcomes[1:]:
        assert seen == outcomes[0][0]
        assert_identical(params, adam, *outcomes[0][1:])


@compiled
@pytest.mark.parametrize("way", [*OWN_WAYS, "multiplied", "dense"])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_interrupted(go, way):
    go(way)
    straight = copied(made_up(48, 200, bias=-0.5), torch.float32)
    adam = AdamState.zeros(straight)
    some_steps(straight, adam, way, range(3))
    resumed = copied(straight, torch.float32)
    adam_resumed = AdamState(
        copied(adam.m, torch.float32), copied(adam.v, torch.float32), adam.step
    )
    later = some_steps(straight, adam, way, range(3, 6))
    assert some_steps(resumed, adam_resumed, way, range(3, 6), fresh=True) == later
    assert_identical(resumed, adam_resumed, straight, adam)


@compiled
def test_one_step_object_serves_batches_of_any_size_way_and_dtype():
    step = Step("cpu")
    for rows, dtype, bias in (
        (8, torch.float32, 0.0),
        (90, torch.float64, -2.0),
        (3, torch.float64, 9.0),
        (200, torch.float32, -2.0),
        (90, torch.float32, 9.0),
    ):
        params = copied(made_up(6, 20, bias=bias), dtype)
        fresh = copied(params, dtype)
        seen = step(params, AdamState.zeros(params), batch(rows, 6), l1=1.0, lr=0.1)
        alone = Step("cpu")(fresh, AdamState.zeros(fresh), batch(rows, 6), l1=1.0, lr=0.1)
        assert seen[:5] == alone[:5]
        for name, tensor in fresh.tensors().items():
            assert torch.equal(params.tensors()[name], tensor)


@compiled
def test_what_a_call_returned_is_not_overwritten_by_the_next():
    params, step = made_up(6, 20), Step("cpu")
    adam = AdamState.zeros(params)
    fired = step(params, adam, batch(9, 6), l1=1.0, lr=0.1).fired
    code = ops.encode(batch(9, 6), params)
    before = copy.deepcopy((fired, code))
    step(params, adam, -batch(9, 6), l1=1.0, lr=0.1)
    ops.encode(-batch(9, 6), params)
    assert torch.equal(fired, before[0])
    assert all(torch.equal(a, b) for a, b in zip(code, before[1], strict=True))


@compiled
def test_the_memory_of_the_dense_phase_is_given_back_once_it_is_over():
    step = Step("cpu")
    for bias, held in ((9.0, True), (-2.0, False)):
        params = made_up(6, 20, bias=bias)
        step(params, AdamState.zeros(params), batch(40, 6), l1=1.0, lr=0.1)
        assert bool(step._spaces.dense.room("dW_dec")) == held


# ---- Edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", [pytest.param("screened", marks=screens), "multiplied", "dense", "gathered"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_at_the_edges_of_zero_and_the_clip(go, backend, way):
    go(way)
    dtype = torch.float32 if way == "screened" else torch.float64
    c, params = 1.0, identity(7, dtype)
    tiny = torch.finfo(dtype).tiny
    above = c + torch.finfo(dtype).eps
    x = torch.tensor([[0.0, -0.0, -1.0, tiny, c, above, 3.0]], dtype=dtype)
    adam, step = AdamState.zeros(params), Step(backend)
    support = support_of(torch.ones(1, 7, dtype=torch.bool)) if way == "gathered" else None
    seen = step(params, adam, x, l1=1.0, lr=0.0, clip=c, beta1=0.0, support=support)
    if backend == "cpu":
        assert way_of(step) == way
    assert seen.fired.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert (seen.nnz, seen.saturated) == (4, 2)
    # Exact reconstruction leaves the penalty's 1 where the gradient passes, up to c itself.
    assert adam.m.b_enc.tolist() == [0, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("module", [pytest.param(ops, marks=compiled), reference])
def test_a_code_at_the_edges_of_zero_and_the_clip(module):
    tiny = torch.finfo(torch.float64).tiny
    x = torch.tensor([[0.0, -0.0, -1.0, tiny, 1.0, 1.0 + 2**-50, 3.0]], dtype=torch.float64)
    code = module.encode(x, identity(7), 1.0)
    assert code.col.tolist() == [3, 4, 5, 6]
    assert code.val.tolist() == [tiny, 1.0, 1.0, 1.0]


BIASES = {  # of a batch of 40 rows and 50 features
    "nothing active": torch.full((50,), -1e3),
    "everything active": torch.full((50,), 1e3),
    "one hot feature": torch.cat([torch.tensor([1e3]), torch.full((49,), -1e3)]),
    "one hot feature, the last": torch.cat([torch.full((49,), -1e3), torch.tensor([1e3])]),
}


@compiled
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("case", BIASES)
@pytest.mark.parametrize(
    "way", [pytest.param("screened", marks=screens), "multiplied", "dense", "gathered"]
)
def test_batches_where_nothing_everything_or_one_feature_fires(go, way, case, rows):
    go(way)
    dtype = torch.float32 if way == "screened" else torch.float64
    params = copied(made_up(12, 50), dtype)
    params.b_enc += BIASES[case].to(dtype)
    other = copied(params, dtype)
    adam, adam_other = AdamState.zeros(params), AdamState.zeros(other)
    step = Step("cpu")
    arguments: dict[str, Any] = {"l1": 1.0, "lr": 0.1, "eps": 1e-2, "clip": 900.0}
    if way == "gathered":
        arguments["support"] = support_of(torch.ones(rows, 50, dtype=torch.bool))
    x = batch(rows, 12)
    seen = step(params, adam, x, **arguments)
    expected = Step("reference")(other, adam_other, x, **arguments)
    assert way_of(step) == way
    assert_same(seen, expected, rel=1e-5 if dtype == torch.float32 else 1e-12)
    fires = int((BIASES[case] > 0).sum())
    assert (seen.nnz, seen.saturated) == (rows * fires, rows * fires)
    for name, tensor in state(other, adam_other).items():
        tolerance = 1e-3 if dtype == torch.float32 else 1e-10
        assert_near(state(params, adam)[name], tensor, name, tolerance)


@compiled
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["empty", "full"])
def test_empty_and_full_rows_in_a_support(share):
    params = made_up(12, 50)
    listed = torch.rand(9, 50, generator=torch.Generator().manual_seed(1)) < 0.2
    listed[[0, 4, 8]] = bool(share)
    ends = []
    for backend in ("cpu", "reference"):
        own = copied(params)
        adam = AdamState.zeros(own)
        support = support_of(listed)
        seen = Step(backend)(own, adam, batch(9, 12), l1=1.0, lr=0.1, support=support)
        ends.append((seen, own.W_dec))
    assert_same(*(seen for seen, _ in ends))
    assert_near(ends[0][1], ends[1][1], "W_dec")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_support_that_lists_nothing_leaves_the_bias_alone_to_learn(backend):
    params, x = made_up(6, 20), batch(4, 6)
    before, adam = copied(params), AdamState.zeros(params)
    support = support_of(torch.zeros(4, 20, dtype=torch.bool))
    seen = Step(backend)(params, adam, x, l1=1.0, lr=0.1, support=support)
    assert (seen.nnz, seen.l1) == (0, 0.0)
    assert seen.squared_error == pytest.approx((x - before.b_dec).square().sum().item(), rel=1e-12)
    assert torch.equal(params.W_enc_rows, before.W_enc_rows)
    assert not torch.equal(params.b_dec, before.b_dec)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "way", [pytest.param("screened", marks=screens), "multiplied", "dense", "gathered"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_surfaces_in_the_loss(go, backend, way, bad):
    go(way)
    params = copied(made_up(5, 9), torch.float32 if way == "screened" else torch.float64)
    x = batch(4, 5)
    x[2, 3] = bad
    support = support_of(top_k(batch(4, 9), 4)) if way == "gathered" else None
    step = Step(backend)
    seen = step(params, AdamState.zeros(params), x, l1=1.0, lr=1e-3, support=support)
    assert backend == "reference" or way_of(step) == way
    assert not math.isfinite(seen.squared_error)
    assert not math.isfinite(seen.loss)


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("way", ["multiplied", "dense", "gathered"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_norm_that_is_no_number_reaches_every_parameter(go, backend, way, decoder_norm):
    go(way)
    params, x = made_up(5, 9), batch(4, 5)
    x[2, 3] = math.nan
    support = support_of(top_k(batch(4, 9), 4)) if way == "gathered" else None
    seen = Step(backend)(
        params, AdamState.zeros(params), x, l1=1.0, lr=1e-3, max_grad_norm=1.0, support=support,
        decoder_norm=decoder_norm,
    )  # fmt: skip
    assert seen.grad_norm is not None
    assert math.isnan(seen.grad_norm)
    for name, tensor in params.tensors().items():
        assert bool(tensor.isnan().all()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinity_that_the_loss_does_not_show_is_no_divergence(backend):
    params = made_up(6, 20)
    params.b_enc[3] = -math.inf  # a feature switched off
    seen = Step(backend)(params, AdamState.zeros(params), batch(40, 6), l1=1.0, lr=0.1)
    assert math.isfinite(seen.loss)
    assert seen.fired[3] == 0
    assert params.b_enc[3] == -math.inf
    for name, tensor in params.tensors().items():
        assert tensor.isfinite().sum() == tensor.numel() - (name == "b_enc"), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_is_what_the_dtype_of_the_parameters_makes_of_it(backend):
    # float32's 0.1 is more than 0.1: it lies at the clip and not above.
    x = torch.tensor([[0.1, 0.1 + 2**-26, 0.09]])
    ends = []
    for clip in (0.1, x[0, 0].item()):
        params = identity(3, torch.float32)
        adam = AdamState.zeros(params)
        seen = Step(backend)(params, adam, x, l1=1.0, lr=0.0, beta1=0.0, clip=clip)
        assert (seen.nnz, seen.saturated) == (3, 1)
        assert adam.m.b_enc.tolist() == [1.0, 0.0, 1.0]
        ends.append(seen.loss)
    assert ends[0] == ends[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [1e39, math.inf, torch.finfo(torch.float32).max])
def test_a_clip_beyond_all_numbers_is_no_bound(backend, clip):
    ends = []
    for bound in (clip, None):
        params = copied(made_up(6, 20), torch.float32)
        seen = Step(backend)(
            params, AdamState.zeros(params), batch(40, 6), l1=1.0, lr=0.1, clip=bound
        )
        ends.append((seen.loss, params.W_dec))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda x: x.T.contiguous().T,
        lambda x: x[:1].expand(40, -1),
        lambda x: torch.cat([x, x], 1)[:, ::2],
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["half", "bfloat16", "double", "transposed", "expanded", "strided", "with gradient"],
)
def test_rows_of_any_float_dtype_and_layout_are_read_as_the_values_they_hold(convert):
    params = copied(made_up(6, 20), torch.float32)
    x = convert(batch(40, 6).float())
    plain = x.detach().float().contiguous()
    for got, expected in zip(ops.encode(x, params), ops.encode(plain, params), strict=True):
        assert torch.equal(got, expected)
    other = copied(params, torch.float32)
    seen = Step()(params, AdamState.zeros(params), x, l1=1.0, lr=0.1)
    assert seen[:5] == Step()(other, AdamState.zeros(other), plain, l1=1.0, lr=0.1)[:5]
    assert torch.equal(params.W_dec, other.W_dec)


@compiled
@pytest.mark.parametrize("convert", [torch.Tensor.half, lambda w: torch.stack([w, w], 1)[:, 0]])
def test_weights_of_any_float_dtype_and_layout_are_read_as_the_values_they_hold(convert):
    names = {"recon_weight", "l1_weight", "feature_weight"}
    held = {k: t.half() for k, t in weights_of(batch(40, 6), 20, names).items()}
    ends = []
    for weights in (
        {k: convert(t) for k, t in held.items()},
        {k: t.double() for k, t in held.items()},
    ):
        params = made_up(6, 20)
        Step("cpu")(params, AdamState.zeros(params), batch(40, 6), l1=1.0, lr=0.1, **weights)
        ends.append(params)
    for name, tensor in ends[0].tensors().items():
        assert torch.equal(tensor, ends[1].tensors()[name]), name


def test_no_rows_give_an_empty_code_and_no_reconstruction():
    params = made_up(6, 20)
    code = ops.encode(batch(0, 6), params)
    assert (code.row_ptr.tolist(), len(code.col), len(code.val)) == ([0], 0, 0)
    assert ops.decode(code, params).shape == (0, 6)


@compiled
def test_a_decoded_code_is_what_the_reference_decodes_whatever_its_values():
    params, code = made_up(6, 20), reference.encode(batch(9, 6), made_up(6, 20))
    edited = SparseCode(code.row_ptr, code.col, code.val * batch(1, len(code.val))[0])
    assert (edited.val < 0).any()
    assert_near(ops.decode(edited, params), reference.decode(edited, params), "x̂")


@compiled
def test_with_the_settings_of_a_step_the_update_is_the_references():
    # The public keywords one by one, each away from its default, reach the kernels.
    for name, value in {
        "beta1": 0.5, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.5, "clip": 0.3, "l1": 9.0,
        "lr": 0.2, "train_b_dec": False, "max_grad_norm": 0.05, "decoder_norm": "free",
    }.items():  # fmt: skip
        arguments = {"l1": 1.0, "lr": 0.01, name: value}
        ours, theirs = made_up(6, 20), made_up(6, 20)
        adam, other = AdamState.zeros(ours), AdamState.zeros(theirs)
        objective = {k: arguments.pop(k) for k in ("l1", "clip", "decoder_norm") if k in arguments}
        for i in range(2):
            x = batch(40, 6, seed=i)
            Step("cpu")(ours, adam, x, **objective, **arguments)
            reference.step(theirs, other, x, Objective(**objective), Update(**arguments))
        for tensor, expected in state(theirs, other).items():
            assert_near(state(ours, adam)[tensor], expected, f"{tensor} with {name}")
