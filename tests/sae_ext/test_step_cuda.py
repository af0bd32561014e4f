"""The queued step against the reference: on a GPU, and with the same kernels compiled for the CPU.

"simulated" runs every line of `step_cuda` and every kernel on ordinary memory; only streams, events and
the recording of graphs need the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_weights import batch, copied, made_up, state, stretched, support_of, top_k
from on_device import DEVICES, simulation
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_ext import coding, native, ops, reference, step_cuda
from sae_ext.errors import Diverged, UserError
from sae_ext.ops import AdamState, Parameters, Step, Support
from sae_ext.parameters import Objective

pytestmark = pytest.mark.filterwarnings("error")
F32, F64 = torch.float32, torch.float64


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> torch.device:
    """Where the CUDA kernels run; tensors there take them."""
    if request.param == "cuda":
        return torch.device("cuda", 0)
    for thing, name, value in simulation():
        monkeypatch.setattr(thing, name, value)
    return torch.device("cpu")


@pytest.fixture
def go(monkeypatch) -> Callable[..., None]:
    """Sets constants of `step_cuda`: which way a step takes, and how long its arrays are."""

    def choose(way: str | None = None, **values: Any) -> None:
        if way is not None:
            limit = 2.0 if way == "entries" else -1.0
            for name in ("_SPARSE_BELOW", "_DENSE_ABOVE"):
                values[name] = dict.fromkeys(("float32", "tf32", "bfloat16"), limit)
        for name, value in values.items():
            monkeypatch.setattr(step_cuda, name, value)

    return choose


def started(device: torch.device, way: str | None = None, **options: Any) -> Step:
    """A Step whose queue goes this way from its first step on."""
    step = Step("cuda", **options)
    step.restore({"sparse": way == "entries", "densities": []})
    return step


def moved(params: Parameters, device: torch.device, dtype: torch.dtype = F64) -> Parameters:
    return Parameters(**{k: t.to(device, dtype, copy=True) for k, t in params.tensors().items()})


def placed(support: Support, device: torch.device) -> Support:
    return Support(*(t.to(device) for t in support))


def assert_near(got: Parameters, expected: Parameters, tolerance: float) -> None:
    for name, tensor in expected.tensors().items():
        error = (got.tensors()[name].cpu().double() - tensor.cpu().double()).norm().item()
        assert error <= tolerance * (1 + tensor.norm().item()), f"{name} is off by {error:g}"


def assert_equal(got: Parameters, expected: Parameters) -> None:
    for name, tensor in expected.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name


# ---- Numbers ---------------------------------------------------------------------------------------

WAYS = ["entries", "dense", "gathered"]
sizes = st.sampled_from([1, 3, 8, 31, 64, 65, 130])
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


@pytest.mark.parametrize("way", WAYS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.sampled_from([1, 2, 33, 97]),
    d_in=sizes,
    d_sae=sizes,
    bias=st.sampled_from([-30.0, -1.5, 0.0, 30.0]),
    chosen=options,
    weighted=weights,
    seed=st.integers(0, 1000),
)
def test_steps_in_float64_equal_the_reference(
    device, go, way, rows, d_in, d_sae, bias, chosen, weighted, seed
):
    go(
        "entries" if way == "gathered" else way,
        _PRE_BYTES=1,
        _LEAST_ROWS=32,
        _DENSE_BYTES=1,
        _FIRST_L0=1,
    )
    params = made_up(d_in, d_sae, bias=bias, seed=seed)
    params.b_enc[0] = 0.5  # one feature fires whatever the others do
    params = stretched(params) if chosen["decoder_norm"] == "free" else params
    ours, theirs = moved(params, device), moved(params, device)
    adam, other = AdamState.zeros(ours), AdamState.zeros(theirs)
    step, oracle = started(device, way), Step("reference")
    for i in range(3):
        x = batch(rows, d_in, seed=seed + i).to(device)
        given_weights = {
            "recon_weight": x[:, 0].abs(),
            "l1_weight": x[:, -1].clamp(min=0),
            "feature_weight": batch(1, d_sae, seed=6)[0].abs().to(device),
        }
        arguments: dict[str, Any] = {"l1": 0.7, "lr": 0.01, "eps": 1e-2, **chosen}
        arguments |= {name: given_weights[name] for name in weighted}
        if way == "gathered":
            listed = torch.rand(rows, d_sae, generator=torch.Generator().manual_seed(i)) < 0.4
            arguments["support"] = placed(support_of(listed), device)
        got, expected = (
            step(ours, adam, x, **arguments),
            oracle(theirs, other, x, **arguments),
        )
        for name in ("loss", "squared_error", "l1", "grad_norm"):
            wanted = getattr(expected, name)
            near = None if wanted is None else pytest.approx(wanted, rel=1e-11)
            assert getattr(got, name) == near, name
        assert (got.nnz, got.saturated) == (expected.nnz, expected.saturated)
        assert torch.equal(got.fired, expected.fired)
        assert adam.step == other.step == i + 1
    assert_near(ours, theirs, 1e-11)
    assert_near(adam.m, other.m, 1e-11)
    assert_near(adam.v, other.v, 1e-11)


PRECISIONS = ["float32", "tf32", "bfloat16"]


@contextlib.contextmanager
def pytorch_in(precision: str, device: torch.device) -> Iterator[None]:
    """PyTorch's own products in this precision; without a GPU there is no tf32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield
    torch.backends.cuda.matmul.fp32_precision = before


