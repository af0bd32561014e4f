"""The C functions one by one, on memory laid out here: edges, guard zones, errors, determinism."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("sae_ext._C", reason="the kernels are not built")

HEADER = Path(__file__).parents[2] / "csrc" / "saek.h"
GUARD = 16
POISON = {torch.float32: math.nan, torch.float64: math.nan, torch.int32: -77, torch.int64: -77}
DTYPES = {torch.float32: _C.FLOAT32, torch.float64: _C.FLOAT64}


class Guarded:
    """A poisoned array between two guard zones."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        size = math.prod(shape)
        self.flat = torch.full((size + 2 * GUARD,), POISON[dtype], dtype=dtype)
        self.inside = self.flat[GUARD : GUARD + size].view(shape)

    def pointer(self) -> int:
        return self.inside.data_ptr()

    def checked(self) -> Tensor:
        """The array, once the zones are found untouched."""
        for zone in (self.flat[:GUARD], self.flat[-GUARD:]):
            assert bool((zone.isnan() if zone.is_floating_point() else zone == -77).all())
        return self.inside


def compact(
    pre: Tensor,
    bias: Tensor,
    *,
    clip: float = math.inf,
    capacity: int | None = None,
    threads: int = 2,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """row_ptr, col, val and (needed, saturated); arrays exactly `capacity` long, or as needed."""
    rows, d_sae = pre.shape
    if capacity is None:
        capacity = int((~(pre + bias <= 0)).sum())
    mask = Guarded((rows, (d_sae + 63) // 64), torch.int64)
    row_ptr = Guarded((rows + 1,), torch.int64)
    row_ptr.inside[0] = 0
    col, val = Guarded((capacity,), torch.int32), Guarded((capacity,), pre.dtype)
    counts = _C.compact(
        dtype=DTYPES[pre.dtype], pre=pre.data_ptr(), b_enc=bias.data_ptr(), clip=clip, rows=rows,
        d_sae=d_sae, capacity=capacity, threads=threads, mask=mask.pointer(),
        row_ptr=row_ptr.pointer(), col=col.pointer(), val=val.pointer(),
    )  # fmt: skip
    mask.checked()
    return row_ptr.checked(), col.checked(), val.checked(), counts


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_sae", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("shift", [-9.0, -1.0, 9.0])
def test_compaction_lists_each_positive_entry_once_in_order(dtype, d_sae, shift):
    pre, bias = random(13, d_sae, dtype=dtype), random(d_sae, dtype=dtype, seed=1) + shift
    row_ptr, col, val, (needed, saturated) = compact(pre, bias, clip=8.0)
    summed = pre + bias
    rows, columns = (summed > 0).nonzero(as_tuple=True)
    assert col.tolist() == columns.tolist()
    assert row_ptr.diff().tolist() == torch.bincount(rows, minlength=13).tolist()
    assert needed == len(rows)
    assert saturated == int((summed > 8).sum())
    picked = summed[rows, columns]
    assert torch.equal(val, torch.where(picked > 8, -8.0, picked))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [3, 70])  # in a whole word of 64 columns, and in the rest
def test_compaction_at_the_edges_of_zero_and_clip(dtype, column):
    above = math.nextafter(2.0, 3.0) if dtype == torch.float64 else 2.0 + 2**-22
    denormal = torch.finfo(dtype).smallest_normal / 4
    edges = [0.0, -0.0, -denormal, denormal, 2.0, above, math.inf, -math.inf, math.nan]
    pre = torch.full((len(edges), 75), -1.0, dtype=dtype)
    pre[:, column] = torch.tensor(edges, dtype=dtype)
    row_ptr, col, val, (_, saturated) = compact(pre, torch.zeros(75, dtype=dtype), clip=2.0)
    assert row_ptr.diff().tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1]
    assert col.tolist() == [column] * 5
    assert val[:4].tolist() == [denormal, 2.0, -2.0, -2.0]
    assert val[4].isnan()
    assert saturated == 2


def test_compaction_without_a_clip_keeps_infinity_as_it_is():
    pre = torch.tensor([[math.inf, 1.0]], dtype=torch.float64)
    _, _, val, (_, saturated) = compact(pre, torch.zeros(2, dtype=torch.float64))
    assert val.tolist() == [math.inf, 1.0]
    assert saturated == 0


@pytest.mark.parametrize("short", [1, 30])
def test_too_short_arrays_are_reported_and_left_alone(short):
    pre, bias = random(9, 70), torch.zeros(70, dtype=torch.float64)
    total = int((pre > 0).sum())
    _, col, val, (needed, _) = compact(pre, bias, capacity=total - short)
    assert needed == total
    assert bool((col == -77).all())
    assert bool(val.isnan().all())
    _, col, val, (needed, _) = compact(pre, bias, capacity=total)
    assert needed == total
    assert torch.equal(val, pre[pre > 0])


def step_arrays(dtype: torch.dtype, threads: int, rows: int = 41) -> dict[str, Tensor]:
    """Every kernel of a step in turn on one made-up batch; all that they wrote."""
    d_in, d_sae, kind = 70, 150, DTYPES[dtype]
    xc = random(rows, d_in, dtype=dtype)
    value = {
        name: random(*shape, dtype=dtype, seed=i)
        for i, (name, shape) in enumerate(
            {
                "W_enc": (d_sae, d_in),
                "b_enc": (d_sae,),
                "W_dec": (d_sae, d_in),
                "b_dec": (d_in,),
            }.items()
        )
    }
    m = {name: torch.zeros_like(t) for name, t in value.items()}
    v = {name: torch.zeros_like(t) for name, t in value.items()}
    moments = {k: (value[k].data_ptr(), m[k].data_ptr(), v[k].data_ptr()) for k in value}
    pre = random(rows, d_sae, dtype=dtype, seed=9)
    row_ptr, col, val, _ = compact(pre, value["b_enc"].clone(), clip=1.0, threads=threads)
    nnz = len(col)
    code = (row_ptr.data_ptr(), col.data_ptr(), val.data_ptr(), rows)

    out = {
        "decoded": Guarded((rows, d_in), dtype), "partials": Guarded((rows, 2), torch.float64),
        "grad": Guarded((rows, d_in), dtype), "dz": Guarded((nnz,), dtype),
        "counts": Guarded((threads, d_sae), torch.int64),
        "feature_ptr": Guarded((d_sae + 1,), torch.int64), "row": Guarded((nnz,), torch.int32),
        "z": Guarded((nnz,), dtype), "dz_by_feature": Guarded((nnz,), dtype),
        "grad_b_enc": Guarded((d_sae,), dtype), "scratch": Guarded((threads, 2, d_in), dtype),
    }  # fmt: skip
    at = {name: array.pointer() for name, array in out.items()}
    common: dict[str, Any] = {"dtype": kind, "threads": threads}
    _C.decode(
        **common, code=code, W_dec=value["W_dec"].data_ptr(), b_dec=value["b_dec"].data_ptr(),
        d_in=d_in, out=at["decoded"],
    )  # fmt: skip
    sums = _C.residual(
        **common, code=code, W_dec=value["W_dec"].data_ptr(), xc=xc.data_ptr(), recon_weight=0,
        l1_weight=0, recon_scale=2 / rows, l1_scale=1 / rows, d_in=d_in,
        row_partials=at["partials"], grad=at["grad"], dz=at["dz"],
    )  # fmt: skip
    _C.transpose(
        **common, code=code, dz=at["dz"], d_sae=d_sae, counts=at["counts"],
        feature_ptr=at["feature_ptr"], row=at["row"], z=at["z"],
        dz_by_feature=at["dz_by_feature"], grad_b_enc=at["grad_b_enc"],
    )  # fmt: skip
    adam = (0.01, 0.9, 0.999, 1e-8, 1)
    _C.update_b_dec(
        **common, grad=at["grad"], grad_b_enc=at["grad_b_enc"], W_enc=value["W_enc"].data_ptr(),
        rows=rows, d_in=d_in, d_sae=d_sae, adam=adam, b_dec=moments["b_dec"],
    )  # fmt: skip
    _C.update_features(
        **common, feature_ptr=at["feature_ptr"], row=at["row"], z=at["z"],
        dz=at["dz_by_feature"], d_sae=d_sae, grad=at["grad"], xc=xc.data_ptr(),
        grad_b_enc=at["grad_b_enc"], d_in=d_in, adam=adam, scratch=at["scratch"],
        W_enc=moments["W_enc"], b_enc=moments["b_enc"], W_dec=moments["W_dec"],
    )  # fmt: skip
    arrays = {name: array.checked() for name, array in out.items()}
    del arrays["counts"], arrays["scratch"]  # scratch: its shape follows the threads
    arrays |= {"sums": torch.tensor(sums, dtype=torch.float64), "col": col, "val": val}
    for prefix, group in (("", value), ("m.", m), ("v.", v)):
        arrays |= {prefix + name: t for name, t in group.items()}
    return arrays


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_is_written_and_nothing_beside_it(dtype):
    for name, array in step_arrays(dtype, threads=2).items():
        unwritten = array.isnan() if array.is_floating_point() else array == -77
        assert not bool(unwritten.any()), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 41])
