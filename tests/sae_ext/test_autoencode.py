"""The differentiable face: gradients, torch.compile, optimizers, and the step that it must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from shutil import which
from typing import Any

import pytest
import torch
from made_up_weights import (
    batch,
    copied,
    dense,
    identity,
    leaves,
    made_up,
    state,
    stretched,
    support_of,
    top_k,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_ext import native, ops, reference
from sae_ext.ops import AdamState, Parameters, Step, Support
from sae_ext.parameters import Objective

compiled = pytest.mark.skipif(native.MISSING is not None, reason="the kernels are not built")
ROWS, D_IN, D_SAE, CLIP = 6, 4, 9, 0.7
NAMES = ("x_hat", "l1", "activity", "val")
WAYS = [(name,) for name in NAMES] + [NAMES]


@pytest.fixture(params=[pytest.param("cpu", marks=compiled), "reference"])
def backend(request, monkeypatch) -> str:
    """What autoencode runs on: the kernels, or the reference as where they are not built."""
    if request.param == "reference":
        monkeypatch.setattr(native, "MISSING", "left out")
    assert (ops.implementation() == "reference") == (request.param == "reference")
    return str(request.param)


def outputs(out: ops.Autoencoded, names: tuple[str, ...] = NAMES) -> list[Tensor]:
    given = {"x_hat": out.x_hat, "l1": out.l1, "activity": out.activity, "val": out.code.val}
    return [given[name] for name in names]


def by_autograd(
    x: Tensor,
    params: Parameters,
    clip: float | None = None,
    p: Tensor | None = None,
    support: Support | None = None,
) -> dict[str, Tensor]:
    """The same outputs from dense products that autograd knows."""
    pre, _ = reference.activations(x, params, support=support)
    z = pre.relu() if clip is None else pre.relu().clamp(max=clip)
    priced = z if p is None else z * p
    return {
        "x_hat": z @ params.W_dec + params.b_dec,
        "l1": priced.sum(1),
        "activity": z.sum(0),
        "val": z[pre > 0],
    }


def away_from_the_kinks(clip: float | None) -> tuple[Tensor, Parameters]:
    """A batch whose pre-activations are all at least 1e-3 from 0 and from the clip, on either side."""
    for seed in range(1000):
        params, x = made_up(D_IN, D_SAE, seed=seed), batch(ROWS, D_IN, seed=seed + 1)
        pre, _ = reference.activations(x, params)
        edges = [0.0] if clip is None else [0.0, clip]
        if all((pre - edge).abs().min() > 1e-3 for edge in edges):
            assert all(((pre > edge).any() and (pre < edge).any()) for edge in edges)
            return x, params
    raise AssertionError("no such batch")


def some_support(x: Tensor, params: Parameters) -> Support:
    """The largest of each row, below zero too; no entry in the first row."""
    pre, _ = reference.activations(x, params)
    listed = top_k(pre, D_SAE * 3 // 4)
    listed[0] = False
    return support_of(listed)


CLIPS = pytest.mark.parametrize("clip", [None, CLIP], ids=["no clip", "clip"])
SUPPORTED = pytest.mark.parametrize("supported", [False, True], ids=["all", "support"])


# ---- Gradients -------------------------------------------------------------------------------------


@CLIPS
@SUPPORTED
@pytest.mark.parametrize("way", WAYS, ids="+".join)
def test_gradients_are_what_finite_differences_measure(backend, clip, supported, way):
    x, params = away_from_the_kinks(clip)
    support = some_support(x, params) if supported else None
    p = batch(1, D_SAE, seed=5)[0]

    def run(x: Tensor, p: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = ops.autoencode(x, Parameters(*tensors), clip=clip, feature_weight=p, support=support)
        return tuple(outputs(out, way))

    inputs = [x, p, *params.tensors().values()]
    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in inputs])


@CLIPS
@SUPPORTED
@pytest.mark.parametrize("priced", [False, True], ids=["p=1", "p"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_equal_autograds_through_dense_products(
    backend, clip, supported, priced, dtype
):
    rows, d_in, d_sae = 50, 33, 130
    params, x = made_up(d_in, d_sae, bias=-0.3), batch(rows, d_in).to(dtype)
    p = batch(1, d_sae, seed=5)[0].to(dtype) if priced else None
    support = support_of(top_k(batch(rows, d_sae, seed=3), 40)) if supported else None
    sides = []
    for exact in (False, True):
        kind = torch.float64 if exact else dtype
        own = leaves(copied(params, dtype), kind)
        x_own = x.detach().to(kind).requires_grad_()
        p_own = None if p is None else p.detach().to(kind).requires_grad_()
        if exact:
            made = by_autograd(x_own, own, clip, p_own, support)
        else:
            out = ops.autoencode(x_own, own, clip=clip, feature_weight=p_own, support=support)
            made = dict(zip(NAMES, outputs(out), strict=True))
        cotangents = [
            batch(1, v.numel(), seed=i).view(v.shape).to(v) for i, v in enumerate(made.values())
        ]
        torch.autograd.backward(list(made.values()), cotangents)
        named = {"x": x_own, **({} if p_own is None else {"p": p_own}), **own.tensors()}
        sides.append({**made, **{f"grad of {k}": t.grad for k, t in named.items()}})
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, expected in sides[1].items():
        error = (sides[0][name].double() - expected).norm().item()
        assert error <= tolerance * (1 + expected.norm().item()), f"{name} is off by {error:g}"


def test_the_l1_of_a_free_decoder_is_the_steps_with_its_row_lengths_as_weights(backend):
    params, x = stretched(made_up(D_IN, D_SAE)), batch(ROWS, D_IN)
    params.W_dec[-1, 0] = 1e-3  # a length has no derivative at 0
    own = leaves(params)
    out = ops.autoencode(x, own, feature_weight=own.W_dec.norm(dim=1))
    loss = (out.x_hat - x).square().sum(1).mean() + 2.0 * out.l1.mean()
    loss.backward()
    expected, seen = reference.gradients(x, params, Objective(2.0, decoder_norm="free"))
    assert loss.item() == pytest.approx(seen.loss, rel=1e-12)
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(own.tensors()[name].grad, tensor, rtol=1e-11, atol=1e-12)


def test_gradients_pass_up_to_the_clip_and_not_at_zero_or_above(backend):
    tiny = torch.finfo(torch.float64).tiny
    x = torch.tensor([[0.0, -0.0, -1.0, tiny, 1.0, 1.0 + 2**-50, 3.0]], dtype=torch.float64)
    x.requires_grad_()
    params = leaves(identity(7))
    out = ops.autoencode(x, params, clip=1.0)
    assert out.code.col.tolist() == [3, 4, 5, 6]
    assert out.code.val.tolist() == [tiny, 1.0, 1.0, 1.0]
    (out.l1.sum() + out.activity.sum() + out.code.val.sum()).backward()
    assert params.b_enc.grad is not None
    assert params.b_enc.grad.tolist() == [0, 0, 0, 3, 3, 0, 0]
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 0, 3, 3, 0, 0]]


def test_what_the_code_holds_is_what_encode_lists(backend):
    params, x = made_up(33, 130), batch(50, 33)
    out, code = ops.autoencode(x, params, clip=CLIP), ops.encode(x, params, CLIP)
    assert torch.equal(out.code.row_ptr, code.row_ptr)
    assert torch.equal(out.code.col, code.col)
    assert torch.equal(out.code.val, code.val)
    torch.testing.assert_close(out.x_hat, ops.decode(code, params), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.activity, dense(code, 130).sum(0), rtol=1e-12, atol=1e-13)


def test_an_expanded_gradient_is_read_as_the_values_it_holds(backend):
    for choose in (
        lambda out: out.x_hat.sum(),
        lambda out: out.l1.sum(),
        lambda out: out.activity.sum(),
        lambda out: out.code.val.sum(),
        lambda out: out.x_hat[:, :1].expand(-1, 5).T.sum(),
    ):
        grads = []
        for weigh in (lambda v: v, lambda v: v * torch.ones_like(v).contiguous()):
            params = leaves(made_up(D_IN, D_SAE))
            out = ops.autoencode(batch(ROWS, D_IN), params)
            scaled = ops.Autoencoded(
                weigh(out.x_hat), weigh(out.l1), weigh(out.activity),
                out.code._replace(val=weigh(out.code.val)),
            )  # fmt: skip
            choose(scaled).backward()
            grads.append([t.grad for t in params.tensors().values()])
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x[:1].expand(ROWS, -1),
        lambda x: torch.stack([x, x], 2)[:, :, 0],
        torch.Tensor.float,
        torch.Tensor.bfloat16,
    ],
    ids=["transposed", "expanded", "strided", "float32", "bfloat16"],
)
def test_rows_of_any_layout_and_dtype_get_the_gradient_of_the_values_they_hold(backend, convert):
    params = made_up(D_IN, D_SAE)
    grads = []
    for plain in (False, True):
        base = batch(ROWS, D_IN).requires_grad_()
        x = convert(base)
        x = x.double().contiguous() if plain else x
        out = ops.autoencode(x, params, clip=CLIP)
        out.x_hat.square().sum().backward()
        grads.append(base.grad)
    assert torch.equal(*grads)
    assert grads[0].any()


@pytest.mark.parametrize("wanted", ["x", "p", "W_enc_rows", "b_enc", "W_dec", "b_dec"])
def test_gradients_are_made_only_where_they_are_asked_for(backend, wanted):
    tensors = {
        **made_up(D_IN, D_SAE).tensors(), "x": batch(ROWS, D_IN), "p": batch(1, D_SAE)[0],
    }  # fmt: skip
    tensors[wanted].requires_grad_()
    x, p = tensors.pop("x"), tensors.pop("p")
    out = ops.autoencode(x, Parameters(**tensors), feature_weight=p)
    sum(v.square().sum() for v in outputs(out)).backward()
    for name, tensor in {**tensors, "x": x, "p": p}.items():
        assert (tensor.grad is not None) == (name == wanted), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_feature_weight_of_any_float_dtype_gets_the_gradient_of_the_values_it_holds(
    backend, dtype
):
    params, x, grads = made_up(D_IN, D_SAE), batch(ROWS, D_IN), []
    for convert in (lambda p: p, torch.Tensor.double):
        base = batch(1, D_SAE, seed=5)[0].to(dtype).requires_grad_()
        out = ops.autoencode(x, params, clip=CLIP, feature_weight=convert(base))
        assert out.l1.dtype == torch.float64
        out.l1.square().sum().backward()
        assert base.grad is not None
        assert base.grad.dtype == dtype
        grads.append(base.grad)
    assert torch.equal(*grads)
    assert grads[0].any()


@pytest.mark.parametrize("train_b_dec", [True, False])
def test_a_gradient_through_parameters_that_a_step_has_moved_is_refused(backend, train_b_dec):
    params, x = leaves(made_up(D_IN, D_SAE)), batch(ROWS, D_IN)
    adam, step = AdamState.zeros(params), Step(backend)
    before = ops.autoencode(x, params).x_hat.sum()
    step(params, adam, x, l1=1.0, lr=0.1, train_b_dec=train_b_dec)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()
    ops.autoencode(x, params).x_hat.sum().backward()
    assert params.W_dec.grad is not None


def test_a_step_lets_autograd_know_of_each_tensor_it_writes(backend):
    params = made_up(D_IN, D_SAE)
    adam = AdamState.zeros(params)
    before = {name: tensor._version for name, tensor in state(params, adam).items()}
    Step(backend)(params, adam, batch(ROWS, D_IN), l1=1.0, lr=0.1)
    for name, tensor in state(params, adam).items():
        assert tensor._version > before[name], name


def test_without_a_gradient_to_make_nothing_is_recorded(backend):
    out = ops.autoencode(batch(ROWS, D_IN), made_up(D_IN, D_SAE))
    assert not any(v.requires_grad for v in outputs(out))
    with torch.no_grad():
        out = ops.autoencode(batch(ROWS, D_IN), leaves(made_up(D_IN, D_SAE)))
    assert not any(v.requires_grad for v in outputs(out))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused_and_not_silently_zero(backend, name):
    params, x = leaves(made_up(D_IN, D_SAE)), batch(ROWS, D_IN).requires_grad_()
    (value,) = outputs(ops.autoencode(x, params), (name,))
    (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autoencode_backward"):
        first.sum().backward()


@pytest.mark.parametrize("bias", [-1e3, 1e3], ids=["nothing active", "everything active"])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_batches_where_nothing_or_everything_is_active(backend, bias, rows):
    params, x = leaves(made_up(D_IN, D_SAE, bias=bias)), batch(rows, D_IN).requires_grad_()
    out = ops.autoencode(x, params)
    assert len(out.code.val) == (0 if bias < 0 else rows * D_SAE)
    (out.x_hat.square().sum() + out.l1.sum() + out.activity.sum() + out.code.val.sum()).backward()
    other, x_other = leaves(params), batch(rows, D_IN).requires_grad_()
    made = by_autograd(x_other, other)
    (made["x_hat"].square().sum() + made["l1"].sum() + 2 * made["activity"].sum()).backward()
    for a, b in zip(
        [x, *params.tensors().values()], [x_other, *other.tensors().values()], strict=True
    ):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_a_support_that_lists_nothing_rebuilds_the_bias(backend):
    params = leaves(made_up(D_IN, D_SAE))
    support = support_of(torch.zeros(ROWS, D_SAE, dtype=torch.bool))
    out = ops.autoencode(batch(ROWS, D_IN), params, support=support)
    assert torch.equal(out.x_hat, params.b_dec.expand(ROWS, -1))
    assert not out.l1.any()
    sum(v.sum() for v in outputs(out)).backward()
    assert params.b_dec.grad is not None
    assert params.b_dec.grad.tolist() == [float(ROWS)] * D_IN


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_shows_in_its_own_outputs(backend, bad):
    params, x = made_up(D_IN, D_SAE), batch(ROWS, D_IN)
    x[2, 1] = bad
    out = ops.autoencode(x, params)
    finite = out.x_hat.isfinite().all(1) & out.l1.isfinite()
    assert finite.tolist() == [b != 2 for b in range(ROWS)]


# ---- As an operator --------------------------------------------------------------------------------


def operator_arguments(
    dtype: torch.dtype, requires_grad: bool, priced: bool, supported: bool, clip: float | None,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Any, ...]:  # fmt: skip
    params, x = copied(made_up(D_IN, D_SAE), dtype), layout(batch(ROWS, D_IN).to(dtype))
    support = some_support(x.double(), copied(params)) if supported else (None, None)
    p = batch(1, D_SAE, seed=5)[0].to(dtype) if priced else None
    floats = [x, *params.tensors().values(), p]
    if requires_grad:
        floats = [None if t is None else t.detach().requires_grad_() for t in floats]
    return (*floats, *support, clip)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "with gradients"])
@pytest.mark.parametrize(
    ("priced", "supported", "clip"), [(False, False, None), (True, True, CLIP), (True, False, CLIP)]
)
def test_the_operator_keeps_pytorchs_rules(backend, requires_grad, priced, supported, clip):
    torch.library.opcheck(
        torch.ops.sparsemill.autoencode.default,
        operator_arguments(torch.float64, requires_grad, priced, supported, clip),
    )


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, lambda x: x),
        (torch.float64, lambda x: x.T.contiguous().T),
        (torch.float32, lambda x: x[:1].expand(ROWS, -1)),
    ],
    ids=["float32", "transposed", "expanded"],
)
def test_the_operator_keeps_pytorchs_rules_whatever_x_is(backend, dtype, layout):
    torch.library.opcheck(
        torch.ops.sparsemill.autoencode.default,
        operator_arguments(dtype, True, True, False, CLIP, layout),
    )


@pytest.mark.parametrize(
    ("given", "dtype", "priced", "of_x", "of_weights"),
    [
        ("all", torch.float32, True, True, True),
        ("all", torch.float64, False, False, True),
        ("x_hat", torch.float64, True, True, False),
        ("val", torch.float64, False, True, True),
        ("expanded", torch.float64, True, True, True),
        ("none", torch.float64, True, True, True),
        ("none", torch.float32, False, False, False),
    ],
)
def test_the_backward_operator_keeps_pytorchs_rules(
    backend, given, dtype, priced, of_x, of_weights
):
    arguments = operator_arguments(dtype, False, priced, False, CLIP)
    x_hat, l1, activity, row_ptr, col, val = torch.ops.sparsemill.autoencode(*arguments)
    one = torch.ones((), dtype=dtype)
    grads = {
        "all": (x_hat, l1, activity, val),
        "x_hat": (x_hat, None, None, None),
        "val": (None, None, None, val),
        "expanded": tuple(one.expand(v.shape) for v in (x_hat, l1, activity, val)),
        "none": (None, None, None, None),
    }[given]
    torch.library.opcheck(
        torch.ops.sparsemill.autoencode_backward.default,
        (*grads, *arguments[:5], row_ptr, col, val, arguments[5], of_x, of_weights),
    )


@pytest.mark.parametrize("given", [NAMES, ("x_hat",), ("val",), ()], ids="+".join)
def test_the_backward_operator_makes_what_is_wanted_and_the_same_as_with_all(backend, given):
    arguments = operator_arguments(torch.float64, False, True, False, CLIP)
    x_hat, l1, activity, row_ptr, col, val = torch.ops.sparsemill.autoencode(*arguments)
    values = {"x_hat": x_hat, "l1": l1, "activity": activity, "val": val}
    grads = [batch(1, v.numel()).view(v.shape) if k in given else None for k, v in values.items()]

    def made(of_x: bool, of_weights: bool) -> tuple[Tensor, ...]:
        return torch.ops.sparsemill.autoencode_backward(
            *grads, *arguments[:5], row_ptr, col, val, arguments[5], of_x, of_weights
        )

    whole = made(True, True)
    assert [g.shape for g in whole] == [t.shape for t in arguments[:6]]
    assert all(g.any() for g in whole) == ("l1" in given and "x_hat" in given)
    for of_x, of_weights in ((True, False), (False, True), (False, False)):
        some = made(of_x, of_weights)
        for i, (got, expected) in enumerate(zip(some, whole, strict=True)):
            wanted = of_weights if i else of_x
            assert torch.equal(got, expected if wanted else expected.new_empty(0))


def test_only_the_gradients_that_are_asked_for_are_made(backend):
    for wanted in ("x", "W_dec", "p"):
        tensors = {
            **made_up(D_IN, D_SAE).tensors(),
            "x": batch(ROWS, D_IN),
            "p": batch(1, D_SAE)[0],
        }
        tensors[wanted].requires_grad_()
        x, p = tensors.pop("x"), tensors.pop("p")
        out = ops.autoencode(x, Parameters(**tensors), clip=CLIP, feature_weight=p)
        loss = sum(v.square().sum() for v in outputs(out))
        with Calls() as calls:
            loss.backward()
        assert calls.seen == [(wanted == "x", wanted != "x")]


class Calls(TorchDispatchMode):
    """What the backward operator is asked for, (of_x, of_weights), call by call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.sparsemill.autoencode_backward.default:
            self.seen.append(args[-2:])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def objective_of(x: Tensor, params: Parameters, clip: float | None, p: Tensor | None) -> Tensor:
    out = ops.autoencode(x, params, clip=clip, feature_weight=p)
    return (out.x_hat - x).square().sum(1).mean() + out.l1.mean() + out.code.val.square().sum()


