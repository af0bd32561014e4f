"""One training step by the compiled kernels on a GPU: queued, never waited for while it runs.

A step's length is not known beforehand (how many entries are active), and Python is not told while it
runs. So arrays have room for what recent steps needed; where that is too little, or where the loss is no
number, a flag on the device stops this step and all after it from changing anything. `Queue` looks at
the flag two steps later, makes room, and does the stopped steps again in their order. Nothing is
dropped, and the numbers are those of a step that had room at once.

Which way a step takes, entries or the dense phase, follows from the density of an earlier step; `state`
holds what a resumed run needs to go the same way.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sae_ext import native
from sae_ext.errors import UserError
from sae_ext.native import Gradient, Run, Spaces, at
from sae_ext.parameters import (
    AdamState,
    Objective,
    Parameters,
    SparseCode,
    StepResult,
    Support,
    Update,
    check_finite,
)

if native.MISSING is None:
    from sae_ext import _C

Precision = Literal["float32", "tf32", "bfloat16"]

_PRE_BYTES = 25 << 20  # pre-activations of one chunk of rows: they stay in the second-level cache
# Rows of a chunk: enough that weights are not read too often, and whole tiles of a product.
_LEAST_ROWS, _ROWS_EACH = 512, 256
_DENSE_BYTES = 1 << 30  # the same in the dense phase
_SHARED_BYTES = 48 << 10  # decoder rows that a block keeps between its two passes over them
_FIRST_L0 = 64  # active features per row that the first arrays have room for
_ROOM = 1.5  # length of the arrays for what the last known step needed, once it comes near to that
_NEAR = 1.2
_PROBE_ROWS = 64  # rows of the first batch that tell how a run begins
_DEPTH = 2  # steps under way at once: the device has one to do while Python queues the next

# Densities below which a step lists entries, and above which it takes the dense phase again: from a
# roofline of an H200 (docs/kernels.md), to be replaced by what is measured.
_SPARSE_BELOW = {"float32": 0.04, "tf32": 0.008, "bfloat16": 0.008}
_DENSE_ABOVE = {"float32": 0.06, "tf32": 0.012, "bfloat16": 0.012}


@dataclass(eq=False)
class _Job:
    """A step that may have to be done again: all it reads is its own."""

    params: Parameters
    adam: AdamState
    x: Tensor
    objective: Objective
    update: Update
    support: Support | None
    step: int
    """Adam's number of this update."""
    sparse: bool
    slot: _Slot
    group: dist.ProcessGroup | None
    check: Callable[[Objective, Support | None], None]
    """Raises `UserError` for weights or a support that are wrong, and says where."""
    halts: bool = True
    """Whether a loss that is no number stops it."""
    fired: Tensor | None = None
    result: StepResult | None = None
    given_up: Exception | None = None
    """Why there will be no result."""


class _Slot:
    """Memory for one step under way: its numbers on their way to the device, its results on theirs back."""

    def __init__(self, device: torch.device) -> None:
        pinned = device.type == "cuda"
        cpu = torch.device("cpu")  # whatever the default device is
        self.numbers = torch.empty(7, dtype=torch.float64, device=cpu, pin_memory=pinned)
        self.record = torch.empty(_RECORD, dtype=torch.uint8, device=cpu, pin_memory=pinned)
        self.event = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    def done(self) -> None:
        """Everything queued so far belongs to this step."""
        if self.event is not None:
            self.event.record()

    def wait(self) -> None:
        """Until this step has run."""
        if self.event is not None:
            self.event.synchronize()


# What a step tells Python, in one piece of memory: four counters, two totals, five sums, the gradients' norm.
_RECORD = 12 * 8
_WRONG_ARGUMENT = 3
"""Why steps have been stopped, beside _C.TOO_SHORT and _C.NOT_FINITE."""


class _Record:
    """The same on the device, and as numbers."""

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw
        self.counters = raw[:32].view(torch.int64)
        """Entries; of these above the clip; candidates; why a step has been stopped, 0 where none has."""
        self.totals = raw[32:48].view(torch.int64)
        """The first two, of all members of a group."""
        self.sums = raw[48:88].view(torch.float64)
        """Σ_b ‖e_b‖², Σ_b Σ_j p_j n_j z_bj, these with the rows' weights, rows; of all members."""
        self.norm = raw[88:].view(torch.float64)