def gradients(
    params: Parameters, x: Tensor, objective: Objective, support: Support | None
) -> tuple[float, Parameters]:
    """The loss and its gradients by autograd."""
    leaves = Parameters(**{k: t.clone().requires_grad_() for k, t in params.tensors().items()})
    loss = reference.loss(x, leaves, objective, support)
    loss.backward()
    return loss.item(), Parameters(**{k: t.grad for k, t in leaves.tensors().items()})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(300, 96, 512), (97, 33, 130)])
def test_a_step_in_each_precision_errs_at_most_twice_as_much_as_pytorch_does(
    device, go, precision, way, shape
):
    rows, d_in, d_sae = shape
    go("entries" if way == "gathered" else way)
    params = moved(made_up(d_in, d_sae, bias=-1.0), device, F32)
    adam, objective = AdamState.zeros(params), Objective(l1=0.5, clip=2.0, decoder_norm="free")
    x, support = batch(rows, d_in).to(device, F32), None
    if way == "gathered":
        pre = (x - params.b_dec) @ params.W_enc + params.b_enc
        support = placed(support_of(top_k(pre.cpu(), 20)), device)
    loss, exact = gradients(moved(params, device), x.double(), objective, support)
    with pytorch_in(precision, device):
        pytorchs_loss, pytorchs = gradients(params, x, objective, support)
    got = started(device, way, precision=precision)(
        params, adam, x, l1=0.5, lr=0.01, clip=2.0, beta1=0.0, decoder_norm="free", support=support
    )
    rounding = 1e-6 if precision == "float32" else 1e-3
    assert abs(got.loss - loss) <= 2 * abs(pytorchs_loss - loss) + rounding * loss
    for name, gradient in exact.tensors().items():  # beta1 = 0: the moment is the gradient
        ours, theirs = (
            (group.tensors()[name].double() - gradient).norm() for group in (adam.m, pytorchs)
        )
        assert ours <= 2 * theirs + rounding * gradient.norm(), name


def test_the_copies_of_the_weights_follow_whoever_changes_them(device, go):
    go("entries")
    params = moved(made_up(24, 70, bias=-1.0), device, F32)
    adam, step = AdamState.zeros(params), started(device, "entries", precision="bfloat16")
    fresh = started(device, "entries", precision="bfloat16")
    for i in range(3):
        before, before_adam = (
            copied(params, F32),
            AdamState(copied(adam.m, F32), copied(adam.v, F32), adam.step),
        )
        x = batch(50, 24, seed=i).to(device, F32)
        step(params, adam, x, l1=0.1, lr=0.01)
        step.wait()
        fresh(before, before_adam, x, l1=0.1, lr=0.01)
        fresh.wait()
        assert_equal(params, before)
        params.W_dec[3] *= 0.0  # as a revival would
        params.W_dec[3, 0] = 1.0
        params.W_enc_rows[5] = 0.5


