"""Wrong arguments of the kernels' face: each is named, with the remedy, before anything changes."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from made_up_weights import batch, copied, leaves, made_up, state
from torch import Tensor

from sae_ext import native, ops
from sae_ext.errors import Diverged, UserError
from sae_ext.ops import AdamState, Parameters, SparseCode, Step, Support

compiled = pytest.mark.skipif(native.MISSING is not None, reason="the kernels are not built")
BACKENDS = [pytest.param("cpu", marks=compiled), "reference"]
ROWS, D_IN, D_SAE = 4, 6, 20
NAMES = ("W_enc_rows", "b_enc", "W_dec", "b_dec")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(native, "MISSING", "left out")
    return str(request.param)


def call(face: str, backend: str, arguments: dict[str, Any]) -> Any:
    """One of the functions, with right arguments but for those given."""
    params = arguments.get("params", made_up(D_IN, D_SAE))
    arguments = {"params": params, "x": batch(ROWS, D_IN), **arguments}
    if face == "step":
        step = {"adam": AdamState.zeros(params), "l1": 1.0, "lr": 0.1}
        return Step(backend)(**{**step, **arguments})  # type: ignore[arg-type]
    return {"encode": ops.encode, "autoencode": ops.autoencode}[face](**arguments)


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Comparable even where a number is NaN."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    kept = {name: t for name, t in tensors.items() if t.device.type == "cpu"}
    return {name: t.clone().view(whole[t.itemsize]) for name, t in kept.items()}


def refused(face: str, backend: str, arguments: dict[str, Any], message: str) -> None:
    params = arguments.get("params", made_up(D_IN, D_SAE))
    adam = arguments.get("adam", AdamState.zeros(params))
    before, step = bits(state(params, adam)), adam.step
    given = {**arguments, "params": params, **({"adam": adam} if face == "step" else {})}
    with pytest.raises(UserError, match=message):
        call(face, backend, given)
    assert adam.step == step
    for name, tensor in bits(state(params, adam)).items():
        assert torch.equal(tensor, before[name]), name


FACES = ("step", "encode", "autoencode")
CALLED = pytest.mark.parametrize("face", FACES)


def test_the_right_arguments_are_accepted(backend):
    for face in FACES:
        call(face, backend, {})


@CALLED
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (batch(ROWS, D_IN + 1), rf"x must be \[rows, {D_IN}\], got shape \[{ROWS}, {D_IN + 1}\]"),
        (batch(ROWS, D_IN)[0], "x must be"),
        (batch(ROWS, D_IN)[None], "x must be"),
        (torch.ones(ROWS, D_IN, dtype=torch.int64), r"x must be floating point.*x\.float\(\)"),
        (torch.ones(ROWS, D_IN, dtype=torch.bool), "x must be floating point"),
        (torch.ones(ROWS, D_IN, dtype=torch.complex64), "x must be floating point"),
        (batch(ROWS, D_IN).to("meta"), "x is on meta but the parameters are on cpu"),
        (batch(ROWS, D_IN).numpy(), "x must be a torch tensor, got ndarray"),
        (batch(ROWS, D_IN).tolist(), "x must be a torch tensor, got list"),
    ],
)
def test_a_wrong_batch_is_named(backend, face, x, message):
    refused(face, backend, {"x": x}, message)


@pytest.mark.parametrize("face", ["step", "autoencode"])
def test_a_batch_without_rows_is_refused(backend, face):
    refused(face, backend, {"x": batch(0, D_IN)}, "x has no rows")


CHANGES = {
    "shape": (lambda t: t[1:].contiguous(), "has shape"),
    "layout": (
        lambda t: torch.stack([t, t], -1)[..., 0],
        r"is not contiguous: pass \w+.contiguous",
    ),
    "device": (lambda t: t.to("meta"), "on meta"),
    "float32": (lambda t: t.float(), "float32"),
    "half": (lambda t: t.half(), "float16"),
}


@CALLED
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_that_does_not_fit_is_named(backend, face, name, change):
    make, message = CHANGES[change]
    tensors = made_up(D_IN, D_SAE).tensors()
    params = Parameters(**{**tensors, name: make(tensors[name])})
    # W_dec sets the measure: where it is the odd one, others are said to differ from it.
    message = rf"{name}.*{message}|{message}.*W_dec" if name == "W_dec" else rf"{name} .*{message}"
    adam = AdamState.zeros(made_up(D_IN, D_SAE))
    refused(
        face, backend, {"params": params, **({"adam": adam} if face == "step" else {})}, message
    )


@CALLED
@pytest.mark.parametrize(
    ("W_dec", "message"),
    [
        (torch.zeros(D_SAE).double(), r"W_dec must be \[d_sae, d_in\], got shape"),
        (torch.zeros(0, D_IN).double(), r"W_dec must be \[d_sae, d_in\]"),
        (torch.zeros(D_SAE, D_IN).half(), "W_dec must be float32 or float64, got torch.float16"),
        (torch.zeros(D_SAE, D_IN).bfloat16(), "W_dec must be float32 or float64"),
    ],
)
def test_a_decoder_that_is_no_matrix_of_floats_is_refused(backend, face, W_dec, message):
    params = Parameters(**{**made_up(D_IN, D_SAE).tensors(), "W_dec": W_dec})
    adam = AdamState.zeros(made_up(D_IN, D_SAE))
    refused(
        face, backend, {"params": params, **({"adam": adam} if face == "step" else {})}, message
    )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", ["m", "v"])
def test_a_moment_that_does_not_fit_is_named(backend, moment, name, change):
    make, message = CHANGES[change]
    adam = AdamState.zeros(made_up(D_IN, D_SAE))
    group = getattr(adam, moment)
    setattr(group, name, make(getattr(group, name)))
    refused("step", backend, {"adam": adam}, rf"adam\.{moment}\.{name} .*{message}")


def all_of_them(params: Parameters, adam: AdamState) -> dict[str, tuple[Parameters, str]]:
    groups = {"": params, "adam.m.": adam.m, "adam.v.": adam.v}
    return {k + name: (group, name) for k, group in groups.items() for name in NAMES}


TWELVE = list(all_of_them(made_up(1, 1), AdamState.zeros(made_up(1, 1))))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pair
        for pair in itertools.combinations(TWELVE, 2)
        if pair[0].split(".")[-1].replace("W_enc_rows", "W_dec")
        == pair[1].split(".")[-1].replace("W_enc_rows", "W_dec")
    ],
)
def test_two_tensors_that_are_the_same_memory_are_both_named(backend, first, second):
    params = made_up(D_IN, D_SAE)
    adam = AdamState.zeros(params)
    (group, name), (other, other_name) = (all_of_them(params, adam)[k] for k in (first, second))
    setattr(group, name, getattr(other, other_name))
    refused(
        "step", backend, {"params": params, "adam": adam},
        rf"({first} and {second}|{second} and {first}) share memory: give each its own",
    )  # fmt: skip


def test_tensors_may_lie_side_by_side_in_one_storage_but_not_overlap(backend):
    for overlap in (0, 1):
        params = made_up(D_IN, D_SAE)
        adam, n = AdamState.zeros(params), D_IN * D_SAE
        flat = torch.zeros(2 * n, dtype=torch.float64)
        adam.m.W_dec = flat[:n].view(D_SAE, D_IN)
        adam.v.W_dec = flat[n - overlap : 2 * n - overlap].view(D_SAE, D_IN)
        if overlap:
            message = r"adam\.m\.W_dec and adam\.v\.W_dec share memory.*clone"
            refused("step", backend, {"params": params, "adam": adam}, message)
        else:
            call("step", backend, {"params": params, "adam": adam})


@pytest.mark.parametrize("optimizer_of", [torch.optim.SGD, torch.optim.Adamax, torch.optim.NAdam])
def test_an_optimizer_that_is_no_adam_is_neither_given_a_state_nor_read(optimizer_of):
    params = leaves(made_up(D_IN, D_SAE))
    optimizer = optimizer_of(params.tensors().values(), lr=0.1)
    message = f"must be a torch.optim.Adam or AdamW, got {optimizer_of.__name__}"
    with pytest.raises(UserError, match=message):
        AdamState.zeros(params).give_to(optimizer, params)
    assert not optimizer.state
    for tensor in params.tensors().values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    with pytest.raises(UserError, match=message):
        AdamState.take_from(optimizer, params)


def test_a_negative_number_of_steps_is_refused(backend):
    adam = AdamState.zeros(made_up(D_IN, D_SAE))
    adam.step = -1
    refused("step", backend, {"adam": adam}, r"adam\.step must be 0 or more, got -1")


@CALLED
@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_clip_that_is_not_positive_is_refused(backend, face, clip):
    refused(
        face, backend, {"clip": clip},
        rf"clip must be positive in torch\.float64, or None for no bound, got {clip}",
    )  # fmt: skip


@CALLED
def test_a_clip_that_the_parameters_dtype_rounds_to_nothing_is_refused(backend, face):
    params = copied(made_up(D_IN, D_SAE), torch.float32)
    refused(face, backend, {"params": params, "clip": 1e-50}, r"clip must be positive in .*float32")
    call(face, backend, {"clip": 1e-50})  # float64 holds it


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            (name, value, f"{name} must be 0 or more and finite, got")
            for name in ("l1", "lr", "eps", "weight_decay")
            for value in (-1e-9, math.nan, math.inf)
        ),
        *(
            (name, value, rf"{name} must lie in \[0, 1\)")
            for name in ("beta1", "beta2")
            for value in (-0.1, 1.0, math.nan)
        ),
        *(
            ("max_grad_norm", value, "max_grad_norm must be positive")
            for value in (0.0, -1.0, math.nan)
        ),
        ("decoder_norm", "none", "decoder_norm must be unit or free, got 'none'"),
        ("decoder_norm", None, "decoder_norm must be unit or free"),
        *(
            (name, value, rf"^{name} must be a number, got {type(value).__name__}")
            for name in ("l1", "lr", "eps", "weight_decay", "beta1", "beta2", "max_grad_norm")
            for value in (
                torch.tensor(1.0),
                "6",
                [1.0],
                *([] if name == "max_grad_norm" else [None]),
            )
        ),
    ],
)
def test_a_setting_out_of_range_is_named(backend, name, value, message):
    refused("step", backend, {name: value}, message)


@CALLED
@pytest.mark.parametrize("clip", [torch.tensor(6.0), "6", [6.0]], ids=["tensor", "text", "list"])
def test_a_clip_that_is_no_number_is_refused(backend, face, clip):
    refused(face, backend, {"clip": clip}, f"^clip must be a number, got {type(clip).__name__}")


@pytest.mark.parametrize("number", [1, True, np.float64(1.0)])
def test_whole_numbers_are_numbers(backend, number):
    call("step", backend, dict.fromkeys(("l1", "lr", "clip", "max_grad_norm"), number))


@pytest.mark.parametrize(
    "change",
    ["long", "short", "matrix", "integers", "list", "numpy", "device", "-0.5", "nan", "inf"],
)
@pytest.mark.parametrize("name", ["recon_weight", "l1_weight", "feature_weight"])
def test_a_weight_that_is_no_weight_is_named(backend, name, change):
    length = D_SAE if name == "feature_weight" else ROWS
    weight, message = torch.ones(length), rf"{name} must be \[\w+ = {length}\], got shape"
    if change in ("long", "short"):
        weight = torch.ones(length + (1 if change == "long" else -1))
    elif change == "matrix":
        weight = weight[None]
    elif change == "integers":
        weight = weight.int()
        message = f"{name} must be a floating-point tensor, got torch.int32: convert it"
    elif change in ("list", "numpy"):
        weight = weight.tolist() if change == "list" else weight.numpy()
        message = rf"{name} must be a floating-point tensor, got (list|ndarray): convert it"
    elif change == "device":
        weight, message = weight.to("meta"), f"{name} is on meta, but the parameters are on cpu"
    else:
        weight[2] = float(change)
        message = rf"{name} must be 0 or more and finite everywhere, but {name}\[2\] is {change}"
    refused("step", backend, {name: weight}, message)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(D_SAE + 1).double(), rf"feature_weight must be \[d_sae = {D_SAE}\]"),
        (torch.ones(1, D_SAE).double(), "feature_weight must be"),
        (
            torch.ones(D_SAE).int(),
            "feature_weight must be a floating-point tensor, got torch.int32",
        ),
        ([1.0] * D_SAE, "feature_weight must be a floating-point tensor, got list"),
        (torch.ones(D_SAE).to("meta"), "feature_weight is on meta, but the parameters are on cpu"),
    ],
)
def test_a_feature_weight_of_autoencode_that_is_no_vector_of_floats_is_named(
    backend, weight, message
):
    refused("autoencode", backend, {"feature_weight": weight}, message)


def index(row_ptr: list[int], col: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(row_ptr), torch.tensor(col, dtype=torch.int32)


WRONG_PLACES = {
    "row_ptr ends early": (index([0, 1, 1, 1, 1], [1, 2]), "row_ptr must rise from 0 to .* 2"),
    "row_ptr ends late": (index([0, 1, 2, 2, 3], [1, 2]), "row_ptr must rise"),
    "row_ptr begins late": (index([1, 1, 2, 2, 2], [1, 2]), "row_ptr must rise"),
    "row_ptr falls": (index([0, 2, 1, 2, 2], [1, 2]), "row_ptr must rise"),
    "row_ptr negative": (index([0, -1, 1, 2, 2], [1, 2]), "row_ptr must rise"),
    "col beyond d_sae": (index([0, 1, 2, 2, 2], [1, D_SAE]), rf"col must lie in \[0, {D_SAE}\)"),
    "col below 0": (index([0, 1, 2, 2, 2], [-1, 2]), "col must lie in"),
    "unsorted": (index([0, 1, 1, 4, 4], [9, 3, 2, 7]), "ascend within each row.* row 2 at entry 2"),
    "repeated": (index([0, 0, 0, 0, 3], [0, 3, 3]), "ascend within each row.* row 3 at entry 2"),
}  # fmt: skip
WRONG_FORMS = {
    "row_ptr of 32 bits": (
        (index([0, 1, 2, 2, 2], [])[0].int(), index([], [1, 2])[1]),
        "row_ptr int64",
    ),
    "col of 64 bits": ((torch.tensor([0, 1, 2, 2, 2]), torch.tensor([1, 2])), "col int32"),
    "col a matrix": ((torch.tensor([0, 1, 2, 2, 2]), torch.ones(1, 2).int()), r"col \[n\]"),
    "row_ptr elsewhere": (
        tuple(t.to("meta") for t in index([0, 1, 2, 2, 2], [1, 2])),
        "on one device",
    ),
}
ONLY_SUPPORTS = {
    "too few rows": (index([0, 1, 2, 2], [1, 2]), rf"row_ptr \[{ROWS + 1}\]"),
    "too many rows": (index([0, 1, 2, 2, 2, 2], [1, 2]), rf"row_ptr \[{ROWS + 1}\]"),
}


@pytest.mark.parametrize("face", ["step", "autoencode"])
@pytest.mark.parametrize("case", [*WRONG_PLACES, *WRONG_FORMS, *ONLY_SUPPORTS])
def test_a_support_that_points_outside_or_has_the_wrong_form_is_named(backend, face, case):
    pair, message = {**WRONG_PLACES, **WRONG_FORMS, **ONLY_SUPPORTS}[case]
    refused(face, backend, {"support": Support(*pair)}, f"support.*{message}")


@pytest.mark.parametrize("face", ["step", "autoencode"])
def test_columns_may_fall_from_one_row_to_the_next(backend, face):
    call(face, backend, {"support": Support(*index([0, 0, 2, 2, 4], [7, 19, 0, 3]))})


def test_columns_of_a_decoded_code_may_fall_from_one_row_to_the_next(backend):
    code = SparseCode(*index([0, 0, 2, 2, 4], [7, 19, 0, 3]), torch.ones(4).double())
    assert ops.decode(code, made_up(D_IN, D_SAE)).shape == (4, D_IN)


@pytest.mark.parametrize("case", [*WRONG_PLACES, *WRONG_FORMS])
def test_decode_refuses_a_code_that_points_outside_or_has_the_wrong_form(backend, case):
    (row_ptr, col), message = {**WRONG_PLACES, **WRONG_FORMS}[case]
    code = SparseCode(row_ptr, col, torch.ones_like(col, dtype=torch.float64))
    with pytest.raises(UserError, match=f"code.*{message}"):
        ops.decode(code, made_up(D_IN, D_SAE))


@pytest.mark.parametrize(
    "val",
    [
        torch.ones(3).double(), torch.ones(1, 2).double(), torch.ones(2, dtype=torch.int64),
        torch.ones(2).double().to("meta"),
    ],
)  # fmt: skip
def test_decode_refuses_values_that_do_not_fit_the_columns(backend, val):
    with pytest.raises(UserError, match=r"code\.val must be floating point \[2\] on cpu"):
        ops.decode(SparseCode(*index([0, 1, 2], [1, 2]), val), made_up(D_IN, D_SAE))


@pytest.mark.parametrize("name", NAMES)
def test_decode_names_a_parameter_that_does_not_fit(backend, name):
    tensors = made_up(D_IN, D_SAE).tensors()
    params = Parameters(**{**tensors, name: torch.stack([tensors[name]] * 2, -1)[..., 0]})
    code = SparseCode(*index([0, 1, 2], [1, 2]), torch.ones(2).double())
    with pytest.raises(UserError, match=f"{name} is not contiguous"):
        ops.decode(code, params)


# ---- Parameters that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("bias", [-1.0, 9.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_that_is_not_finite_is_named_and_nothing_moves(backend, name, bad, dtype, bias):
    params = copied(made_up(D_IN, D_SAE, bias=bias), dtype)
    params.b_enc[3] = 9.0  # an active feature: what a silent one holds does not show
    tensor = params.tensors()[name]
    tensor.view(len(tensor), -1)[3] = bad
    adam = AdamState.zeros(params)
    Step(backend)(copied(made_up(D_IN, D_SAE), dtype), adam, batch(ROWS, D_IN), l1=1.0, lr=0.1)
    before, given = bits(state(params, adam)), batch(ROWS, D_IN).abs()
    with pytest.raises(Diverged, match=rf"^{name} holds a NaN or an infinity.*lower lr"):
        Step(backend)(params, adam, given, l1=1.0, lr=0.1)
    assert adam.step == 1
    for key, tensor in bits(state(params, adam)).items():
        assert torch.equal(tensor, before[key]), key


# ---- Backends --------------------------------------------------------------------------------------


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="backend must be auto, cpu, cuda or reference, got 'gpu'"):
        Step("gpu")  # type: ignore[arg-type]


def test_the_cpu_backend_says_why_it_cannot_be_had(monkeypatch):
    monkeypatch.setattr(native, "MISSING", "no such module")
    with pytest.raises(UserError, match=r"not built .no such module.*make setup"):
        Step("cpu")


@compiled
def test_the_cpu_backend_says_that_it_cannot_read_another_device():
    params = Parameters(**{k: t.to("meta") for k, t in made_up(D_IN, D_SAE).tensors().items()})
    with pytest.raises(UserError, match="x is on meta, which backend 'cpu' cannot read"):
        Step("cpu")(params, AdamState.zeros(params), batch(ROWS, D_IN).to("meta"), l1=1.0, lr=0.1)


def test_the_state_of_a_refused_call_can_be_used_again(backend):
    params, fresh = made_up(D_IN, D_SAE), made_up(D_IN, D_SAE)
    adam, step = AdamState.zeros(params), Step(backend)
    with pytest.raises(UserError):
        step(params, adam, batch(ROWS, D_IN), l1=math.nan, lr=0.1)
    broken = copy.deepcopy(params)
    broken.b_dec[0] = math.nan
    with pytest.raises(Diverged):
        step(broken, adam, batch(ROWS, D_IN), l1=1.0, lr=0.1)
    ends = []
    for group, moments, own in (
        (params, adam, step),
        (fresh, AdamState.zeros(fresh), Step(backend)),
    ):
        own(group, moments, batch(ROWS, D_IN), l1=1.0, lr=0.1)
        ends.append(group.W_dec)
    assert torch.equal(*ends)
