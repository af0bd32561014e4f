"""The C functions one by one, on memory laid out here: values, edges, guard zones, errors, threads.

The screen has a file of its own, test_screen.py.
"""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("sae_ext._C", reason="the kernels are not built")

from guarded import DTYPES, Guarded, arrays, call, code_out, random, results  # noqa: E402

HEADER = Path(__file__).parents[2] / "csrc" / "saek.h"
CLIP = 1.0
# lr, beta1, beta2, eps, weight_decay, grad_scale, step
ADAM = (0.01, 0.8, 0.99, 1e-6, 0.3, torch.tensor([0.7], dtype=torch.float64), 4)


@dataclass
class Case:
    """One made-up batch, and everything that any kernel reads of it; float64 of the same numbers."""

    dtype: torch.dtype
    rows: int = 41
    d_in: int = 70
    d_sae: int = 150
    weighted: bool = True
    silent: bool = False
    """No entry anywhere."""

    def __post_init__(self) -> None:
        self.memory: dict[str, Tensor] = {}
        rows, d_in, d_sae = self.rows, self.d_in, self.d_sae
        shapes = {
            "xc": (rows, d_in), "grad": (rows, d_in), "pre": (rows, d_sae), "product": (rows, d_in),
            "grad_z": (rows, d_sae),
            "W_enc": (d_sae, d_in), "W_dec": (d_sae, d_in), "dW_enc": (d_sae, d_in),
            "dW_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "grad_b_enc": (d_sae,),
            "pull": (d_sae,), "w": (rows,), "s": (rows,), "q": (d_sae,), "grad_l1": (rows,),
            "grad_activity": (d_sae,),
        }  # fmt: skip
        for i, (name, shape) in enumerate(shapes.items()):
            self.memory[name] = random(*shape, dtype=self.dtype, seed=i)
        for name in ("w", "s", "q"):
            self.memory[name].abs_()
        if rows > 3:  # a row without entries and one with all
            self.memory["pre"][1] = -9
            self.memory["pre"][3] = 9
        if self.silent:
            self.memory["pre"][:] = -99
        summed = self.memory["pre"] + self.memory["b_enc"]
        self.active = summed > 0
        self.passes = self.active & (summed <= CLIP)
        row, col = self.active.nonzero(as_tuple=True)
        val = torch.where(summed > CLIP, -CLIP, summed)[self.active]
        order = col.sort(stable=True).indices
        memory = self.memory
        memory["row_ptr"] = torch.cat(
            [torch.zeros(1, dtype=torch.int64), self.active.sum(1).cumsum(0)]
        )
        memory["col"], memory["val"] = col.int(), val
        memory["dz"] = random(len(col), dtype=self.dtype, seed=30)
        memory["grad_val"] = random(len(col), dtype=self.dtype, seed=31)
        memory["feature_ptr"] = torch.cat(
            [torch.zeros(1, dtype=torch.int64), self.active.sum(0).cumsum(0)]
        )
        memory["row"] = row[order].int()
        memory["z_by_feature"], memory["dz_by_feature"] = val[order].abs(), memory["dz"][order]
        self.z = summed.double().clamp(0, CLIP)
        self.code = (*(memory[name] for name in ("row_ptr", "col", "val")), rows)

    def __getitem__(self, name: str) -> Tensor:
        """The memory a kernel is given."""
        return self.memory[name]

    def optional(self, name: str) -> Tensor | None:
        return self.memory[name] if self.weighted else None

    def exact(self, name: str) -> Tensor:
        """The same numbers in float64, 1 for a weight that is absent."""
        tensor = self.memory[name].double()
        return torch.ones_like(tensor) if name in ("w", "s", "q") and not self.weighted else tensor

    def spread(self, entries: Tensor) -> Tensor:
        """[rows, d_sae] of one number per entry."""
        out = torch.zeros(self.rows, self.d_sae, dtype=torch.float64)
        out[self.active] = entries.double()
        return out

    def gradient(self, *, listed: bool, pulled: bool) -> tuple[Any, ...]:
        """What gradient rows are made of, as the kernels take it."""
        entries: tuple[Tensor | None, ...] = (None,) * 4
        parts: list[Tensor | None] = [None, None, self["dW_enc"], self["dW_dec"]]
        if listed:
            entries = tuple(
                self[k] for k in ("feature_ptr", "row", "z_by_feature", "dz_by_feature")
            )
            parts = [self["grad"], self["xc"], None, None]
        pull = (self["pull"], self["W_dec"]) if pulled else (None, None)
        return (entries, *parts, self["grad_b_enc"], *pull, self.d_in, self.d_sae)

    def gradient_rows(self, *, listed: bool, pulled: bool) -> tuple[Tensor, Tensor]:
        """Gradients of W_enc and W_dec."""
        dW_enc, dW_dec = self.exact("dW_enc"), self.exact("dW_dec")
        if listed:
            dW_enc = self.spread(self["dz"]).T @ self.exact("xc")
            dW_dec = self.z.T @ self.exact("grad")
        if pulled:
            dW_dec = dW_dec + self.exact("pull")[:, None] * self.exact("W_dec")
        return dW_enc, dW_dec