@pytest.mark.parametrize("way", ["entries", "dense"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_is_bitwise_the_same_from_run_to_run(device, go, way, precision):
    go(way)
    ends = []
    for _ in range(2):
        params = moved(made_up(48, 200, bias=-1.0), device, F32)
        adam, step = AdamState.zeros(params), started(device, way, precision=precision)
        for i in range(4):
            step(params, adam, batch(600, 48, seed=i).to(device, F32), l1=0.3, lr=0.01)
        step.wait()
        ends.append(state(params, adam))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


# ---- Arrays too short, and other reasons to stop ---------------------------------------------------


@pytest.fixture
def made_good(monkeypatch) -> list[int]:
    """The steps that were stopped and done again, in order, once for each time."""
    steps: list[int] = []
    make_good = step_cuda.Queue._make_good

    def noting(queue: step_cuda.Queue, job: Any, seen: Any) -> None:
        steps.append(job.step)
        make_good(queue, job, seen)

    monkeypatch.setattr(step_cuda.Queue, "_make_good", noting)
    return steps


def trained(
    device: torch.device,
    steps: int = 8,
    *,
    way: str = "entries",
    look: Callable[[int], bool] = lambda i: False,
    **options: Any,
) -> dict[str, Tensor]:
    """Where some steps lead, each on a larger batch in which more fires.

    `look` says after which steps their results are read.
    """
    params = moved(made_up(24, 200, bias=-3.0), device, F32)
    adam, step = AdamState.zeros(params), started(device, way, **options)
    held = [torch.empty(n, device=device) for n in ((97, 24), (97,), (97,), (200,))]
    for i in range(steps):
        x = (1 + 0.5 * i) * batch(97, 24, seed=i)
        for mine, values in zip(held, (x, x[:, 0], x[:, 1], batch(1, 200, seed=i)[0]), strict=True):
            mine.copy_(values if values.ndim == 2 else values.abs())
        w, s, p = held[1:]
        result = step(
            params, adam, held[0], l1=0.3, lr=0.01, recon_weight=w, l1_weight=s, feature_weight=p
        )
        for mine in held:
            mine.zero_()  # what the caller does to it now must not matter
        if look(i):
            assert result.loss > 0
    step.wait()
    assert adam.step == steps
    return state(params, adam)


def assert_same_end(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("chunk", [1, 25 << 20], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_steps_that_find_their_arrays_too_short_end_where_steps_with_room_do(
    device, go, made_good, chunk, every
):
    go("entries", _FIRST_L0=200, _PRE_BYTES=chunk, _LEAST_ROWS=32)
    roomy = trained(device)
    assert not made_good
    go("entries", _FIRST_L0=1, _ROOM=1.0, _NEAR=1.0, _PRE_BYTES=chunk, _LEAST_ROWS=32)
    short = trained(device, look=lambda i: i % every == every - 1)
    assert len(set(made_good)) > 3
    assert_same_end(short, roomy)


def test_a_support_may_be_overwritten_once_its_step_is_queued(device, go, made_good):
    go("entries", _FIRST_L0=1, _ROOM=1.0, _NEAR=1.0)
    ends = []
    for overwrite in (False, True):
        params = moved(made_up(24, 70, bias=-1.0), device)
        adam, step = AdamState.zeros(params), started(device, "entries")
        # The first step finds its arrays too short; the second, queued behind it, has a support.
        step(params, adam, 5 * batch(50, 24).to(device), l1=0.1, lr=0.01)
        support = placed(support_of(batch(50, 70) > 0), device)
        step(params, adam, batch(50, 24, seed=2).to(device), l1=0.1, lr=0.01, support=support)
        if overwrite:
            support.col.zero_()
        step.wait()
        ends.append(state(params, adam))
    assert made_good
    assert_same_end(ends[1], ends[0])


@pytest.mark.parametrize("look", [False, True])
def test_steps_with_and_without_a_support_may_alternate(device, go, look):
    go(_SPARSE_BELOW={"float32": 0.12}, _DENSE_ABOVE={"float32": 0.22})
    params = moved(made_up(24, 70, bias=-1.0), device)
    theirs, oracle = moved(params, device), Step("reference")
    adam, other, step = AdamState.zeros(params), AdamState.zeros(theirs), Step("cuda")
    for i in range(8):
        x, arguments = (1 + i % 3) * batch(50, 24, seed=i).to(device), {}
        if i % 3 == 0:
            arguments["support"] = placed(support_of(batch(50, 70, seed=i) > 0), device)
        result = step(params, adam, x, l1=0.1, lr=0.01, eps=1e-2, **arguments)
        oracle(theirs, other, x, l1=0.1, lr=0.01, eps=1e-2, **arguments)
        if look:
            assert result.loss > 0
    step.wait()
    assert_near(params, theirs, 1e-11)


@pytest.mark.parametrize("again", [False, True], ids=["at first", "when done again"])
def test_a_step_that_cannot_be_queued_leaves_no_trace(device, go, monkeypatch, again):
    go("entries", _FIRST_L0=1 if again else 70, _ROOM=1.0, _NEAR=1.0)
    move, fails = native.move, [False]

    def moves(*args: Any, **named: Any) -> None:
        if fails[0]:
            raise torch.cuda.OutOfMemoryError("no memory left")
        move(*args, **named)

    monkeypatch.setattr(native, "move", moves)
    params = moved(made_up(24, 70, bias=-1.0), device)
    theirs = moved(params, device)
    adam, other, step = AdamState.zeros(params), AdamState.zeros(theirs), started(device, "entries")
    x, wrong = 3 * batch(50, 24).to(device), torch.full((50,), -1.0, device=device)
    if again:
        step(params, adam, x, l1=0.1, lr=0.01)
        fails[0] = True
        with pytest.raises(torch.cuda.OutOfMemoryError):
            step.wait()
    else:
        fails[0] = True
        with pytest.raises(torch.cuda.OutOfMemoryError):
            step(params, adam, x, l1=0.1, lr=0.01, recon_weight=wrong)
    assert adam.step == 0
    assert_equal(params, theirs)
    fails[0] = False
    step(params, adam, x, l1=0.1, lr=0.01, eps=1e-2)
    step.wait()
    Step("reference")(theirs, other, x, l1=0.1, lr=0.01, eps=1e-2)
    assert_near(params, theirs, 1e-11)


def test_a_weight_that_is_no_number_stops_training_before_anything_is_changed(device, go):
    go("entries")
    params = moved(made_up(24, 70, bias=-1.0), device)
    adam, step = AdamState.zeros(params), started(device, "entries")
    step(params, adam, batch(50, 24).to(device), l1=0.1, lr=0.01).loss  # noqa: B018
    params.b_enc[3] = math.nan
    before = {name: t.clone() for name, t in state(params, adam).items()}
    result = step(params, adam, batch(50, 24).to(device), l1=0.1, lr=0.01)
    step(params, adam, batch(50, 24).to(device), l1=0.1, lr=0.01)
    with pytest.raises(Diverged, match="b_enc holds a NaN"):
        step.wait()
    for name, tensor in state(params, adam).items():
        assert torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7)), name
    assert adam.step == 1
    with pytest.raises(Diverged, match="b_enc holds a NaN"):
        result.loss  # noqa: B018
    params.b_enc[3] = 0.0
    assert math.isfinite(step(params, adam, batch(50, 24).to(device), l1=0.1, lr=0.01).loss)


@pytest.mark.parametrize("way", ["entries", "dense"])
def test_a_row_that_is_no_number_reaches_the_parameters_as_in_pytorch(device, go, way):
    go(way)
    params = moved(made_up(24, 70, bias=-1.0), device)
    adam, step = AdamState.zeros(params), started(device, way)
    x = batch(50, 24).to(device)
    x[7, 3] = math.nan
    assert math.isnan(step(params, adam, x, l1=0.1, lr=0.01).loss)
    assert bool(params.W_dec.isnan().any())


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("recon_weight", -1.0, r"recon_weight\[3\] is -1"),
        ("l1_weight", math.inf, r"l1_weight\[3\] is inf"),
        ("feature_weight", math.nan, r"feature_weight\[3\] is nan"),
        ("support", 70, r"support.col must lie in \[0, 70\)"),
        ("support", 0, "support.col must ascend within each row"),
    ],
)
@pytest.mark.parametrize("way", ["entries", "dense"])
def test_wrong_weights_and_supports_are_found_on_the_device_and_change_nothing(
    device, go, way, argument, value, message
):
    go(way)
    params = moved(made_up(24, 70, bias=-1.0), device)
    adam, step = AdamState.zeros(params), started(device, way)
    before = {name: t.clone() for name, t in state(params, adam).items()}
    x, wrong = batch(50, 24).to(device), {}
    if argument == "support":
        support = support_of(torch.ones(50, 70, dtype=torch.bool))
        support.col[75] = value
        wrong["support"] = placed(support, device)
    else:
        wrong[argument] = torch.ones(70 if argument == "feature_weight" else 50, device=device)
        wrong[argument][3] = value
    step(params, adam, x, l1=0.1, lr=0.01, **wrong)
    with pytest.raises(UserError, match=message):
        step.wait()
    assert_same_end(state(params, adam), before)
    assert adam.step == 0
    assert step(params, adam, x, l1=0.1, lr=0.01).nnz > 0


