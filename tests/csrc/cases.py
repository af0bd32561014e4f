"""Made-up batches: the arguments of every kernel on them, and what it should write, from float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from guarded import Guarded, arrays, code_out, random, results
from implementations import Kernels
from torch import Tensor

from sae_ext import _C

LR, BETA1, BETA2, EPS, WEIGHT_DECAY, GRAD_SCALE, STEP = 0.01, 0.8, 0.99, 1e-6, 0.3, 0.7, 4
ADAM = (
    torch.tensor(
        [
            1 - LR * WEIGHT_DECAY, LR / (1 - BETA1**STEP), BETA1, BETA2,
            1 / math.sqrt(1 - BETA2**STEP), EPS,
        ],
        dtype=torch.float64,
    ),
    torch.tensor([GRAD_SCALE], dtype=torch.float64),
)  # fmt: skip
MATRICES = {"xc", "grad", "pre", "product", "grad_z", "W_enc", "W_dec"}


@dataclass
class Case:
    """One made-up batch, and everything that any kernel reads of it; float64 of the same numbers.

    `dtype` and `stored` are csrc/saek.h's T and M. What a kernel may be given as M is exact in M.
    """

    kernels: Kernels
    stored: torch.dtype
    rows: int = 41
    d_in: int = 70
    d_sae: int = 150
    weighted: bool = True
    aligned: bool = False
    """Whether arrays that are written start where 16 bytes can be written at once."""
    share: float = 0.5
    """Of the entries active, about; but for a row without any and one with all, where there are 4."""
    everywhere: tuple[int, ...] = ()
    """Features that are active in every row."""
    clip: float = 1.0
    zero_weights: bool = False
    slots: int = 2

    def __post_init__(self) -> None:
        self.dtype = self.of_sums(self.stored)
        self.memory: dict[str, Tensor] = {}
        rows, d_in, d_sae = self.rows, self.d_in, self.d_sae
        shapes = {
            "xc": (rows, d_in), "grad": (rows, d_in), "pre": (rows, d_sae), "product": (rows, d_in),
            "grad_z": (rows, d_sae), "x": (rows, d_in),
            "W_enc": (d_sae, d_in), "W_dec": (d_sae, d_in), "dW_enc": (d_sae, d_in),
            "dW_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,), "grad_b_enc": (d_sae,),
            "pull": (d_sae,), "w": (rows,), "s": (rows,), "q": (d_sae,), "grad_l1": (rows,),
            "grad_activity": (d_sae,),
        }  # fmt: skip
        for i, (name, shape) in enumerate(shapes.items()):
            self.memory[name] = random(*shape, dtype=self.dtype, seed=i)
        memory = self.memory
        for name in ("w", "s", "q"):
            memory[name].abs_()
            if self.zero_weights:
                memory[name].zero_()
        # pre + b_enc has a variance of 2.
        memory["pre"] += 2 * torch.special.erfinv(torch.tensor(2 * self.share - 1)).clamp(-9, 9)
        if rows > 3 and 0 < self.share < 1:
            memory["pre"][1], memory["pre"][3] = -9, 9
        memory["pre"][:, list(self.everywhere)] = 9
        for name in MATRICES:
            memory[name] = memory[name].to(self.stored).to(self.dtype)
        self.list_entries()

    def list_entries(self) -> None:
        """The code of the pre-activations, and what goes with its entries."""
        summed = self.memory["pre"] + self.memory["b_enc"]
        self.active = summed > 0
        self.passes = self.active & (summed <= self.clip)
        self.z = summed.double().clamp(0, self.clip)
        row, col = self.active.nonzero(as_tuple=True)
        val = torch.where(summed > self.clip, -self.clip, summed)[self.active]
        order = col.sort(stable=True).indices
        memory = self.memory
        memory["row_ptr"], memory["feature_ptr"] = (
            starts(self.active.sum(1)),
            starts(self.active.sum(0)),
        )
        memory["col"], memory["val"] = col.int(), val
        memory["dz"] = random(len(col), dtype=self.dtype, seed=30)
        memory["grad_val"] = random(len(col), dtype=self.dtype, seed=31)
        memory["row"] = row[order].int()
        memory["z_by_feature"], memory["dz_by_feature"] = val[order].abs(), memory["dz"][order]
        (self.long,) = (self.active.sum(0) > self.kernels.module.LONG_LIST).nonzero(as_tuple=True)
        noted = self.long[: self.slots].int()
        memory["long_lists"] = torch.cat(
            [torch.tensor([len(noted)]), noted, torch.full((self.slots - len(noted),), -77)]
        ).int()
        self.code = (*(memory[name] for name in ("row_ptr", "col", "val")), self.rows)

    @staticmethod
    def of_sums(stored: torch.dtype) -> torch.dtype:
        """The format of the other numbers where matrices are stored so."""
        return torch.float32 if stored == torch.bfloat16 else stored

    # ---- Numbers ----------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """What a kernel is given as T, or as an integer."""
        return self.memory[name]

    def matrix(self, name: str) -> Tensor:
        """What a kernel is given as M."""
        return self.memory[name].to(self.stored)

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

    # ---- Places -----------------------------------------------------------------------------------

    def exec(self, threads: int) -> tuple[Any, ...]:
        return self.kernels.exec(self.stored, threads)

    @property
    def align(self) -> int:
        return 16 if self.aligned else 1

    def out(self, *shape: int, dtype: torch.dtype | None = None) -> Guarded:
        return Guarded(shape, dtype or self.dtype, align=self.align)

    def changed(self, values: Tensor) -> Guarded:
        return Guarded.holding(values, align=self.align)

    def scratch(self, *shape: int, dtype: torch.dtype | None = None) -> Guarded:
        return Guarded(shape, dtype or self.dtype, "scratch", align=self.align)

    def on_cuda(self, *shape: int, dtype: torch.dtype | None = None) -> Guarded | None:
        """Scratch that the CUDA kernels alone need."""
        return self.scratch(*shape, dtype=dtype) if self.kernels.queued else None

    def on_cpu(self, *shape: int) -> Guarded | None:
        return None if self.kernels.queued else self.scratch(*shape)

    def halt(self) -> Guarded | None:
        return self.changed(torch.zeros(1, dtype=torch.int64)) if self.kernels.queued else None

    def not_halted(self) -> dict[str, Tensor]:
        return {"halt": torch.zeros(1, dtype=torch.int64)} if self.kernels.queued else {}

    # ---- Gradient rows ----------------------------------------------------------------------------

    def gradient(self, *, listed: bool, pulled: bool) -> tuple[Any, ...]:
        """What gradient rows are made of, as the kernels take it."""
        entries: tuple[Any, ...] = (None, None, None, None, None, 0)
        parts: list[Tensor | None] = [None, None, self["dW_enc"], self["dW_dec"]]
        long_rows = None
        if listed:
            names = ("feature_ptr", "row", "z_by_feature", "dz_by_feature")
            noted = self["long_lists"] if self.kernels.queued and self.slots else None
            entries = (*(self[name] for name in names), noted, self.slots)
            parts = [self.matrix("grad"), self.matrix("xc"), None, None]
            long_rows = self.on_cuda(self.slots, 2, self.d_in)
        pull = (self["pull"], self["W_dec"]) if pulled else (None, None)
        return (entries, *parts, self["grad_b_enc"], *pull, long_rows, self.d_in, self.d_sae)

    def gradient_rows(self, *, listed: bool, pulled: bool) -> tuple[Tensor, Tensor]:
        """Gradients of W_enc and W_dec."""
        dW_enc, dW_dec = self.exact("dW_enc"), self.exact("dW_dec")
        if listed:
            dW_enc = self.spread(self["dz"]).T @ self.exact("xc")
            dW_dec = self.z.T @ self.exact("grad")
        if pulled:
            dW_dec = dW_dec + self.exact("pull")[:, None] * self.exact("W_dec")
        return dW_enc, dW_dec


def starts(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def moments(case: Case, value: Tensor, seed: int) -> tuple[Guarded, Guarded, Guarded]:
    """A parameter and its moments, in place."""
    m = random(*value.shape, dtype=case.dtype, seed=seed)
    v = random(*value.shape, dtype=case.dtype, seed=seed + 1).square()
    return case.changed(value), case.changed(m), case.changed(v)


def adamw(group: tuple[Guarded, Guarded, Guarded], gradient: Tensor) -> list[Tensor]:
    """What torch.optim.AdamW makes of a parameter and its moments, in float64."""
    value, m, v = (array.held().double() for array in group)
    value.grad = GRAD_SCALE * gradient
    optimizer = torch.optim.AdamW(
        [value], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY
    )
    optimizer.state[value] = {"step": torch.tensor(STEP - 1.0), "exp_avg": m, "exp_avg_sq": v}
    optimizer.step()
    return [value, m, v]


def without_parallel(gradient: Tensor, rows: Tensor) -> Tensor:
    unit = rows / rows.norm(dim=1, keepdim=True)
    return gradient - (gradient * unit).sum(1, keepdim=True) * unit


# ---- Builders --------------------------------------------------------------------------------------

Built = tuple[dict[str, Any], dict[str, Tensor]]
# A kernel's arguments on a case with so many threads, and the results they should have.
Build = Callable[[Case, int], Built]
BUILDS: dict[str, Build] = {}


def builds(name: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        BUILDS[name] = build
        return build

    return register


@builds("compact")
def compact(case: Case, threads: int) -> Built:
    nnz, over = len(case["col"]), int((case["val"] < 0).sum())
    arguments = {
        "exec": case.exec(threads), "pre": case.matrix("pre"), "b_enc": case["b_enc"],
        "clip": case.clip, "rows": case.rows, "d_sae": case.d_sae,
        "mask": case.scratch(case.rows, (case.d_sae + 63) // 64, dtype=torch.int64),
        "counts": case.on_cuda(case.rows, 2, dtype=torch.int32),
        "out": code_out(case.rows, nnz, case.dtype, align=case.align),
    }  # fmt: skip
    return arguments, {
        "out.0": case["row_ptr"],
        "out.1": case["col"],
        "out.2": case["val"].double(),
        "out.4": torch.tensor([nnz, over, case.rows * case.d_sae, 0]),
    }


@builds("gather")
def gather(case: Case, threads: int) -> Built:
    clip = 9.0 * case.clip
    pre = case.exact("xc") @ case.exact("W_enc").T + case.exact("b_enc")
    given = torch.rand(case.rows, case.d_sae, generator=torch.Generator().manual_seed(2))
    # Where a rounding would decide, there is nothing to expect.
    decided = (pre.abs() > 1e-3) & ((pre - clip).abs() > 1e-3)
    given = decided & (given < 0.8 * case.share)
    given[0] = False
    active = given & (pre > 0)
    over, n = active & (pre > clip), int(given.sum())
    arguments = {
        "exec": case.exec(threads), "support_ptr": starts(given.sum(1)),
        "support_col": given.nonzero()[:, 1].int(), "xc": case.matrix("xc"),
        "W_enc": case.matrix("W_enc"), "b_enc": case["b_enc"], "clip": clip, "rows": case.rows,
        "d_in": case.d_in, "support_length": n, "scratch": case.scratch(n),
        "counts": case.on_cuda(case.rows, 2, dtype=torch.int32),
        "out": code_out(case.rows, int(active.sum()), case.dtype, align=case.align),
    }  # fmt: skip
    return arguments, {
        "out.0": starts(active.sum(1)),
        "out.1": active.nonzero()[:, 1].int(),
        "out.2": torch.where(over, -clip, pre)[active],
        "out.4": torch.tensor([int(active.sum()), int(over.sum()), n, 0]),
    }


@builds("decode")
def decode(case: Case, threads: int) -> Built:
    arguments = {
        "exec": case.exec(threads), "code": case.code, "matrix": case.matrix("W_dec"),
        "bias": case["b_dec"], "d_in": case.d_in, "out": case.out(case.rows, case.d_in),
    }  # fmt: skip
    product = case.spread(case["val"]) @ case.exact("W_dec")
    return arguments, {"out": product + case.exact("b_dec")}


@builds("decode without bias")
def decode_alone(case: Case, threads: int) -> Built:
    arguments, expected = decode(case, threads)
    return {**arguments, "bias": None}, {"out": expected["out"] - case.exact("b_dec")}


def residual(centred: bool) -> Build:
    def build(case: Case, threads: int) -> Built:
        recon_scale, l1_scale = 2 / case.rows, 3 / case.rows
        arguments = {
            "exec": case.exec(threads), "code": case.code, "W_dec": case.matrix("W_dec"),
            "x": case["x"], "b_dec": None if centred else case["b_dec"],
            "recon_weight": case.optional("w"), "l1_weight": case.optional("s"),
            "feature_weight": case.optional("q"), "recon_scale": recon_scale,
            "l1_scale": torch.tensor([l1_scale], dtype=torch.float64), "d_in": case.d_in,
            "shared_bytes": 3 * case.d_in * case.stored.itemsize if case.kernels.queued else 0,
            "halt": case.halt(), "row_sums": case.scratch(case.rows, 4, dtype=torch.float64),
            "grad": case.out(case.rows, case.d_in, dtype=case.stored), "dz": case.out(len(case["col"])),
            "sums": case.out(4, dtype=torch.float64),
        }  # fmt: skip
        w, s, q, W_dec = (case.exact(name) for name in ("w", "s", "q", "W_dec"))
        error = case.z @ W_dec - case.exact("x")
        if not centred:
            error += case.exact("b_dec")
        grad = recon_scale * w[:, None] * error
        dz = (grad @ W_dec.T + l1_scale * s[:, None] * q) * case.passes
        squares, prices = error.square().sum(1), case.z @ q
        sums = [squares.sum(), prices.sum(), (w * squares).sum(), (s * prices).sum()]
        return arguments, {
            "grad": grad, "dz": dz[case.active], "sums": torch.stack(sums), **case.not_halted(),
        }  # fmt: skip

    return build


BUILDS["residual"] = residual(centred=False)
BUILDS["residual of centred rows"] = residual(centred=True)


@builds("dz")
def dz(case: Case, threads: int) -> Built:
    arguments = {
        "exec": case.exec(threads), "code": case.code, "W_dec": case.matrix("W_dec"),
        "grad": case.matrix("grad"), "grad_l1": case["grad_l1"],
        "feature_weight": case.optional("q"), "grad_activity": case["grad_activity"],
        "grad_val": case["grad_val"], "d_in": case.d_in, "dz": case.out(len(case["col"])),
    }  # fmt: skip
    grad_z = case.exact("grad") @ case.exact("W_dec").T + case.exact("grad_activity")
    grad_z += case.exact("grad_l1")[:, None] * case.exact("q") + case.spread(case["grad_val"])
    return arguments, {"dz": (grad_z * case.passes)[case.active]}


@builds("transpose")
def transpose(case: Case, threads: int) -> Built:
    nnz = len(case["col"])
    noting = case.kernels.queued and case.slots > 0
    arguments = {
        "exec": case.exec(threads), "code": case.code, "dz": case["dz"],
        "row_weight": case.optional("s"), "d_sae": case.d_sae,
        "counts": case.scratch(
            (threads + 1) // 2 + 2 if case.kernels.queued else threads, case.d_sae, dtype=torch.int64
        ),
        "entries": (
            case.out(case.d_sae + 1, dtype=torch.int64), case.out(nnz, dtype=torch.int32),
            case.out(nnz), case.out(nnz),
            # As many as there are features with long lists, and perhaps more: the rest is not written.
            case.scratch(1 + case.slots, dtype=torch.int32) if noting else None, case.slots,
        ),
        "grad_b_enc": case.out(case.d_sae), "z_sum": case.out(case.d_sae),
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
def b_dec_gradient(case: Case, threads: int) -> Built:
    arguments = {
        "exec": case.exec(threads), "grad": case.matrix("grad"), "grad_b_enc": case["grad_b_enc"],
        "W_enc": case.matrix("W_enc"), "rows": case.rows, "d_in": case.d_in, "d_sae": case.d_sae,
        "scratch": case.scratch(case.kernels.module.B_DEC_SHARES, case.d_in, dtype=torch.float64),
        "out": case.out(case.d_in),
    }  # fmt: skip
    pulled = case.exact("grad_b_enc") @ case.exact("W_enc")
    return arguments, {"out": case.exact("grad").sum(0) - pulled}


def feature_gradients(listed: bool, pulled: bool) -> Build:
    def build(case: Case, threads: int) -> Built:
        arguments = {
            "exec": case.exec(threads),
            "gradient": case.gradient(listed=listed, pulled=pulled),
            "dW_enc": case.out(case.d_sae, case.d_in),
            "dW_dec": case.out(case.d_sae, case.d_in),
        }
        dW_enc, dW_dec = case.gradient_rows(listed=listed, pulled=pulled)
        return arguments, {"dW_enc": dW_enc, "dW_dec": dW_dec}

    return build


def feature_norms(listed: bool, pulled: bool) -> Build:
    def build(case: Case, threads: int) -> Built:
        arguments = {
            "exec": case.exec(threads),
            "gradient": case.gradient(listed=listed, pulled=pulled),
            "dW_enc": None if case.kernels.queued else case.out(case.d_sae, case.d_in),
            "dW_dec": None if case.kernels.queued else case.out(case.d_sae, case.d_in),
            "out": case.out(case.d_sae, dtype=torch.float64),
        }
        rows = case.gradient_rows(listed=listed, pulled=pulled)
        squares = sum(gradient.square().sum(1) for gradient in rows)
        expected = {"out": squares + case.exact("grad_b_enc").square()}
        if arguments["dW_enc"] is not None:
            expected |= {"dW_enc": rows[0], "dW_dec": rows[1]}
        return arguments, expected

    return build


def update_features(listed: bool, pulled: bool, unit_norm: bool) -> Build:
    def build(case: Case, threads: int) -> Built:
        groups = {
            name: moments(case, case[name], seed)
            for name, seed in (("W_enc", 40), ("b_enc", 42), ("W_dec", 44))
        }
        gradient = case.gradient(listed=listed, pulled=pulled)
        if pulled:  # the rows that are pulled at are those that are updated
            gradient = (*gradient[:7], groups["W_dec"][0].inside, *gradient[8:])
        queued = case.kernels.queued
        copies = {
            name: case.out(case.d_sae, case.d_in, dtype=case.stored) if queued else None
            for name in ("W_enc_copy", "W_dec_copy")
        }
        scratch = case.on_cpu(threads, 2, case.d_in)
        if case.d_in * case.dtype.itemsize > case.kernels.module.SHARED_ROW:
            scratch = scratch or case.on_cuda(threads, case.d_in)
        arguments = {
            "exec": case.exec(threads), "gradient": gradient, "adam": ADAM,
            "unit_norm": unit_norm, "scratch": scratch, **groups, **copies,
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
        if queued:
            expected |= {f"{name}_copy": expected[f"{name}.0"] for name in ("W_enc", "W_dec")}
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
def update(case: Case, threads: int) -> Built:
    n = case.rows * case.d_sae
    gradient = random(n, dtype=case.dtype, seed=50)
    group = moments(case, random(n, dtype=case.dtype, seed=51), 52)
    arguments = {
        "exec": case.exec(threads), "gradient": gradient, "n": n, "adam": ADAM, "parameter": group,
    }  # fmt: skip
    after = adamw(group, gradient.double())
    return arguments, {f"parameter.{i}": tensor for i, tensor in enumerate(after)}


@builds("row_norms")
def row_norms(case: Case, threads: int) -> Built:
    arguments = {
        "exec": case.exec(threads), "matrix": case["W_dec"], "rows": case.d_sae,
        "d_in": case.d_in, "out": case.out(case.d_sae),
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
def dense_activate(case: Case, threads: int) -> Built:
    d_sae = case.d_sae
    fired, saturated = torch.arange(d_sae), torch.tensor([100])
    z_sum = random(2, d_sae, seed=60)
    arguments = {
        "exec": case.exec(threads), "pre": case.changed(case.matrix("pre")), "b_enc": case["b_enc"],
        "clip": case.clip, "row_weight": case.optional("s"), "rows": case.rows, "d_sae": d_sae,
        "passes": case.out(case.rows, (d_sae + 63) // 64, dtype=torch.int64),
        "fired": case.changed(fired), "saturated": case.changed(saturated),
        "z_sum": case.changed(z_sum), "scratch": case.on_cuda(threads, 4, d_sae, dtype=torch.float64),
    }  # fmt: skip
    weighted = (case.z * case.exact("s")[:, None]).sum(0)
    return arguments, {
        "pre": case.z,
        "passes": words_of(case.passes),
        "fired": fired + case.active.sum(0),
        "saturated": saturated + (case.active & ~case.passes).sum(),
        "z_sum": z_sum + torch.stack([case.z.sum(0), weighted]),
    }


def dense_residual(centred: bool) -> Build:
    def build(case: Case, threads: int) -> Built:
        sums, scale = torch.tensor([5.0, 7.0], dtype=torch.float64), 2 / case.rows
        arguments = {
            "exec": case.exec(threads), "grad": case.changed(case.matrix("product")),
            "x": case["x"], "b_dec": None if centred else case["b_dec"],
            "recon_weight": case.optional("w"), "recon_scale": scale, "rows": case.rows,
            "d_in": case.d_in, "halt": case.halt(),
            "row_sums": case.scratch(case.rows, dtype=torch.float64), "sums": case.changed(sums),
        }  # fmt: skip
        error, w = case.exact("product") - case.exact("x"), case.exact("w")
        if not centred:
            error += case.exact("b_dec")
        squares = error.square().sum(1)
        return arguments, {
            "grad": scale * w[:, None] * error,
            "sums": sums + torch.stack([squares.sum(), (w * squares).sum()]),
            **case.not_halted(),
        }

    return build


BUILDS["dense_residual"] = dense_residual(centred=False)
BUILDS["dense_residual of centred rows"] = dense_residual(centred=True)


@builds("dense_mask")
def dense_mask(case: Case, threads: int) -> Built:
    before, l1_scale = random(case.d_sae, seed=70), 3 / case.rows
    arguments = {
        "exec": case.exec(threads), "dz": case.changed(case.matrix("grad_z")),
        "passes": words_of(case.passes), "l1_weight": case.optional("s"),
        "feature_weight": case.optional("q"),
        "l1_scale": torch.tensor([l1_scale], dtype=torch.float64), "rows": case.rows,
        "d_sae": case.d_sae, "grad_b_enc": case.changed(before),
        "scratch": case.on_cuda(threads, case.d_sae, dtype=torch.float64),
    }  # fmt: skip
    price = l1_scale * case.exact("s")[:, None] * case.exact("q")
    after = (case.exact("grad_z") + price) * case.passes
    return arguments, {"dz": after, "grad_b_enc": before + after.sum(0)}


# ---- Runs ------------------------------------------------------------------------------------------


def kernel_of(name: str) -> str:
    return name.split(" ")[0]


def run(name: str, case: Case, threads: int = 2) -> Built:
    """The arguments of a call that has been made, and what it should have written."""
    arguments, expected = BUILDS[name](case, threads)
    assert case.kernels.call(kernel_of(name), arguments) in (None, _C.OK)
    return arguments, expected


def run_and_compare(name: str, case: Case, threads: int = 2) -> None:
    arguments, expected = run(name, case, threads)
    compare(name, case, arguments, expected)


def compare(name: str, case: Case, arguments: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Every element is written, and what is written is right."""
    got = results(arguments)
    assert got.keys() == expected.keys()
    for field, array in arrays(arguments):
        assert array.role != "out" or not bool(array.unwritten().any()), f"{field} has poison left"
    for field, tensor in expected.items():
        if not tensor.is_floating_point():
            assert torch.equal(got[field], tensor), field
            continue
        error = got[field].double() - tensor
        allowed = (1e-12 if case.stored == torch.float64 else 1e-5) * (1 + tensor.norm().item())
        if got[field].dtype == torch.bfloat16:
            error = (error.abs() - 2**-8 * tensor.abs()).clamp(min=0)
            assert error.max().item() <= allowed, f"{field} is more than rounded"
            continue
        if case.stored == torch.bfloat16 and kernel_of(name) == "residual" and field == "dz":
            allowed *= 2**-8 / 1e-5  # made of a gradient that is rounded
        assert error.norm().item() <= allowed, f"{field} is off by {error.norm().item():g}"