def moments(case: Case, value: Tensor, seed: int) -> tuple[Guarded, Guarded, Guarded]:
    """A parameter and its moments, in place."""
    m = random(*value.shape, dtype=case.dtype, seed=seed)
    v = random(*value.shape, dtype=case.dtype, seed=seed + 1).square()
    return Guarded.holding(value), Guarded.holding(m), Guarded.holding(v)


def adamw(group: tuple[Guarded, Guarded, Guarded], gradient: Tensor) -> list[Tensor]:
    """What torch.optim.AdamW makes of a parameter and its moments, in float64."""
    lr, beta1, beta2, eps, weight_decay, grad_scale, step = ADAM
    value, m, v = (array.before.double().clone() for array in group)  # type: ignore[union-attr]
    value.grad = grad_scale.item() * gradient
    optimizer = torch.optim.AdamW(
        [value], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay
    )
    optimizer.state[value] = {"step": torch.tensor(step - 1.0), "exp_avg": m, "exp_avg_sq": v}
    optimizer.step()
    return [value, m, v]


def without_parallel(gradient: Tensor, rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True)
    return gradient - (gradient * unit).sum(1, keepdim=True) * unit


# A kernel's arguments on a case with so many threads, and the results they should have.
Build = Callable[[Case, int], tuple[dict[str, Any], dict[str, Tensor]]]
BUILDS: dict[str, Build] = {}