# ---- The way a step takes --------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_way_of_a_step_does_not_depend_on_when_results_are_read(device, go, monkeypatch, every):
    go(_SPARSE_BELOW={"float32": 0.12}, _DENSE_ABOVE={"float32": 0.22})
    ways: list[bool] = []
    enqueue = step_cuda.Queue._enqueue
    monkeypatch.setattr(
        step_cuda.Queue, "_enqueue", lambda q, j, *a: ways.append(j.sparse) or enqueue(q, j, *a)
    )
    unread = trained(device, 14, way="dense")
    first, ways[:] = list(ways), []
    read = trained(device, 14, way="dense", look=lambda i: i % every == 0)
    assert ways == first
    assert set(first) == {True, False}
    assert_same_end(read, unread)


@pytest.mark.parametrize("way", ["entries", "dense"])
def test_a_density_between_the_limits_changes_nothing(device, go, way):
    go(_SPARSE_BELOW={"float32": 0.02}, _DENSE_ABOVE={"float32": 0.9})
    step = started(device, way)
    params = moved(made_up(24, 70, bias=-0.5), device)
    adam = AdamState.zeros(params)
    for i in range(3):
        step(params, adam, batch(50, 24, seed=i).to(device), l1=0.1, lr=0.01)
    assert step.state()["sparse"] == (way == "entries")


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_the_first_steps_of_a_resumed_run_follow_the_densities_that_were_saved(device, density):
    step = Step("cuda")
    step.restore({"sparse": False, "densities": [density, density]})
    assert step.state() == {"sparse": False, "densities": [density, density]}
    params = moved(made_up(24, 70, bias=0.0), device)
    step(params, AdamState.zeros(params), batch(50, 24).to(device), l1=0.1, lr=0.01)
    assert step._queue._sparse == (density == 0.0)
    with pytest.raises(UserError, match="a Step's state holds 'sparse' and 'densities'"):
        step.restore({"sparse": True})
    step.restore({})
    assert step.state()["densities"] == []