def listed(
    kernels: Kernels,
    pre: Tensor,
    bias: Tensor,
    *,
    clip: float = math.inf,
    out: tuple[Any, ...] | None = None,
    capacity: int | None = None,
    first: int = 0,
    skip: Tensor | None = None,
) -> tuple[int | None, tuple[Any, ...]]:
    """What `compact` returns and the arrays it filled, as long as needed or `capacity`, or these."""
    if capacity is None:
        capacity = first + int((~(pre + bias <= 0)).sum())
    rows, d_sae = pre.shape
    if out is None:
        out = code_out(rows, capacity, bias.dtype, first)
    counts = Guarded((rows, 2), torch.int32, "scratch") if kernels.queued else None
    code = kernels.call(
        "compact",
        {
            "exec": kernels.exec(pre.dtype, skip=skip), "pre": pre, "b_enc": bias, "clip": clip, "rows": rows,
            "d_sae": d_sae, "mask": Guarded((rows, (d_sae + 63) // 64), torch.int64, "scratch"),
            "counts": counts, "out": out,
        },
    )  # fmt: skip
    return code, out


# rows, d_in, d_sae: one of each, tails of registers and words, several blocks of columns.
SHAPES = [
    (1, 1, 1), (41, 70, 150), (5, 64, 64), (3, 17, 600), (130, 3, 65), (5, 2056, 24),
]  # fmt: skip


def cases(kernels: Kernels, dtype: torch.dtype) -> list[Case]:
    """Of every shape with and without weights, on arrays that start where they should or anywhere."""
    return [
        *(Case(kernels, dtype, *shape, aligned=True) for shape in SHAPES),
        *(Case(kernels, dtype, *shape, weighted=False) for shape in SHAPES[1:4]),
    ]
