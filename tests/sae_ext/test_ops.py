"""The compiled kernels through their public face, against the reference in float64."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_weights import batch, copied, dense, made_up, state

from sae_ext import native, ops, reference
from sae_ext.errors import UserError
from sae_ext.ops import AdamState, Parameters, SparseCode, Step

compiled = pytest.mark.skipif(native.MISSING is not None, reason="the kernels are not built")
BACKENDS = [pytest.param("cpu", marks=compiled), "reference"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of rows, and arrays that are too short at first."""
    monkeypatch.setattr(native, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(native, "_FIRST_L0", 1)


@pytest.fixture
def threads():
    """Sets torch's threads, and puts the number back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_near(got: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    # Sums of activations near 1000 that cancel lose three digits more than the parameters show.
    error = (got - expected).norm().item()
    assert error <= 1e-11 * (1 + expected.norm().item()), f"{name} is off by {error:g}"


sizes = st.sampled_from([1, 2, 3, 7, 16, 31, 64, 65, 97, 130])
# From no active entry, over a few and half of them, to all.
biases = st.sampled_from([-1e3, -1.5, 0.0, 1e3])


@compiled
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.sampled_from([1, 2, 5, 33, 97]),
    d_in=sizes,
    d_sae=sizes,
    bias=biases,
    clip=st.sampled_from([None, 1e-3, 0.8]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_steps_in_float64_equal_the_reference(
    small_chunks, rows, d_in, d_sae, bias, clip, weighted, seed
):
    params = made_up(d_in, d_sae, bias=bias, seed=seed)
    params.b_enc[0] = 0.5  # one feature fires whatever the others do
    ours, theirs = copied(params), copied(params)
    adam, adam_theirs = AdamState.zeros(ours), AdamState.zeros(theirs)
    cpu, oracle = Step("cpu"), Step("reference")
    for i in range(3):
        x = batch(rows, d_in, seed=seed + i)
        # eps well above rounding: where a gradient is all rounding, Adam would amplify it.
        arguments = {"l1": 0.7, "lr": 0.01, "clip": clip, "eps": 1e-2}
        if weighted:
            arguments |= {"recon_weight": x[:, 0].abs(), "l1_weight": x[:, -1].abs()}
        got, expected = cpu(ours, adam, x, **arguments), oracle(theirs, adam_theirs, x, **arguments)
        assert got.squared_error == pytest.approx(expected.squared_error, rel=1e-12)
        assert got.l1 == pytest.approx(expected.l1, rel=1e-12)
        assert (got.nnz, got.saturated) == (expected.nnz, expected.saturated)
        assert torch.equal(got.fired, expected.fired)
        assert adam.step == adam_theirs.step == i + 1
        for name, tensor in state(theirs, adam_theirs).items():
            assert_near(state(ours, adam)[name], tensor, name)


@compiled
def test_fifty_steps_with_adams_own_eps_stay_with_the_reference():
    params = made_up(24, 96, bias=-2.0)
    ours, theirs = copied(params), copied(params)
    adam, adam_theirs = AdamState.zeros(ours), AdamState.zeros(theirs)
    cpu, oracle = Step("cpu"), Step("reference")
    silent = 0
    for i in range(50):
        x = batch(64, 24, seed=i)
        fired = cpu(ours, adam, x, l1=1.0, lr=1e-3).fired
        oracle(theirs, adam_theirs, x, l1=1.0, lr=1e-3)
        silent += int((fired == 0).sum())
    assert silent > 0, "no feature ever rested, so none moved by momentum alone"
    for name, expected in theirs.tensors().items():
        torch.testing.assert_close(ours.tensors()[name], expected, rtol=1e-9, atol=1e-10)


@compiled
@pytest.mark.parametrize(
    ("rows", "d_in", "d_sae", "bias"),
    [(512, 96, 512, -1.2), (300, 33, 257, 0.0), (64, 130, 64, 1e1), (1, 7, 1000, -0.5)],
    ids=["sparse", "half", "all active", "one row"],
)
def test_float32_errs_at_most_twice_as_much_as_pytorch_does(rows, d_in, d_sae, bias):
    exact, x = copied(made_up(d_in, d_sae, bias=bias), torch.float32), batch(rows, d_in).float()
    # The same float32 numbers in all three; only the arithmetic differs.
    runs = {}
    for name, dtype in (
        ("cpu", torch.float32),
        ("reference", torch.float32),
        ("oracle", torch.float64),
    ):
        params = copied(exact, dtype)
        adam = AdamState.zeros(params)
        # With lr = 0, ten times the first moment is the gradient.
        result = Step("cpu" if name == "cpu" else "reference")(
            params, adam, x.to(dtype), l1=1.0, lr=0.0
        )
        code = (
            ops.encode(x.to(dtype), params)
            if name == "cpu"
            else reference.encode(x.to(dtype), params)
        )
        runs[name] = {
            **adam.m.tensors(),
            "code": dense(code, d_sae),
            "squared_error": torch.tensor([result.squared_error], dtype=torch.float64),
            "l1": torch.tensor([result.l1], dtype=torch.float64),
        }
    for name, expected in runs["oracle"].items():
        scale = expected.double().norm()
        ours = (runs["cpu"][name].double() - expected).norm() / scale
        theirs = (runs["reference"][name].double() - expected).norm() / scale
        # A sum that PyTorch happens to get exactly right is no measure: half an ulp is allowed.
        assert ours <= 2 * theirs + 2**-24, f"{name}: {ours:g} against PyTorch's {theirs:g}"


@compiled
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.sampled_from([1, 40, 97]), d_in=sizes, d_sae=sizes, bias=biases)
def test_encode_lists_exactly_the_positive_entries_and_decode_adds_them_up(
    small_chunks, rows, d_in, d_sae, bias
):
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_at_the_edges_of_the_clip(backend):
    c = 1.0
    eye = torch.eye(7, dtype=torch.float64)
    params = Parameters(
        eye.clone(), *(t.clone() for t in (torch.zeros(7).double(), eye, torch.zeros(7).double()))
    )
    tiny = torch.finfo(torch.float64).tiny
    x = torch.tensor([[0.0, -0.0, -1.0, tiny, c, c + 2**-50, 3.0]], dtype=torch.float64)
    adam = AdamState.zeros(params)
    seen = Step(backend)(params, adam, x, l1=1.0, lr=0.0, clip=c, beta1=0.0)
    assert seen.fired.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert seen.saturated == 2
    # Exact reconstruction leaves the penalty's 1 where the gradient passes, up to c itself.
    assert adam.m.b_enc.tolist() == [0, 0, 0, 1, 1, 0, 0]
    code = (ops if backend == "cpu" else reference).encode(x, params, c)
    assert code.col.tolist() == [3, 4, 5, 6]
    assert code.val.tolist() == [tiny, c, c, c]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_surfaces_in_the_loss(backend, bad):
    params, x = made_up(5, 9), batch(4, 5)
    x[2, 3] = bad
    seen = Step(backend)(params, AdamState.zeros(params), x, l1=1.0, lr=1e-3)
    assert not seen.squared_error < float("inf")


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_bitwise_equal_for_any_number_of_threads_and_run_to_run(threads, dtype):
    outcomes = []
    for count in (1, 2, 4, 4):
        threads(count)
        params = copied(made_up(48, 200, bias=-0.5), dtype)
        adam, step = AdamState.zeros(params), Step("cpu")
        sums = []
        for i in range(3):
            x = batch(301, 48, seed=i).to(dtype)
            seen = step(params, adam, x, l1=1.0, lr=1e-3, clip=1.5)
            sums.append((seen.squared_error, seen.l1, seen.nnz, seen.saturated))
        outcomes.append((sums, state(params, adam)))
    for sums, tensors in outcomes[1:]:
        assert sums == outcomes[0][0]
        for name, tensor in tensors.items():
            assert torch.equal(tensor, outcomes[0][1][name]), name


@compiled
def test_one_step_object_serves_batches_of_any_size_and_dtype():
    step = Step("cpu")
    for rows, dtype in (
        (8, torch.float32),
        (90, torch.float64),
        (3, torch.float64),
        (90, torch.float32),
    ):
        params = copied(made_up(6, 20), dtype)
        fresh = copied(params, dtype)
        seen = step(params, AdamState.zeros(params), batch(rows, 6), l1=1.0, lr=0.1)
        alone = Step("cpu")(fresh, AdamState.zeros(fresh), batch(rows, 6), l1=1.0, lr=0.1)
        assert seen[:4] == alone[:4]
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


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.double,
        lambda x: x.T.contiguous().T,
        lambda x: x[:1].expand(40, -1),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["half", "bfloat16", "double", "transposed", "expanded", "with gradient"],
)
def test_rows_of_any_float_dtype_and_layout_are_read_as_the_values_they_hold(convert):
    params = copied(made_up(6, 20), torch.float32)
    x = convert(batch(40, 6).float())
    plain = x.detach().float().contiguous()
    for got, expected in zip(ops.encode(x, params), ops.encode(plain, params), strict=True):
        assert torch.equal(got, expected)
    other = copied(params, torch.float32)
    seen = Step()(params, AdamState.zeros(params), x, l1=1.0, lr=0.1)
    assert seen[:4] == Step()(other, AdamState.zeros(other), plain, l1=1.0, lr=0.1)[:4]
    assert torch.equal(params.W_dec, other.W_dec)


def test_no_rows_give_an_empty_code_and_no_reconstruction():
    params = made_up(6, 20)
    code = ops.encode(batch(0, 6), params)
    assert (code.row_ptr.tolist(), len(code.col), len(code.val)) == ([0], 0, 0)
    assert ops.decode(code, params).shape == (0, 6)


def broken(**changes: torch.Tensor) -> Parameters:
    return Parameters(**{**made_up(6, 20).tensors(), **changes})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": batch(4, 7)}, r"x must be \[rows, 6\]"),
        ({"x": batch(4, 6)[0]}, "x must be"),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, "x must be floating point"),
        ({"x": batch(0, 6)}, "x has no rows"),
        ({"params": broken(b_enc=torch.zeros(19).double())}, "b_enc has shape"),
        ({"params": broken(b_dec=torch.zeros(6))}, "b_dec is torch.float32"),
        ({"params": broken(W_enc_rows=batch(6, 20).T)}, "W_enc_rows is not contiguous"),
        ({"params": copied(made_up(6, 20), torch.float16)}, "W_dec must be float32 or float64"),
        ({"adam": AdamState.zeros(made_up(6, 19))}, r"adam\.m\.W_enc_rows has shape"),
        ({"l1": -1.0}, "l1 must be 0 or more"),
        ({"lr": float("nan")}, "lr must be 0 or more"),
        ({"beta1": 1.0}, "beta1 must lie in"),
        ({"eps": -1e-8}, "eps must be"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"recon_weight": torch.ones(3)}, r"recon_weight must be \[4\]"),
        ({"l1_weight": torch.tensor([1.0, 1.0, -0.5, 1.0])}, "l1_weight must be 0 or more"),
        ({"recon_weight": torch.tensor([1.0, float("nan"), 1, 1])}, "recon_weight must be 0"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_argument_is_named_and_nothing_changes(backend, arguments, message):
    params = arguments.get("params", made_up(6, 20))
    defaults = {
        "params": params,
        "adam": AdamState.zeros(params),
        "x": batch(4, 6),
        "l1": 1.0,
        "lr": 0.1,
    }
    given_arguments = {**defaults, **arguments}
    adam = given_arguments["adam"]
    before = copy.deepcopy(state(params, adam))
    with pytest.raises(UserError, match=message):
        Step(backend)(**given_arguments)
    assert adam.step == 0
    assert all(torch.equal(t, before[name]) for name, t in state(params, adam).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_ptr": torch.tensor([0, 1, 3])}, "row_ptr must rise"),
        ({"row_ptr": torch.tensor([0, 3, 2])}, "row_ptr must rise"),
        ({"row_ptr": torch.tensor([0, 1, 2], dtype=torch.int32)}, "row_ptr int64"),
        ({"col": torch.tensor([0, 20], dtype=torch.int32)}, r"col must lie in \[0, 20\)"),
        ({"col": torch.tensor([-1, 2], dtype=torch.int32)}, "col must lie in"),
        ({"val": torch.ones(3).double()}, r"val \[nnz\]"),
    ],
)
def test_decode_refuses_a_code_that_points_outside(change, message):
    code = SparseCode(
        torch.tensor([0, 1, 2]), torch.tensor([4, 5], dtype=torch.int32), torch.ones(2).double()
    )
    assert ops.decode(code, made_up(6, 20)).shape == (2, 6)
    with pytest.raises(UserError, match=message):
        ops.decode(code._replace(**change), made_up(6, 20))


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="backend must be auto, cpu or reference"):
        Step("gpu")  # type: ignore[arg-type]


def test_the_description_says_what_runs_and_why():
    seen = ops.describe()
    assert seen["implementation"] == ops.implementation()
    assert (seen["fallback_reason"] is None) == seen["implementation"].startswith("cpu-")
    assert seen["threads"] == torch.get_num_threads()
    assert (seen["cuda"]["reason"] is None) == bool(seen["cuda"]["devices"])


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            "PATH": "/usr/bin:/bin",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


AGAINST_REFERENCE = """
import torch
from made_up_weights import batch, copied, made_up, state
from sae_ext.ops import AdamState, Step, implementation
worst = 0.0
for dtype, bias in ((torch.float32, -0.5), (torch.float64, -0.5), (torch.float64, 50.0)):
    sides = []
    for backend in ("cpu", "reference"):
        params = copied(made_up(37, 131, bias=bias), dtype)
        adam, step = AdamState.zeros(params), Step(backend)
        for i in range(3):
            step(params, adam, batch(50, 37, seed=i), l1=1.0, lr=1e-2, clip=60.0, eps=1e-3)
        sides.append(state(params, adam))
    unit = torch.finfo(dtype).eps
    for name, expected in sides[1].items():
        worst = max(worst, float((sides[0][name] - expected).norm() / expected.norm() / unit))
print(implementation(), worst)
"""


def processor_has(isa: str) -> bool:
    flags = {"portable": "", "avx2": " avx2 ", "avx512": " avx512bw "}[isa]
    info = Path("/proc/cpuinfo")
    return isa == "portable" or (info.exists() and flags in info.read_text())


@compiled
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_each_instruction_set_equals_the_reference(isa):
    if not processor_has(isa):
        pytest.skip(f"this processor has no {isa}")
    done = python(AGAINST_REFERENCE, SPARSEMILL_ISA=isa)
    assert done.returncode == 0, done.stderr
    implementation, worst = done.stdout.split()
    assert implementation == f"cpu-{isa}"
    assert float(worst) < 100, f"{worst} units of rounding from the reference"


@compiled
def test_an_instruction_set_that_cannot_run_is_named():
    done = python(
        "import sae_ext.ops as o\n"
        "try: o.implementation()\n"
        "except o.UserError as error: print(error)\n",
        SPARSEMILL_ISA="sse9",
    )
    assert "SPARSEMILL_ISA" in done.stdout, done.stderr
    assert "portable, avx2 or avx512" in done.stdout


def test_without_the_compiled_module_one_warning_names_the_remedy_and_the_reference_runs():
    done = python(
        "import sys\n"
        "sys.modules['sae_ext._C'] = None\n"
        "import sae_ext.ops as o, importlib\n"
        "from made_up_weights import batch, made_up\n"
        "p = made_up(6, 20)\n"
        "o.Step()(p, o.AdamState.zeros(p), batch(4, 6), l1=1.0, lr=0.1)\n"
        "o.encode(batch(4, 6), p)\n"
        "print(o.implementation(), bool(o.describe()['fallback_reason']))\n"
        "try: o.Step('cpu')\n"
        "except o.UserError as error: print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "reference True"
    assert "make setup" in second
    assert done.stderr.count("make setup") == 1
    assert "C++ compiler" in done.stderr