def test_a_resumed_run_goes_the_same_way(device, go):
    go(_SPARSE_BELOW={"float32": 0.12}, _DENSE_ABOVE={"float32": 0.22})
    params = moved(made_up(24, 200, bias=-3.0), device, F32)
    adam, step = AdamState.zeros(params), started(device)
    batches = [(1 + 0.5 * i) * batch(97, 24, seed=i).to(device, F32) for i in range(12)]
    for x in batches[:6]:
        step(params, adam, x, l1=0.3, lr=0.01)
    kept = step.state()
    other = moved(params, device, F32)
    other_adam = AdamState(moved(adam.m, device, F32), moved(adam.v, device, F32), adam.step)
    resumed = Step("cuda")
    resumed.restore(kept)
    for x in batches[6:]:
        step(params, adam, x, l1=0.3, lr=0.01)
        resumed(other, other_adam, x, l1=0.3, lr=0.01)
    assert step.state() == resumed.state()
    assert_same_end(state(other, other_adam), state(params, adam))


def test_two_hundred_steps_that_turn_sparse_stay_with_the_reference(device, go):
    go(_SPARSE_BELOW={"float32": 0.20}, _DENSE_ABOVE={"float32": 0.25})
    params = moved(made_up(16, 64), device)
    theirs, step, oracle = moved(params, device), started(device), Step("reference")
    adam, other = AdamState.zeros(params), AdamState.zeros(theirs)
    ways = set()
    for i in range(200):
        x = batch(64, 16, seed=i).to(device)
        got = step(params, adam, x, l1=2.0, lr=0.01, eps=1e-4)
        expected = oracle(theirs, other, x, l1=2.0, lr=0.01, eps=1e-4)
        assert got.loss == pytest.approx(expected.loss, rel=1e-8)
        assert got.nnz == expected.nnz
        ways.add(step.state()["sparse"])
    assert ways == {True, False}
    assert_near(params, theirs, 1e-7)