def builds(name: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        BUILDS[name] = build
        return build

    return register


def within(case: Case, threads: int) -> tuple[int, int]:
    return DTYPES[case.dtype], threads


def listing(case: Case) -> dict[str, Tensor]:
    """The code of a case, as `out` holds it."""
    return {"out.0": case["row_ptr"], "out.1": case["col"], "out.2": case["val"].double()}


@builds("compact")
def compact(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    nnz, over = len(case["col"]), int((case["val"] < 0).sum())
    arguments = {
        "exec": within(case, threads), "pre": case["pre"], "b_enc": case["b_enc"], "clip": CLIP,
        "rows": case.rows, "d_sae": case.d_sae,
        "mask": Guarded((case.rows, (case.d_sae + 63) // 64), torch.int64, "scratch"),
        "out": code_out(case.rows, nnz, case.dtype),
    }  # fmt: skip
    counters = torch.tensor([nnz, over, case.rows * case.d_sae, 0])
    return arguments, {**listing(case), "out.4": counters}


@builds("gather")
def gather(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    listed = torch.rand(case.rows, case.d_sae, generator=torch.Generator().manual_seed(2)) < 0.4
    listed[0] = False
    if case.silent:
        listed[:] = False
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    clip, n = 9.0, int(ptr[-1])
    pre = case.exact("xc") @ case.exact("W_enc").T + case.exact("b_enc")
    active = listed & (pre > 0)
    arguments = {
        "exec": within(case, threads), "support_ptr": ptr,
        "support_col": listed.nonzero()[:, 1].int(), "xc": case["xc"], "W_enc": case["W_enc"],
        "b_enc": case["b_enc"], "clip": clip, "rows": case.rows, "d_in": case.d_in,
        "support_length": n, "scratch": Guarded((n,), case.dtype, "scratch"),
        "out": code_out(case.rows, int(active.sum()), case.dtype),
    }  # fmt: skip
    over = active & (pre > clip)
    return arguments, {
        "out.0": torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)]),
        "out.1": active.nonzero()[:, 1].int(),
        "out.2": torch.where(over, -clip, pre)[active],
        "out.4": torch.tensor([int(active.sum()), int(over.sum()), n, 0]),
    }


@builds("decode")
def decode(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arguments = {
        "exec": within(case, threads), "code": case.code,
        "matrix": case["W_dec"], "bias": case["b_dec"], "d_in": case.d_in,
        "out": Guarded((case.rows, case.d_in), case.dtype),
    }  # fmt: skip
    product = case.spread(case["val"]) @ case.exact("W_dec")
    return arguments, {"out": product + case.exact("b_dec")}


@builds("decode without bias")
def decode_alone(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arguments, expected = decode(case, threads)
    return {**arguments, "bias": None}, {"out": expected["out"] - case.exact("b_dec")}


@builds("residual")
def residual(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    recon_scale, l1_scale = 2 / case.rows, 3 / case.rows
    arguments = {
        "exec": within(case, threads), "code": case.code, "W_dec": case["W_dec"], "xc": case["xc"],
        "recon_weight": case.optional("w"), "l1_weight": case.optional("s"),
        "feature_weight": case.optional("q"), "recon_scale": recon_scale, "l1_scale": l1_scale,
        "d_in": case.d_in, "row_sums": Guarded((case.rows, 4), torch.float64, "scratch"),
        "grad": Guarded((case.rows, case.d_in), case.dtype),
        "dz": Guarded((len(case["col"]),), case.dtype), "sums": Guarded((4,), torch.float64),
    }  # fmt: skip
    w, s, q, W_dec = (case.exact(name) for name in ("w", "s", "q", "W_dec"))
    error = case.z @ W_dec - case.exact("xc")
    grad = recon_scale * w[:, None] * error
    dz = (grad @ W_dec.T + l1_scale * s[:, None] * q) * case.passes
    squares, prices = error.square().sum(1), case.z @ q
    sums = [squares.sum(), prices.sum(), (w * squares).sum(), (s * prices).sum()]
    return arguments, {"grad": grad, "dz": dz[case.active], "sums": torch.stack(sums)}


@builds("dz")
def dz(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arguments = {
        "exec": within(case, threads), "code": case.code, "W_dec": case["W_dec"],
        "grad": case["grad"], "grad_l1": case["grad_l1"], "feature_weight": case.optional("q"),
        "grad_activity": case["grad_activity"], "grad_val": case["grad_val"], "d_in": case.d_in,
        "dz": Guarded((len(case["col"]),), case.dtype),
    }  # fmt: skip
    grad_z = case.exact("grad") @ case.exact("W_dec").T + case.exact("grad_activity")
    grad_z += case.exact("grad_l1")[:, None] * case.exact("q") + case.spread(case["grad_val"])
    return arguments, {"dz": (grad_z * case.passes)[case.active]}


@builds("transpose")
def transpose(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    nnz = len(case["col"])
    arguments = {
        "exec": within(case, threads), "code": case.code, "dz": case["dz"],
        "row_weight": case.optional("s"), "d_sae": case.d_sae,
        "counts": Guarded((threads, case.d_sae), torch.int64, "scratch"),
        "entries": (
            Guarded((case.d_sae + 1,), torch.int64), Guarded((nnz,), torch.int32),
            Guarded((nnz,), case.dtype), Guarded((nnz,), case.dtype),
        ),
        "grad_b_enc": Guarded((case.d_sae,), case.dtype), "z_sum": Guarded((case.d_sae,), case.dtype),
    }  # fmt: skip
    return arguments, {
        "entries.0": case["feature_ptr"],
        "entries.1": case["row"],
        "entries.2": case.exact("z_by_feature"),
        "entries.3": case.exact("dz_by_feature"),
        "grad_b_enc": case.spread(case["dz"]).sum(0),
        "z_sum": (case.z * case.exact("s")[:, None]).sum(0),
    }


@builds("b_dec_gradient")
def b_dec_gradient(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arguments = {
        "exec": within(case, threads), "grad": case["grad"], "grad_b_enc": case["grad_b_enc"],
        "W_enc": case["W_enc"], "rows": case.rows, "d_in": case.d_in, "d_sae": case.d_sae,
        "scratch": Guarded((_C.B_DEC_SHARES, case.d_in), torch.float64, "scratch"),
        "out": Guarded((case.d_in,), case.dtype),
    }  # fmt: skip
    pulled = case.exact("grad_b_enc") @ case.exact("W_enc")
    return arguments, {"out": case.exact("grad").sum(0) - pulled}


def feature_gradients(listed: bool, pulled: bool) -> Build:
    def build(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        shape = (case.d_sae, case.d_in)
        arguments = {
            "exec": within(case, threads),
            "gradient": case.gradient(listed=listed, pulled=pulled),
            "dW_enc": Guarded(shape, case.dtype),
            "dW_dec": Guarded(shape, case.dtype),
        }
        dW_enc, dW_dec = case.gradient_rows(listed=listed, pulled=pulled)
        return arguments, {"dW_enc": dW_enc, "dW_dec": dW_dec}

    return build


def feature_norms(listed: bool, pulled: bool) -> Build:
    def build(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        arguments = {
            "exec": within(case, threads),
            "gradient": case.gradient(listed=listed, pulled=pulled),
            "scratch": Guarded((threads, 2, case.d_in), case.dtype, "scratch"),
            "out": Guarded((case.d_sae,), torch.float64),
        }
        rows = case.gradient_rows(listed=listed, pulled=pulled)
        squares = sum(gradient.square().sum(1) for gradient in rows)
        return arguments, {"out": squares + case.exact("grad_b_enc").square()}

    return build


def update_features(listed: bool, pulled: bool, unit_norm: bool) -> Build:
    def build(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        groups = {
            name: moments(case, case[name], seed)
            for name, seed in (("W_enc", 40), ("b_enc", 42), ("W_dec", 44))
        }
        gradient = case.gradient(listed=listed, pulled=pulled)
        if pulled:  # the rows that are pulled at are those that are updated
            gradient = (*gradient[:7], groups["W_dec"][0].inside, *gradient[8:])
        arguments = {
            "exec": within(case, threads), "gradient": gradient, "adam": ADAM,
            "unit_norm": unit_norm, "scratch": Guarded((threads, 2, case.d_in), case.dtype, "scratch"),
            **groups,
        }  # fmt: skip
        dW_enc, dW_dec = case.gradient_rows(listed=listed, pulled=pulled)
        if unit_norm:
            dW_dec = without_parallel(dW_dec, case.exact("W_dec"))
        gradients = {"W_enc": dW_enc, "b_enc": case.exact("grad_b_enc"), "W_dec": dW_dec}
        expected = {}
        for name, group in groups.items():
            after = adamw(group, gradients[name])
            if unit_norm and name == "W_dec":
                after[0] /= after[0].norm(dim=1, keepdim=True)
            expected |= {f"{name}.{i}": tensor for i, tensor in enumerate(after)}
        return arguments, expected

    return build


for made_of in (True, False):
    label = "entries" if made_of else "sums"
    BUILDS[f"feature_gradients of {label}"] = feature_gradients(made_of, pulled=False)
    BUILDS[f"feature_gradients of {label}, pulled"] = feature_gradients(made_of, pulled=True)
    BUILDS[f"feature_norms of {label}, pulled"] = feature_norms(made_of, pulled=True)
    BUILDS[f"update_features of {label}"] = update_features(made_of, pulled=False, unit_norm=True)
    BUILDS[f"update_features of {label}, pulled"] = update_features(
        made_of, pulled=True, unit_norm=False
    )


@builds("update")
def update(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    n = 2500  # more than the two blocks that threads take turns with
    gradient = random(n, dtype=case.dtype, seed=50)
    group = moments(case, random(n, dtype=case.dtype, seed=51), 52)
    arguments = {
        "exec": within(case, threads), "gradient": gradient, "n": n, "adam": ADAM, "parameter": group,
    }  # fmt: skip
    after = adamw(group, gradient.double())
    return arguments, {f"parameter.{i}": tensor for i, tensor in enumerate(after)}


@builds("row_norms")
def row_norms(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    arguments = {
        "exec": within(case, threads), "matrix": case["W_dec"], "rows": case.d_sae,
        "d_in": case.d_in, "out": Guarded((case.d_sae,), case.dtype),
    }  # fmt: skip
    return arguments, {"out": case.exact("W_dec").norm(dim=1)}


def words_of(bits: Tensor) -> Tensor:
    """Rows of booleans as rows of 64-bit words, lowest bit first."""
    rows, n = bits.shape
    padded = torch.zeros(rows, (n + 63) // 64 * 64, dtype=torch.int64)
    padded[:, :n] = bits.long()
    place = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(64)])
    return (padded.view(rows, -1, 64) * place).sum(2)


@builds("dense_activate")
def dense_activate(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    d_sae = case.d_sae
    fired, saturated = torch.arange(d_sae), torch.tensor([100])
    z_sum = random(2, d_sae, seed=60)
    arguments = {
        "exec": within(case, threads), "pre": Guarded.holding(case["pre"]), "b_enc": case["b_enc"],
        "clip": CLIP, "row_weight": case.optional("s"), "rows": case.rows, "d_sae": d_sae,
        "passes": Guarded((case.rows, (d_sae + 63) // 64), torch.int64),
        "fired": Guarded.holding(fired, "summed"), "saturated": Guarded.holding(saturated, "summed"),
        "z_sum": Guarded.holding(z_sum, "summed"),
    }  # fmt: skip
    weighted = (case.z * case.exact("s")[:, None]).sum(0)
    return arguments, {
        "pre": case.z,
        "passes": words_of(case.passes),
        "fired": fired + case.active.sum(0),
        "saturated": saturated + (case.active & ~case.passes).sum(),
        "z_sum": z_sum + torch.stack([case.z.sum(0), weighted]),
    }


@builds("dense_residual")
def dense_residual(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sums, scale = torch.tensor([5.0, 7.0], dtype=torch.float64), 2 / case.rows
    arguments = {
        "exec": within(case, threads), "grad": Guarded.holding(case["product"]), "xc": case["xc"],
        "recon_weight": case.optional("w"), "recon_scale": scale, "rows": case.rows,
        "d_in": case.d_in, "row_sums": Guarded((case.rows,), torch.float64, "scratch"),
        "sums": Guarded.holding(sums, "summed"),
    }  # fmt: skip
    error, w = case.exact("product") - case.exact("xc"), case.exact("w")
    squares = error.square().sum(1)
    return arguments, {
        "grad": scale * w[:, None] * error,
        "sums": sums + torch.stack([squares.sum(), (w * squares).sum()]),
    }


@builds("dense_mask")
def dense_mask(case: Case, threads: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    before, l1_scale = random(case.d_sae, seed=70), 3 / case.rows
    arguments = {
        "exec": within(case, threads), "dz": Guarded.holding(case["grad_z"]),
        "passes": words_of(case.passes), "l1_weight": case.optional("s"),
        "feature_weight": case.optional("q"), "l1_scale": l1_scale, "rows": case.rows,
        "d_sae": case.d_sae, "grad_b_enc": Guarded.holding(before, "summed"),
    }  # fmt: skip
    price = l1_scale * case.exact("s")[:, None] * case.exact("q")
    after = (case.exact("grad_z") + price) * case.passes
    return arguments, {"dz": after, "grad_b_enc": before + after.sum(0)}


def kernel_of(name: str) -> str:
    return name.split(" ")[0]


def run(name: str, case: Case, threads: int = 2) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of a call that has been made, and what it should have written."""
    arguments, expected = BUILDS[name](case, threads)
    assert call(kernel_of(name), arguments) in (None, _C.OK)
    return arguments, expected


def test_every_kernel_of_the_module_is_tried_here_or_in_the_screens_file():
    functions = {
        name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("_")
    }
    others = {"isa", "has_openmp", "cuda", "screen", "screen_scratch"}
    assert functions - others == {kernel_of(name) for name in BUILDS}


# rows, d_in, d_sae: one of each, tails of registers and words, several blocks of 512 columns.
SHAPES = [(1, 1, 1), (41, 70, 150), (5, 64, 64), (3, 17, 1100), (130, 3, 65)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILDS)
def test_a_kernel_writes_every_element_of_what_it_should_and_nothing_beside(name, dtype):
    for shape, weighted in itertools.product(SHAPES, (True, False)):
        arguments, expected = run(name, Case(dtype, *shape, weighted=weighted))
        got = results(arguments)
        assert got.keys() == expected.keys()
        for field, array in arrays(arguments):
            if array.role in ("out", "changed"):
                assert not bool(array.unwritten().any()), f"{field} has elements not written"
        for field, tensor in expected.items():
            if tensor.is_floating_point():
                scale = 1 + tensor.norm().item()
                tolerance = 1e-12 if dtype == torch.float64 else 1e-5
                error = (got[field].double() - tensor).norm().item()
                assert error <= tolerance * scale, f"{field} is off by {error:g}"
            else:
                assert torch.equal(got[field], tensor), field


@pytest.mark.parametrize("rows", [1, 41])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BUILDS)
def test_a_kernel_is_bitwise_equal_for_any_number_of_threads_and_run_to_run(name, dtype, rows):
    case = Case(dtype, rows, d_sae=600)
    alone = results(run(name, case, threads=1)[0])
    for threads in (2, 3, 4, 64, 1):
        for field, tensor in results(run(name, case, threads)[0]).items():
            assert torch.equal(tensor, alone[field]), f"{field} with {threads} threads"


# ---- The edges of listing --------------------------------------------------------------------------


def listed(
    pre: Tensor,
    bias: Tensor,
    *,
    clip: float = math.inf,
    capacity: int | None = None,
    first: int = 0,
) -> tuple[int | None, tuple[Any, ...]]:
    """What `compact` returns and the arrays it filled, as long as needed or `capacity`."""
    if capacity is None:
        capacity = first + int((~(pre + bias <= 0)).sum())
    rows, d_sae = pre.shape
    out = code_out(rows, capacity, pre.dtype, first)
    mask = Guarded((rows, (d_sae + 63) // 64), torch.int64, "scratch")
    code = call(
        "compact",
        {
            "exec": (DTYPES[pre.dtype], 2), "pre": pre, "b_enc": bias, "clip": clip, "rows": rows,
            "d_sae": d_sae, "mask": mask, "out": out,
        },
    )  # fmt: skip
    return code, out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_sae", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("shift", [-9.0, -1.0, 9.0])
def test_compaction_lists_each_positive_entry_once_in_order(dtype, d_sae, shift):
    pre, bias = random(13, d_sae, dtype=dtype), random(d_sae, dtype=dtype, seed=1) + shift
    _, (row_ptr, col, val, _, counters) = listed(pre, bias, clip=8.0)
    summed = pre + bias
    rows, columns = (summed > 0).nonzero(as_tuple=True)
    assert col.inside.tolist() == columns.tolist()
    assert row_ptr.inside.diff().tolist() == torch.bincount(rows, minlength=13).tolist()
    assert counters.inside.tolist() == [len(rows), int((summed > 8).sum()), 13 * d_sae, 0]
    picked = summed[rows, columns]
    assert torch.equal(val.inside, torch.where(picked > 8, -8.0, picked))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [3, 70])  # in a whole word of 64 columns, and in the rest
def test_compaction_at_the_edges_of_zero_and_clip(dtype, column):
    above = math.nextafter(2.0, 3.0) if dtype == torch.float64 else 2.0 + 2**-22
    denormal = torch.finfo(dtype).smallest_normal / 4
    edges = [0.0, -0.0, -denormal, denormal, 2.0, above, math.inf, -math.inf, math.nan]
    pre = torch.full((len(edges), 75), -1.0, dtype=dtype)
    pre[:, column] = torch.tensor(edges, dtype=dtype)
    _, (row_ptr, col, val, _, counters) = listed(pre, torch.zeros(75, dtype=dtype), clip=2.0)
    assert row_ptr.inside.diff().tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1]
    assert col.inside.tolist() == [column] * 5
    assert val.inside[:4].tolist() == [denormal, 2.0, -2.0, -2.0]
    assert val.inside[4].isnan()
    assert counters.inside[1] == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("column", [3, 70])
def test_dense_activation_at_the_edges_of_zero_and_clip(dtype, column):
    above = math.nextafter(2.0, 3.0) if dtype == torch.float64 else 2.0 + 2**-22
    denormal = torch.finfo(dtype).smallest_normal / 4
    edges = [0.0, -0.0, -denormal, denormal, 2.0, above, math.inf, -math.inf, math.nan]
    case = Case(dtype, len(edges), 1, 75)
    pre = torch.full((len(edges), 75), -1.0, dtype=dtype)
    pre[:, column] = torch.tensor(edges, dtype=dtype)
    case.memory["pre"], case.memory["b_enc"] = pre, torch.zeros(75, dtype=dtype)
    arguments, _ = dense_activate(case, 2)
    call("dense_activate", {**arguments, "clip": 2.0})
    z = results(arguments)["pre"]
    assert z[:-1, column].tolist() == [0.0, 0.0, 0.0, denormal, 2.0, 2.0, 2.0, 0.0]
    assert not z[:-1, column].signbit().any()
    assert z[-1, column].isnan()
    passing = torch.zeros(len(edges), 75, dtype=torch.bool)
    passing[[3, 4, 8], column] = True
    assert torch.equal(results(arguments)["passes"], words_of(passing))
    assert results(arguments)["fired"][column] == column + 5
    assert results(arguments)["saturated"].tolist() == [102]


def test_compaction_without_a_clip_keeps_infinity_as_it_is():
    pre = torch.tensor([[math.inf, 1.0]], dtype=torch.float64)
    _, (_, _, val, _, counters) = listed(pre, torch.zeros(2, dtype=torch.float64))
    assert val.inside.tolist() == [math.inf, 1.0]
    assert counters.inside[1] == 0


@pytest.mark.parametrize("first", [0, 17])
@pytest.mark.parametrize("short", [1, 30])
def test_too_short_arrays_are_reported_and_left_alone(short, first):
    pre, bias = random(9, 70), torch.zeros(70, dtype=torch.float64)
    total = first + int((pre > 0).sum())
    code, (_, col, val, _, counters) = listed(pre, bias, capacity=total - short, first=first)
    assert code == _C.OVERFLOW
    assert counters.inside.tolist() == [total, 0, 630, 1]
    assert col.untouched()
    assert val.untouched()
    code, (_, col, val, _, counters) = listed(pre, bias, capacity=total, first=first)
    assert code == _C.OK
    assert counters.inside.tolist() == [total, 0, 630, 0]
    assert torch.equal(val.inside[first:], pre[pre > 0])
    assert bool(val.inside[:first].isnan().all()), "rows listed before are not touched"
    assert bool((col.inside[:first] == -77).all())


def test_nothing_active_needs_no_arrays_at_all():
    bias = torch.full((70,), -99.0, dtype=torch.float64)
    code, (row_ptr, _, _, _, counters) = listed(random(9, 70), bias, capacity=0)
    assert code == _C.OK
    assert row_ptr.inside.tolist() == [0] * 10
    assert counters.inside.tolist() == [0, 0, 630, 0]


@pytest.mark.parametrize("first", [0, 17])
@pytest.mark.parametrize("short", [0, 1, 30])
def test_gathering_reports_too_short_arrays_and_leaves_them_alone(short, first):
    case = Case(torch.float64)
    arguments, expected = gather(case, 2)
    nnz, over, n, _ = expected["out.4"].tolist()
    out = code_out(case.rows, first + nnz - short, case.dtype, first)
    code = call("gather", {**arguments, "out": out})
    row_ptr, col, val, _, counters = out
    assert code == (_C.OVERFLOW if short else _C.OK)
    assert counters.inside.tolist() == [first + nnz, 0 if short else over, n, int(short > 0)]
    if short:
        assert col.untouched()
        assert val.untouched()
    else:
        assert torch.equal(row_ptr.inside, first + expected["out.0"])
        assert torch.equal(col.inside[first:], expected["out.1"])
        assert bool((col.inside[:first] == -77).all()), "rows listed before are not touched"
        assert bool(val.inside[:first].isnan().all())


@pytest.mark.parametrize("change", [-1, 1])
def test_a_support_of_another_length_than_its_rows_say_is_refused(change):
    arguments, _ = gather(Case(torch.float64), 2)
    refused("gather", {**arguments, "support_length": arguments["support_length"] + change})


@pytest.mark.parametrize(
    "name", ["gather", "decode", "residual", "dz", "transpose", "feature_gradients of entries"]
)
def test_without_entries_the_arrays_of_entries_may_be_missing(name):
    arguments, _ = BUILDS[name](Case(torch.float64, silent=True), 2)
    for path in paths(arguments, (Tensor, Guarded)):
        if path in OF_ENTRIES:
            arguments = replaced(arguments, path, None)
    assert call(kernel_of(name), arguments) in (None, _C.OK)
    for field, array in arrays(arguments):
        assert array.role == "scratch" or not bool(array.unwritten().any()), field


@pytest.mark.parametrize("name", ["update", "update_features of entries"])
def test_without_a_factor_the_gradient_is_taken_as_it_is(name):
    ends = []
    for factor in (None, torch.ones(1, dtype=torch.float64)):
        arguments, _ = BUILDS[name](Case(torch.float64), 2)
        call(kernel_of(name), replaced(arguments, "adam.5", factor))
        ends.append(results(arguments))
    for field, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][field]), field


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_row_of_zeros_has_no_direction_and_no_length(dtype):
    case = Case(dtype)
    case["W_dec"][7] = 0
    arguments, _ = update_features(listed=True, pulled=False, unit_norm=True)(case, 2)
    for array in arguments["W_dec"][1:]:
        array.inside[7] = 0
    call("update_features", {**arguments, "adam": (0.0, *ADAM[1:])})
    seen = results(arguments)
    assert torch.equal(seen["W_dec.0"][7], torch.zeros(case.d_in, dtype=dtype))
    assert all(bool(t.isfinite().all()) for t in seen.values())
    arguments, _ = row_norms(case, 2)
    call("row_norms", arguments)
    assert results(arguments)["out"][7] == 0


# ---- Refusals --------------------------------------------------------------------------------------

# Pointers that may be null: they mean "1", "0", or "not wanted".
OPTIONAL = {
    "decode": {"bias"},
    "residual": {"recon_weight", "l1_weight", "feature_weight"},
    "dz": {"grad", "grad_l1", "feature_weight", "grad_activity", "grad_val"},
    "transpose": {"row_weight"},
    "feature_gradients": {"dW_enc", "dW_dec"},
    "dense_activate": {"row_weight"},
    "dense_residual": {"recon_weight"},
    "dense_mask": {"l1_weight", "feature_weight"},
    "update": {"adam.5"},
    "update_features": {"adam.5"},
}
# As long as there are entries: with none of them, null is right.
OF_ENTRIES = {
    "dz", "support_col", "scratch", "out.1", "out.2",
    *(f"{group}.{i}" for group in ("code", "entries", "gradient.0") for i in (1, 2, 3)),
}  # fmt: skip


def replaced(arguments: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The same arguments but for one; "code.0" is the first of a tuple."""
    name, *places = path.split(".")

    def inner(old: Any, rest: list[str]) -> Any:
        if not rest:
            return value
        at = int(rest[0])
        return (*old[:at], inner(old[at], rest[1:]), *old[at + 1 :])

    return {**arguments, name: inner(arguments[name], places)}


def paths(arguments: Any, kind: type | tuple[type, ...], path: str = "") -> list[str]:
    if isinstance(arguments, dict):
        return [p for name, value in arguments.items() for p in paths(value, kind, name)]
    if isinstance(arguments, tuple):
        return [p for i, value in enumerate(arguments) for p in paths(value, kind, f"{path}.{i}")]
    return [path] if isinstance(arguments, kind) and not isinstance(arguments, bool) else []


def refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{kernel_of(name)}: a pointer is null or a size"):
        call(kernel_of(name), arguments)
    for field, array in arrays(arguments):
        fresh = field in ("out.0", "out.1", "out.2")  # prepared by the builder
        assert fresh or array.untouched(), field


@pytest.mark.parametrize("name", BUILDS)
def test_a_null_pointer_is_refused_before_anything_is_written(name):
    arguments, _ = BUILDS[name](Case(torch.float64), 2)
    tried = 0
    for path in paths(arguments, (Tensor, Guarded)):
        if path in OPTIONAL.get(kernel_of(name), ()):
            continue
        if path.startswith("gradient.") and path not in needed_of_the_gradient(name):
            continue
        refused(name, replaced(arguments, path, None))
        tried += 1
    assert tried > 0


def needed_of_the_gradient(name: str) -> set[str]:
    """Pointers of a gradient that cannot be missing, given the others."""
    made_of = {"gradient.3", "gradient.4"}
    if "entries" in name:
        made_of = {"gradient.1", "gradient.2", *(f"gradient.0.{i}" for i in range(4))}
    pulled = {"gradient.7"} if "pulled" in name else set()
    bias = set() if name.startswith("feature_gradients") else {"gradient.5"}
    return made_of | pulled | bias


@pytest.mark.parametrize("name", BUILDS)
def test_an_impossible_size_is_refused_before_anything_is_written(name):
    arguments, _ = BUILDS[name](Case(torch.float64), 2)
    for path in paths(arguments, int):
        if path == "exec.0":
            values = [2, -1]
        elif path == "out.3":  # a capacity; 0 asks for no arrays
            values = [-1]
        else:
            values = [0, -1]
            if path == "code.3" or (
                path == "d_sae" and kernel_of(name) in ("compact", "transpose")
            ):
                values.append(2**31)
        for value in values:
            refused(name, replaced(arguments, path, value))


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("name", ["compact", "gather", "dense_activate"])
def test_a_clip_that_is_not_positive_is_refused(name, clip):
    arguments, _ = BUILDS[name](Case(torch.float64), 2)
    refused(name, {**arguments, "clip": clip})


@pytest.mark.parametrize("change", [{1: 1.0}, {1: -0.1}, {2: 1.0}, {2: math.nan}], ids=str)
@pytest.mark.parametrize("name", ["update", "update_features of entries"])
def test_decay_rates_of_moments_outside_0_to_1_are_refused(name, change):
    arguments, _ = BUILDS[name](Case(torch.float64), 2)
    refused(name, {**arguments, "adam": tuple(change.get(i, n) for i, n in enumerate(ADAM))})


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
