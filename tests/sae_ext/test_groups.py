"""Several processes that train one autoencoder: the fused step with a group, and DDP around autoencode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from made_up_weights import batch, copied, made_up, state, stretched, support_of
from on_device import DEVICES, simulation
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sae_ext import native, step_cpu, step_cuda
from sae_ext.ops import AdamState, Parameters, Step, autoencode

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]
compiled = pytest.mark.skipif(native.MISSING is not None, reason="the kernels are not built")
ROWS = [30, 67]
"""Of the members: not the same number."""


def begin(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if backend == "cuda" else "gloo", init_method=f"file://{folder}/meeting", rank=rank,
        world_size=len(ROWS),
    )  # fmt: skip


def problem(device: torch.device, decoder_norm: str) -> Parameters:
    params = made_up(24, 70, bias=-0.5)
    params = stretched(params) if decoder_norm == "free" else params
    return Parameters(**{name: t.to(device) for name, t in params.tensors().items()})


def settings(x: Tensor, way: str, decoder_norm: str, limited: bool) -> dict[str, Any]:
    out: dict[str, Any] = {
        "l1": 0.3, "lr": 0.01, "eps": 1e-2, "clip": 1.0, "decoder_norm": decoder_norm,
        "max_grad_norm": 0.5 if limited else None, "recon_weight": x[:, 0].abs(),
        "l1_weight": x[:, 1].abs(),
    }  # fmt: skip
    if way == "gathered":
        support = support_of(x[:, :1].cpu() > torch.linspace(-2, 2, 70))
        out["support"] = type(support)(*(t.to(x.device) for t in support))
    return out


# Ways of a step, kinds of decoder, whether the gradients' norm is limited.
CASES = [
    (way, decoder_norm, limited)
    for way, decoder_norm in (("entries", "free"), ("dense", "free"), ("gathered", "unit"))
    for limited in (False, True)
]


def member(rank: int, folder: str, backend: str) -> None:
    """One process's part: steps on its rows, in every case; leaves what it ends with."""
    begin(rank, folder, backend)
    device = torch.device("cuda", rank) if backend == "cuda" else torch.device("cpu")
    if backend == "simulated":
        for thing, name, value in simulation():
            setattr(thing, name, value)
    step_cuda._FIRST_L0, step_cuda._ROOM = 1, 1.0
    again, make_good = [], step_cuda.Queue._make_good
    step_cuda.Queue._make_good = lambda *a: again.append(1) or make_good(*a)
    ends = []
    for way, decoder_norm, limited in CASES:
        step_cpu.DENSE_ABOVE = -1.0 if way == "dense" else 2.0
        for limits in (step_cuda._SPARSE_BELOW, step_cuda._DENSE_ABOVE):
            limits["float32"] = step_cpu.DENSE_ABOVE
        again.clear()
        params = problem(device, decoder_norm)
        adam, step = AdamState.zeros(params), Step({"simulated": "cuda"}.get(backend, backend))
        seen = []
        for i in range(3):
            # More and more fires at the second member, which so stumbles over arrays that are too short.
            x = batch(sum(ROWS), 24, seed=i).split(ROWS)[rank].to(device) * (1 + 3 * i * rank)
            result = step(
                params, adam, x, group=dist.group.WORLD, **settings(x, way, decoder_norm, limited)
            )
            seen.append((result.loss, result.nnz, result.saturated, result.grad_norm, result.fired))
        step.wait()
        # Both do a step again where one had too little room.
        assert bool(again) == (step._queue is not None and way == "entries")
        ends.append((state(params, adam), seen))
    torch.save(ends, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=compiled), "reference", *DEVICES])
def test_members_end_where_one_process_with_all_their_rows_does(tmp_path, backend):
    if backend == "cuda" and torch.cuda.device_count() < len(ROWS):
        pytest.skip("fewer GPUs than members")
    multiprocessing.spawn(member, (str(tmp_path), backend), nprocs=len(ROWS))
    ends = [torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(len(ROWS))]
    for case, first, second in zip(CASES, *ends, strict=True):
        way, decoder_norm, limited = case
        params = problem(torch.device("cpu"), decoder_norm)
        adam, step = AdamState.zeros(params), Step("reference")
        alone = []
        for i in range(3):
            x = batch(sum(ROWS), 24, seed=i)
            x[ROWS[0] :] *= 1 + 3 * i
            alone.append(step(params, adam, x, **settings(x, way, decoder_norm, limited)))
        for name, tensor in state(params, adam).items():
            assert torch.equal(first[0][name], second[0][name]), (case, name)
            torch.testing.assert_close(first[0][name], tensor, rtol=1e-10, atol=1e-10)
        for seen in (*zip(first[1], alone, strict=True), *zip(second[1], alone, strict=True)):
            (loss, nnz, saturated, norm, fired), expected = seen
            assert loss == pytest.approx(expected.loss, rel=1e-10)
            assert (nnz, saturated) == (expected.nnz, expected.saturated)
            assert (norm is not None) == limited
            assert norm == (pytest.approx(expected.grad_norm, rel=1e-9) if limited else None)
            assert torch.equal(fired, expected.fired)


class Autoencoder(nn.Module):
    """A module of a user's own around the operator."""

    def __init__(self, params: Parameters) -> None:
        super().__init__()
        self.weights = nn.ParameterDict(params.tensors())

    def forward(self, x: Tensor) -> Tensor:
        out = autoencode(x, Parameters(**{k: self.weights[k] for k in self.weights}), clip=1.0)
        return (out.x_hat - x).square().sum(1).mean() + 0.3 * out.l1.mean()


def trained(module: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01, eps=1e-2)
    for x in batches:
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()


def ddp_member(rank: int, folder: str) -> None:
    begin(rank, folder, "cpu")
    module = Autoencoder(copied(made_up(24, 70, bias=-0.5)))
    trained(
        DistributedDataParallel(module), [batch(60, 24, seed=i).chunk(2)[rank] for i in range(3)]
    )
    torch.save(module.state_dict(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_the_differentiable_operator_trains_under_ddp(tmp_path):
    multiprocessing.spawn(ddp_member, (str(tmp_path),), nprocs=len(ROWS))
    alone = Autoencoder(copied(made_up(24, 70, bias=-0.5)))
    trained(alone, [batch(60, 24, seed=i) for i in range(3)])
    ends = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(ROWS))]
    for name, tensor in alone.state_dict().items():
        assert torch.equal(ends[0][name], ends[1][name]), name
        torch.testing.assert_close(ends[0][name], tensor, rtol=1e-10, atol=1e-10)