class CudaStepResult:
    """What one step saw; the first look at a number waits until the step has run.

    The fields are those of `StepResult`.
    """

    def __init__(self, queue: Queue, job: _Job) -> None:
        self._queue, self._job = queue, job

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._queue.result_of(self._job), name)


class Queue:
    """Steps under way on one device."""

    def __init__(self, device: torch.device, precision: Precision, *, capture: bool) -> None:
        self.device, self._precision, self._capture = device, precision, capture
        self._spaces = Spaces(device)
        self._jobs: deque[_Job] = deque()
        self._slots = [_Slot(device) for _ in range(_DEPTH)]
        self._turn = 0
        self._record = _Record(torch.zeros(_RECORD, dtype=torch.uint8, device=device))
        self._numbers = torch.empty(7, dtype=torch.float64, device=device)
        self._capacity = 0
        self._sparse = False
        self._densities: deque[float] = deque(maxlen=_DEPTH)
        """Of the last steps that are known, the newest last."""
        self._copies: _Copies | None = None
        self._graphs: dict[Any, _Graph] = {}
        self._graphs_of = -1
        """How often a workspace had grown when the graphs were captured."""
        self._stream: Any = None

    # ---- What Step calls ----

    def step(
        self,
        params: Parameters,
        adam: AdamState,
        x: Tensor,
        objective: Objective,
        update: Update,
        support: Support | None,
        group: dist.ProcessGroup | None,
        check: Callable[[Objective, Support | None], None],
    ) -> CudaStepResult:
        """Queue one training step in place; `adam.step` is counted up.

        `check` raises `UserError` where weights or the support hold what they should not: called only
        if the device finds that out.
        """
        with self._on_device():
            while len(self._jobs) >= _DEPTH:
                self._settle()
            objective = replace(
                objective,
                recon_weight=self._own("recon_weight", objective.recon_weight),
                l1_weight=self._own("l1_weight", objective.l1_weight),
                feature_weight=self._own("feature_weight", objective.feature_weight),
            )
            if support is not None:
                support = Support(*(t.clone() for t in support))
            own_x = self._own("x", x)
            assert own_x is not None
            job = _Job(
                params, adam, own_x, objective, update, support, adam.step + 1,
                support is not None or self._takes_entries(params, x, group),
                self._slots[self._turn], group, check,
            )  # fmt: skip
            try:
                self._enqueue(job)
            except Exception:
                self._recover()
                raise
            adam.step += 1
            self._turn = (self._turn + 1) % _DEPTH
            self._jobs.append(job)
            if group is not None:  # members must agree at once on what is done again
                while self._jobs:
                    self._settle()
            return CudaStepResult(self, job)

    def wait(self) -> None:
        """Until every step has run and nothing will be done again."""
        with self._on_device():
            while self._jobs:
                self._settle()

    def result_of(self, job: _Job) -> StepResult:
        """The numbers of a step, waited for."""
        with self._on_device():
            while job.result is None and job in self._jobs:
                self._settle()
        if job.result is None:
            assert job.given_up is not None
            raise job.given_up
        return job.result

    def state(self) -> dict[str, Any]:
        """What the next steps' ways follow from; waits for all steps under way."""
        self.wait()
        return {"sparse": self._sparse, "densities": list(self._densities)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self.wait()
        self._sparse = bool(state["sparse"])
        self._densities = deque(state["densities"], maxlen=_DEPTH)

    # ---- The order of steps ----

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """The device, the stream after all that was queued before, and the products' precision."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            matmul = torch.backends.cuda.matmul
            before = matmul.fp32_precision
            matmul.fp32_precision = "tf32" if self._precision == "tf32" else "ieee"
            try:
                yield
            finally:
                matmul.fp32_precision = before

    def _own(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """A copy that the caller cannot overwrite, in the place of this turn's step."""
        if tensor is None:
            return None
        space = self._spaces.always
        return space.get(f"{name} {self._turn}", tensor.dtype, *tensor.shape).copy_(tensor)

    def _takes_entries(
        self, params: Parameters, x: Tensor, group: dist.ProcessGroup | None
    ) -> bool:
        """Whether the next step lists entries; what is looked at is the same whenever results are read."""
        if len(self._densities) < _DEPTH:  # the first step: the one time that Python waits
            some = x[:: -(-len(x) // _PROBE_ROWS)] - params.b_dec
            active = torch.addmm(params.b_enc, some, params.W_enc) > 0
            counts = torch.stack([active.sum(), torch.ones_like(active, dtype=torch.int64).sum()])
            if group is not None:
                dist.all_reduce(counts, group=group)
            fired, all_of_them = counts.tolist()
            self._densities.extend([fired / all_of_them] * _DEPTH)
        pending = sum(job.support is None for job in self._jobs)
        back = _DEPTH - pending  # the step _DEPTH before the next, known by now in any case
        limit = (_DENSE_ABOVE if self._sparse else _SPARSE_BELOW)[self._precision]
        self._sparse = self._densities[-back] < limit
        return self._sparse

    def _enqueue(self, job: _Job) -> None:
        """Queue the kernels of a step and the way back of what they find."""
        u = job.update
        batch = len(job.x) if job.group is None else 1
        job.slot.numbers.copy_(
            torch.tensor(
                [*native.adam_numbers(u, job.step), job.objective.l1 / batch],
                dtype=torch.float64,
                device="cpu",
            )
        )
        self._numbers.copy_(job.slot.numbers, non_blocking=True)
        if self._precision == "bfloat16":
            self._copies = _Copies.of(job.params, self._copies)
        if job.sparse:
            self._spaces.dense.clear()
            least = min(_FIRST_L0, len(job.params.b_enc)) * len(job.x)
            self._capacity = max(self._capacity, least)
        program = _Program(self, job)
        if self._capture and job.group is None and job.support is None:
            job.fired = self._replay(program).clone()
        else:
            job.fired = program.queue()
        for params in (job.params, job.adam.m, job.adam.v):
            # Autograd cannot see kernels write: so a backward through the old values is refused.
            torch.autograd.graph.increment_version(params.tensors().values())
        if self._copies is not None:
            self._copies.settle(job.params)
        job.slot.record.copy_(self._record.raw, non_blocking=True)
        job.slot.done()

    def _replay(self, program: _Program) -> Tensor:
        """Queue a step as a graph, captured when the same one comes the second time."""
        grown = self._spaces.always.grown
        if grown != self._graphs_of:  # they would write where something else is by now
            self._graphs.clear()
            self._graphs_of = grown
        graph = self._graphs.get(program.key)
        if graph is None:
            self._graphs[program.key] = _Graph()
            return program.queue()
        return graph.replay(program.queue, self.device)

    def _settle(self) -> None:
        """Wait for the oldest step and take its result, or do it and all after it again."""
        job = self._jobs[0]
        job.slot.wait()
        seen = _Record(job.slot.record)
        if int(seen.counters[3]):
            self._record.counters.zero_()
            queued = 0
            try:
                self._make_good(job, seen)
                for again in self._jobs:
                    self._enqueue(again)
                    queued += 1
            except Exception as error:
                while len(self._jobs) > queued:
                    job = self._jobs.pop()
                    job.given_up = error
                    job.adam.step = job.step - 1
                self._recover()
                raise
            return
        self._jobs.popleft()
        entries, saturated = seen.totals.tolist()
        squared_error, l1, weighted_error, weighted_l1, rows = seen.sums.tolist()
        loss = (weighted_error + job.objective.l1 * weighted_l1) / rows
        norm = None if job.update.max_grad_norm is None else float(seen.norm)
        assert job.fired is not None
        job.result = StepResult(loss, squared_error, l1, entries, saturated, job.fired, norm)
        if job.support is None:
            density = entries / (rows * len(job.params.b_enc))
            self._densities.append(density)
            own = int(seen.counters[0])
            if density < _DENSE_ABOVE[self._precision] and _NEAR * own > self._capacity:
                self._capacity = min(math.ceil(_ROOM * own), len(job.x) * len(job.params.b_enc))
        job.support = None  # a result may be kept for long

    def _recover(self) -> None:
        """After a step that could not be queued: those before it end, then what it left of a flag goes."""
        while self._jobs:
            self._settle()
        self._record.counters.zero_()

    def _make_good(self, job: _Job, seen: _Record) -> None:
        """Remove what stopped a step; raises `Diverged` or `UserError` where that cannot be done."""
        entries, _, candidates, reason = seen.counters.tolist()
        if reason in (_C.TOO_SHORT, _C.NOT_FINITE):
            check_finite(job.params, math.nan)
        if reason == _C.TOO_SHORT:
            if candidates:  # this member's arrays, or another's: in a group nobody knows whose
                # Counted up to the rows that did not fit; the rest may be like them.
                everything = len(job.x) * len(job.params.b_enc)
                needed = 1.25 * entries * max(everything / candidates, 1.0)
                self._capacity = max(self._capacity, min(math.ceil(needed), everything))
        elif reason == _C.NOT_FINITE:
            job.halts = False  # the batch is to blame: as in PyTorch, that reaches the parameters
        else:
            job.check(job.objective, job.support)
            raise UserError("the arguments of another member of the group were refused there")


@dataclass
class _Copies:
    """The weights in bfloat16, written by each update beside the weights themselves."""

    of_weights: tuple[Any, ...]
    W_enc_rows: Tensor
    W_dec: Tensor

    @classmethod
    def of(cls, params: Parameters, last: _Copies | None) -> _Copies:
        """Those of before, unless something else has touched the weights since."""
        if last is not None and last.of_weights == _identity(params):
            return last
        copies = [t.to(torch.bfloat16) for t in (params.W_enc_rows, params.W_dec)]
        if last is not None and last.W_dec.shape == copies[1].shape:  # graphs know the old places
            copies = [last.W_enc_rows.copy_(copies[0]), last.W_dec.copy_(copies[1])]
        return cls(_identity(params), *copies)

    def settle(self, params: Parameters) -> None:
        """An update has written both."""
        self.of_weights = _identity(params)


def _identity(params: Parameters) -> tuple[Any, ...]:
    weights = (params.W_enc_rows, params.W_dec)
    return tuple((t.data_ptr(), t._version) for t in weights)


class _Program:
    """The kernels of one step. What differs between two steps of one `key` is read from memory."""

    def __init__(self, queue: Queue, job: _Job) -> None:
        self._job, self._group = job, job.group
        self._record, self._copies = queue._record, queue._copies
        self._numbers, self._l1_scale = queue._numbers[:6], queue._numbers[6:]
        self._capacity = queue._capacity
        self._space, self._dense_space = queue._spaces.always, queue._spaces.dense
        dtype = job.params.W_dec.dtype
        matrix = torch.bfloat16 if queue._precision == "bfloat16" else dtype
        self._run = Run(queue.device, dtype, matrix, True, self._record.counters[3:])
        self._batch = len(job.x) if job.group is None else 1

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for steps that queue the same kernels on the same memory."""
        job, o, u = self._job, self._job.objective, self._job.update
        tensors = [
            *(t for g in (job.params, job.adam.m, job.adam.v) for t in g.tensors().values()),
            job.x, o.recon_weight, o.l1_weight, o.feature_weight, *self._weights,
        ]  # fmt: skip
        return (
            job.sparse, self._capacity if job.sparse else 0, tuple(job.x.shape), job.halts,
            o.clip, o.decoder_norm, u.max_grad_norm, u.train_b_dec, tuple(map(at, tensors)),
            0 if job.sparse else self._dense_space.grown,
        )  # fmt: skip

    def queue(self) -> Tensor:
        """Queue everything; the rows in which each feature fired, int64 [d_sae]."""
        job, run, space, params = self._job, self._run, self._space, self._job.params
        self._record.counters[:3].zero_()
        self._record.sums[4:].fill_(len(job.x))
        self._halt_if_wrong()
        xc = space.get("xc", run.matrix, *job.x.shape)
        torch.sub(job.x, params.b_dec, out=xc)
        lengths, price = None, job.objective.feature_weight
        if job.objective.decoder_norm == "free":
            lengths = native.row_norms(params.W_dec, run)
            price = lengths if price is None else lengths * price
        if job.sparse:
            fired, gradient = self._entries(xc, price)
        else:
            fired, gradient = self._dense(xc, price)
        self._record.totals.copy_(self._record.counters[:2])
        native.set_pull(gradient, job.objective, lengths, self._l1_scale)
        self._update(gradient, fired, unit_norm=lengths is None)
        return fired

    def _halt_if_wrong(self) -> None:
        """Stop where arguments hold what they should not, before a kernel reads where they point."""
        job, halt = self._job, self._record.counters[3:]
        o = job.objective
        wrong = [
            ~((w >= 0) & (w < math.inf)).all()
            for w in (o.recon_weight, o.l1_weight, o.feature_weight)
            if w is not None
        ]
        if job.support is not None:
            wrong.append(_is_wrong(job.support, len(job.params.b_enc)))
        if wrong:
            stop = torch.stack(wrong).any() & (halt == 0)
            halt.copy_(torch.where(stop, _WRONG_ARGUMENT, halt))

    @property
    def _weights(self) -> tuple[Tensor, Tensor]:
        """W_enc_rows and W_dec in the format of products."""
        if self._copies is not None:
            return self._copies.W_enc_rows, self._copies.W_dec
        return self._job.params.W_enc_rows, self._job.params.W_dec

    def _entries(self, xc: Tensor, price: Tensor | None) -> tuple[Tensor, Gradient]:
        """Loss and gradients through the listed entries."""
        job, run, space, params = self._job, self._run, self._space, self._job.params
        W_enc_rows, W_dec = self._weights
        code = self._list(xc, W_enc_rows)
        grad, dz = native.residual(
            run, space, code, W_dec, job.x, params.b_dec, job.objective, price, self._batch,
            self._l1_scale, self._record.sums, shared_bytes=_SHARED_BYTES, halt=self._halt,
        )  # fmt: skip
        entries, grad_b_enc, z_sum = native.transpose(
            run, space, code, dz, job.objective.l1_weight, len(params.b_enc)
        )
        gradient = Gradient(xc, grad, grad_b_enc, z_sum, entries)
        return entries.feature_ptr.diff(), gradient

    @property
    def _halt(self) -> Tensor | None:
        return self._record.counters[3:] if self._job.halts else None

    def _list(self, xc: Tensor, W_enc_rows: Tensor) -> SparseCode:
        """The code, in arrays that are longer than it; its row_ptr tells where it ends."""
        job, run, space = self._job, self._run, self._space
        capacity = self._capacity if job.support is None else max(1, len(job.support.col))
        d_sae, d_in = W_enc_rows.shape
        row_ptr = space.get("row_ptr", torch.int64, len(xc) + 1)
        row_ptr[:1].zero_()
        col = space.get("col", torch.int32, capacity)
        val = space.get("val", run.dtype, capacity)
        counters, b_enc, clip = at(self._record.counters), at(job.params.b_enc), job.objective.clip
        if job.support is not None:
            _C.gather(
                exec=run.exec(), support_ptr=at(job.support.row_ptr),
                support_col=at(job.support.col), xc=at(xc), W_enc=at(W_enc_rows), b_enc=b_enc,
                clip=native.bound(clip), rows=len(xc), d_in=d_in,
                support_length=len(job.support.col),
                scratch=at(space.get("support", run.dtype, len(job.support.col))),
                counts=at(space.get("row_counts", torch.int32, len(xc), 2)),
                out=(at(row_ptr), at(col), at(val), capacity, counters),
            )  # fmt: skip
            return SparseCode(row_ptr, col, val)
        for rows in native.chunks(
            0, len(xc), d_sae * xc.itemsize, _PRE_BYTES, least=_LEAST_ROWS, each=_ROWS_EACH
        ):
            count = rows.stop - rows.start
            pre = space.get("pre", run.matrix, count, d_sae)
            torch.mm(xc[rows], W_enc_rows.T, out=pre)
            _C.compact(
                exec=run.exec(), pre=at(pre), b_enc=b_enc, clip=native.bound(clip), rows=count,
                d_sae=d_sae, mask=at(space.get("mask", torch.int64, count, (d_sae + 63) // 64)),
                counts=at(space.get("row_counts", torch.int32, count, 2)),
                out=(at(row_ptr[rows.start :]), at(col), at(val), capacity, counters),
            )  # fmt: skip
        return SparseCode(row_ptr, col, val)

    def _dense(self, xc: Tensor, price: Tensor | None) -> tuple[Tensor, Gradient]:
        """The same by five matrix products."""
        job, run, params = self._job, self._run, self._job.params
        space = self._dense_space
        grad = self._space.get("grad", run.matrix, *xc.shape)
        total = native.DenseSums(run, space, *params.W_dec.shape)
        W_enc_rows, W_dec = self._weights
        for rows in native.chunks(0, len(xc), len(W_dec) * xc.itemsize, _DENSE_BYTES):
            native.dense_chunk(
                run, space, total, params, job.x, params.b_dec, xc, grad, job.objective, price,
                self._batch, self._l1_scale, rows, W_enc_rows=W_enc_rows, W_dec=W_dec,
                halt=self._halt,
            )  # fmt: skip
        sums, counters = self._record.sums, self._record.counters
        priced = total.z_sum if price is None else total.z_sum * price
        sums[0:4:2].copy_(total.errors)
        sums[1:4:2].copy_(priced.sum(1))
        counters[:1].copy_(total.fired.sum())
        counters[1:2].copy_(total.saturated)
        gradient = Gradient(
            xc, grad, total.grad_b_enc.to(run.dtype), total.z_sum[1].to(run.dtype),
            dW_enc=total.dW_enc, dW_dec=total.dW_dec,
        )  # fmt: skip
        return total.fired, gradient

    def _update(self, gradient: Gradient, fired: Tensor, *, unit_norm: bool) -> None:
        """Move all parameters and their moments."""
        job, run, space, params = self._job, self._run, self._space, self._job.params
        b_dec, scale = None, None
        if job.update.train_b_dec:
            b_dec = native.b_dec_gradient(
                run, space, gradient.grad, gradient.grad_b_enc, self._weights[0]
            )
        if self._group is not None:
            # First of all whether any member is stopped: then all are.
            dist.all_reduce(self._record.counters[3:], op=dist.ReduceOp.MAX, group=self._group)
            also = [self._record.sums, self._record.totals, fired]
            also += [] if b_dec is None else [b_dec]
            gradient = native.reduced(run, space, gradient, params, self._group, also)
            scale = self._record.sums[4:].reciprocal()
        if job.update.max_grad_norm is not None:
            squared, gradient = native.squared_norms(run, space, gradient, params)
            squares = squared.sum()
            if b_dec is not None:
                squares = squares + b_dec.double().square().sum()
            norm = squares.sqrt().view(1)
            norm = norm if scale is None else norm * scale
            self._record.norm.copy_(norm)
            # Worded so that a norm that is no number reaches all parameters, as it does in PyTorch.
            limited = (job.update.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            scale = limited if scale is None else scale * limited
        copies = (None, None) if self._copies is None else self._weights
        native.move(
            run, space, params, job.adam, gradient, b_dec, self._numbers, scale,
            unit_norm=unit_norm, copies=copies,
        )  # fmt: skip


def _is_wrong(support: Support, d_sae: int) -> Tensor:
    """Whether some entry lies outside or does not ascend, on the support's device."""
    row_ptr, col = support
    starts = torch.zeros(len(col) + 1, dtype=torch.bool, device=col.device)
    starts[row_ptr.clamp(0, len(col))] = True
    return (
        (row_ptr[0] != 0) | (row_ptr[-1] != len(col)) | (row_ptr.diff() < 0).any()
        | ((col < 0) | (col >= d_sae)).any() | ~((col.diff() > 0) | starts[1:-1]).all()
    )  # fmt: skip


class _Graph:
    """A step's kernels as one graph, and what they leave behind."""

    def __init__(self) -> None:
        self._captured: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def replay(self, queue: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Queue the graph, captured now where it is not yet."""
        if self._captured is None:
            graph = torch.cuda.CUDAGraph()
            # A stream of this device; other threads may go on with theirs, loading data for one.
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                fired = queue()
            self._captured = graph, fired
        graph, fired = self._captured
        graph.replay()
        return fired