@pytest.mark.parametrize("whole", [True, False], ids=["one graph", "graph breaks"])
@pytest.mark.parametrize(("clip", "priced"), [(None, False), (CLIP, True)])
def test_compiled_by_torch_it_computes_the_same(backend, fresh_compiler, whole, clip, priced):
    p = batch(1, D_SAE, seed=5)[0] if priced else None
    run = torch.compile(objective_of, fullgraph=whole, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=whole):
        for rows in (ROWS, ROWS + 5):  # the second time with other sizes
            sides = []
            for function in (run, objective_of):
                params, x = leaves(made_up(D_IN, D_SAE)), batch(rows, D_IN).requires_grad_()
                loss = function(x, params, clip, p)
                loss.backward()
                sides.append([loss, x.grad, *(t.grad for t in params.tensors().values())])
            for a, b in zip(*sides, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(which("g++") is None, reason="g++ is needed")
@pytest.mark.slow
@compiled
def test_compiled_to_machine_code_by_torch_it_computes_the_same(
    fresh_compiler, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    p, sides = batch(1, D_SAE, seed=5)[0], []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for function in (torch.compile(objective_of, fullgraph=True), objective_of):
            params, x = leaves(made_up(D_IN, D_SAE)), batch(ROWS, D_IN).requires_grad_()
            loss = function(x, params, CLIP, p)
            loss.backward()
            sides.append([loss, x.grad, *(t.grad for t in params.tensors().values())])
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_without_the_compiled_module_the_same_numbers_come_from_the_reference(monkeypatch):
    sides = []
    for missing in (native.MISSING, "left out"):
        monkeypatch.setattr(native, "MISSING", missing)
        params, x = leaves(made_up(33, 130)), batch(50, 33).requires_grad_()
        out = ops.autoencode(x, params, clip=CLIP)
        sum(v.square().sum() for v in outputs(out)).backward()
        sides.append(
            [*outputs(out), *out.code[:2], x.grad, *(t.grad for t in params.tensors().values())]
        )
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


# ---- Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_of", [torch.optim.Adam, torch.optim.SGD])
def test_twenty_steps_of_an_optimizer_are_those_of_dense_autograd(backend, optimizer_of):
    ends = []
    for fused in (True, False):
        params = leaves(made_up(24, 96, bias=-0.5))
        optimizer = optimizer_of(params.tensors().values(), lr=1e-3)
        losses = []
        for i in range(20):
            x = batch(64, 24, seed=i)
            made = by_autograd(x, params, 2.0)
            if fused:
                made = dict(zip(NAMES, outputs(ops.autoencode(x, params, clip=2.0)), strict=True))
            loss = (made["x_hat"] - x).square().sum(1).mean() + made["l1"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ends.append((losses, params))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-9)
    assert ends[0][0][-1] < ends[0][0][0]
    for name, tensor in ends[0][1].tensors().items():
        torch.testing.assert_close(tensor, ends[1][1].tensors()[name], rtol=1e-8, atol=1e-10)


def test_fused_steps_and_an_optimizer_take_turns_and_arrive_where_fused_steps_do(backend):
    arguments: dict[str, Any] = {
        "l1": 0.5, "lr": 1e-3, "clip": 2.0, "decoder_norm": "free", "weight_decay": 0.1,
    }  # fmt: skip
    straight = made_up(24, 96, bias=-0.5)
    adam, step = AdamState.zeros(straight), Step()
    for i in range(20):
        step(straight, adam, batch(64, 24, seed=i), **arguments)

    params = leaves(made_up(24, 96, bias=-0.5))
    optimizer = torch.optim.AdamW(params.tensors().values(), lr=1e-3, weight_decay=0.1)
    turns = AdamState.zeros(params)
    for i in range(20):
        x = batch(64, 24, seed=i)
        if i == 5:
            turns.give_to(optimizer, params)
        if i == 15:
            turns = AdamState.take_from(optimizer, params)
        if 5 <= i < 15:
            out = ops.autoencode(x, params, clip=2.0, feature_weight=params.W_dec.norm(dim=1))
            optimizer.zero_grad()
            ((out.x_hat - x).square().sum(1).mean() + 0.5 * out.l1.mean()).backward()
            optimizer.step()
        else:
            step(params, turns, x, **arguments)
    assert turns.step == adam.step == 20
    for name, tensor in state(straight, adam).items():
        torch.testing.assert_close(
            state(params, turns)[name].detach(), tensor, rtol=1e-8, atol=1e-11, msg=name
        )