# ---- What a queued step must not do ----------------------------------------------------------------


class Unsynchronised(TorchDispatchMode):
    """Refuses what would make Python wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal")
    """On a GPU torch itself knows better; see `watched` below."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        assert name not in self.WAITS, f"{name} waits for the device"
        if name == "index_put_":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_queueing_a_step_never_waits(device, go, monkeypatch, way, precision):
    go("entries" if way == "gathered" else way)
    enqueue = step_cuda.Queue._enqueue
    queued = []

    def watched(queue: step_cuda.Queue, *args: Any) -> None:
        with Unsynchronised():
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                enqueue(queue, *args)
            finally:
                if device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        queued.append(1)

    monkeypatch.setattr(step_cuda.Queue, "_enqueue", watched)
    params = moved(made_up(24, 70, bias=-1.0), device, F32)
    adam, step = AdamState.zeros(params), started(device, way, precision=precision)
    arguments: dict[str, Any] = {"max_grad_norm": 0.1, "decoder_norm": "free", "clip": 1.0}
    arguments |= {"feature_weight": torch.ones(70, device=device)}
    arguments |= {"recon_weight": torch.ones(50, device=device)}
    if way == "gathered":
        arguments["support"] = placed(support_of(torch.ones(50, 70, dtype=torch.bool)), device)
    for i in range(4):
        step(params, adam, batch(50, 24, seed=i).to(device, F32), l1=0.1, lr=0.01, **arguments)
    step.wait()
    assert len(queued) == 4


class Recorded:
    """In the place of a CUDA graph: what was captured is queued again, Python's numbers included.

    Like a graph it needs all memory to be where it was.
    """

    replays = 0

    def __init__(self) -> None:
        self._queue: Callable[[], Tensor] | None = None

    def replay(self, queue: Callable[[], Tensor], device: torch.device) -> Tensor:
        if self._queue is None:
            self._queue, self._places = queue, places(queue)
        assert places(queue) == self._places
        Recorded.replays += 1
        return self._queue()


def places(queue: Callable[[], Tensor]) -> dict[str, int]:
    """Where the buffers are that a program uses."""
    program: step_cuda._Program = queue.__self__  # type: ignore[attr-defined]
    spaces = [program._space] if program._job.sparse else [program._space, program._dense_space]
    return {name: t.data_ptr() for space in spaces for name, t in space._flat.items()}