def test_every_kernel_is_bitwise_equal_for_any_number_of_threads(dtype, rows):
    alone = step_arrays(dtype, threads=1, rows=rows)
    for threads in (2, 3, 4, 64):
        for name, array in step_arrays(dtype, threads=threads, rows=rows).items():
            assert torch.equal(array, alone[name]), f"{name} with {threads} threads"


def test_by_feature_holds_the_same_entries_with_rows_ascending():
    seen = step_arrays(torch.float64, threads=3)
    col, order = seen["col"].long().sort(stable=True)
    assert torch.equal(seen["z"], seen["val"][order].abs())
    assert torch.equal(seen["dz_by_feature"], seen["dz"][order])
    assert torch.equal(seen["feature_ptr"].diff(), torch.bincount(col, minlength=150))
    sums = torch.zeros(150, dtype=torch.float64).index_add(0, col, seen["dz"][order])
    torch.testing.assert_close(seen["grad_b_enc"], sums, rtol=1e-13, atol=1e-15)
    assert bool((seen["dz"][seen["val"] < 0] == 0).all())
    assert bool((seen["val"] < 0).any())


VALID = {
    "dtype": _C.FLOAT64, "code": (8, 8, 8, 1), "W_dec": 8, "b_dec": 8, "d_in": 1, "threads": 1,
    "out": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": 2}, {"W_dec": 0}, {"out": 0}, {"d_in": 0}, {"threads": 0},
        {"code": (0, 8, 8, 1)}, {"code": (8, 8, 8, 0)}, {"code": (8, 8, 8, 2**31)},
    ],
    ids=str,
)  # fmt: skip
def test_null_pointers_and_impossible_sizes_are_refused_before_anything_is_read(wrong):
    with pytest.raises(ValueError, match="decode: a pointer is null or a size"):
        _C.decode(**{**VALID, **wrong})


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_compaction_refuses_a_clip_that_is_not_positive(clip):
    with pytest.raises(ValueError, match="compact"):
        compact(random(2, 3), torch.zeros(3, dtype=torch.float64), clip=clip, capacity=6)


@pytest.mark.skipif(which("cc") is None, reason="no C compiler")
def test_the_header_is_plain_c():
    done = subprocess.run(
        ["cc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-xc",
         HEADER],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_cuda_answers_with_or_without_a_device():
    seen = _C.cuda()
    assert (seen["reason"] is None) == (len(seen["devices"]) > 0)
    if not seen["built"]:
        assert seen["reason"] == "built without CUDA"
    for device in seen["devices"]:
        assert device["name"]
        assert device["memory_bytes"] > 0