@pytest.mark.parametrize("way", ["entries", "dense"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_replayed_step_is_the_step_queued_anew(device, go, monkeypatch, way, precision):
    if device.type == "cpu":
        monkeypatch.setattr(step_cuda, "_Graph", Recorded)
    ends = []
    for capture in (False, True):
        go(way)
        Recorded.replays = 0
        params = moved(made_up(24, 200, bias=-3.0), device, F32)
        adam = AdamState.zeros(params)
        step = started(device, way, precision=precision, capture=capture)
        losses = []
        # The penalty and the rate change with every step, other things now and then.
        for i in range(30):
            rows = 97 if i % 5 else 60
            x = (1 + 0.2 * i) * batch(rows, 24, seed=i).to(device, F32)
            w = batch(1, rows, seed=i)[0].abs().to(device, F32)
            fixed = [
                {"clip": 0.5}, {}, {"train_b_dec": False}, {"max_grad_norm": 0.1}, {"max_grad_norm": 0.2}
            ][i // 6 % 5]  # fmt: skip
            result = step(params, adam, x, l1=0.1 * i, lr=0.01 / (1 + i), l1_weight=w, **fixed)
            losses.append(result)
        step.wait()
        ends.append(({**state(params, adam)}, [r.loss for r in losses], [r.fired for r in losses]))
    if device.type == "cpu":
        assert Recorded.replays > 0
    assert_same_end(ends[1][0], ends[0][0])
    assert ends[1][1] == ends[0][1]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][2], ends[1][2], strict=True))


def test_graphs_are_not_replayed_on_memory_that_was_given_back(device, go, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(step_cuda, "_Graph", Recorded)
    go(_SPARSE_BELOW={"float32": 0.12}, _DENSE_ABOVE={"float32": 0.22})
    ends, ways = [], set()
    for capture in (False, True):
        Recorded.replays = 0
        params = moved(made_up(24, 200, bias=-3.0), device, F32)
        adam, step = AdamState.zeros(params), started(device, capture=capture)
        for many, scale in ((8, 8.0), (8, 1.0), (8, 8.0), (3, 1.0), (8, 8.0)):
            for i in range(many):
                step(params, adam, scale * batch(97, 24, seed=i).to(device, F32), l1=0.1, lr=1e-3)
                ways.add(step._queue._sparse)
        step.wait()
        ends.append(state(params, adam))
    assert ways == {True, False}
    assert device.type == "cuda" or Recorded.replays > 8
    assert_same_end(ends[1], ends[0])


# ---- The rest of the public face -------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-30.0, -1.0, 30.0])
def test_encode_decode_and_autoencode_equal_the_reference(device, bias):
    params = moved(made_up(24, 130, bias=bias), device)
    x = batch(70, 24).to(device)
    code = ops.encode(x, params, clip=1.5)
    expected = reference.encode(x, params, 1.5)
    assert torch.equal(code.row_ptr, expected.row_ptr)
    assert torch.equal(code.col, expected.col)
    torch.testing.assert_close(code.val, expected.val, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ops.decode(code, params), reference.decode(code, params))
    grads = []
    for compute in (coding, reference):
        x_hat, l1, activity, signed = compute.autoencode(x, params, 1.5, None, None)
        backward = compute.autoencode_backward(
            (x_hat, l1, activity, signed.val), x, params, signed, None, of_x=True, of_weights=True
        )
        grads.append(
            [x_hat, l1, activity, backward[0], *backward[1].tensors().values(), backward[2]]
        )
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_a_backward_through_weights_that_a_step_has_moved_is_refused(device, go):
    go("entries")
    params = moved(made_up(24, 70, bias=-1.0), device)
    leaves = Parameters(**{k: t.requires_grad_() for k, t in params.tensors().items()})
    loss = (leaves.W_dec**2).sum()
    Step("cuda")(leaves, AdamState.zeros(params), batch(50, 24).to(device), l1=0.1, lr=0.01)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_precisions_of_a_gpu_are_refused_for_other_parameters(device):
    params = moved(made_up(24, 70), device)
    with pytest.raises(UserError, match="precision 'bfloat16' is for parameters in float32"):
        Step("cuda", precision="bfloat16")(
            params, AdamState.zeros(params), batch(5, 24).to(device), l1=0.1, lr=0.1
        )
