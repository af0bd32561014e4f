"""Several processes that train one autoencoder end where one with all their rows does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from made_up_training import Folder, fit, same_weights, variant, weights

from sae_ext.config import SAEConfig, TrainConfig, with_changes
from sae_ext.errors import Stopped, UserError
from sae_ext.training.job import Place, Trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]
MEMBERS = 2
ROWS = 33  # of a batch: shares of 16 and 17

CASES = [
    ("relu", "plain"),
    ("relu", "revival"),
    ("relu", "max_grad_norm"),
    ("relu", "buffer"),
    ("relu", "early_stopping"),
    ("topk", "plain"),
    ("jumprelu", "plain"),
    ("jumprelu", "revival"),
]
REFUSED = {
    ("batchtopk", "plain"): "sae.architecture (BatchTopK)",
    ("relu", "usage"): "train.objective.usage (Usage)",
    ("topk", "auxk"): "train.objective.auxk (AuxK)",
}
INTERRUPTED = ("jumprelu", "revival")


def case(architecture: str, name: str) -> tuple[SAEConfig, TrainConfig]:
    sae, config = variant(architecture, name)
    weighted = with_changes(config, {"batch_rows": ROWS, "keep_checkpoints": True})
    return sae, with_changes(weighted, {"objective.mse.row_weight": "importance"})


@contextlib.contextmanager
def joined(rank: int, folder: str) -> Any:
    """The place of a member of the group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=MEMBERS,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    yield Place(group=dist.group.WORLD)
    dist.destroy_process_group()


def member(rank: int, folder: str) -> None:
    """Every case from its beginning to its end, and what is refused; leaves what it found."""
    found: dict[Any, Any] = {}
    with joined(rank, folder) as place:
        for name in CASES:
            saved: list[bytes] = []
            kept: list[int] = []
            trained = fit(
                *case(*name), place=place, save_checkpoint=saved.append,
                keep=lambda step, *_, kept=kept: kept.append(step),
            )  # fmt: skip
            found[name] = trained, len(saved), kept
        for name in REFUSED:
            try:
                fit(*case(*name), place=place)
            except UserError as error:
                found[name] = str(error)
        found["stopped"] = stopped_and_resumed(rank, place, Folder(Path(folder)))
    torch.save(found, Path(folder) / f"{rank}.pt")


def stopped_and_resumed(rank: int, place: Place, kept: Folder) -> tuple[str, Trained]:
    """The second member alone is told to stop, in its 14th step or so."""
    hooks = {"load_checkpoint": kept.load, "save_checkpoint": kept.save, "place": place}
    looks = iter(range(100))
    said = ""
    try:
        fit(*case(*INTERRUPTED), stop=lambda: rank == 1 and next(looks) > 1, **hooks)
    except Stopped as error:
        said = str(error)
    dist.barrier()
    return said, fit(*case(*INTERRUPTED), **hooks)


def dying_member(rank: int, folder: str) -> None:
    """The second member is killed after step 25; the first writes down what it made of that."""

    def on_line(line: dict[str, float]) -> None:
        if rank == 1 and line["step"] == 25:
            os.kill(os.getpid(), signal.SIGKILL)

    kept = Folder(Path(folder))
    with joined(rank, folder) as place:
        try:
            fit(*case(*INTERRUPTED), place=place, save_checkpoint=kept.save, on_line=on_line)
        except RuntimeError as error:
            (kept.path / "said").write_text(str(error))
            os._exit(7)


def resuming_member(rank: int, folder: str) -> None:
    """Both go on from what the first had saved."""
    kept = Folder(Path(folder))
    begun: list[float] = []
    with joined(rank, folder) as place:
        trained = fit(
            *case(*INTERRUPTED), place=place, load_checkpoint=kept.load, save_checkpoint=kept.save,
            on_line=lambda line: begun.append(line["step"]),
        )  # fmt: skip
    torch.save((trained, begun), kept.path / f"{rank}.pt")


def together(target: Any, folder: Path) -> list[int]:
    """Run the members; their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "sae_ext.training.run"])
    (folder / "meeting").unlink(missing_ok=True)
    processes = [context.Process(target=target, args=(r, str(folder))) for r in range(MEMBERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def alike(one: Trained, two: Trained) -> bool:
    """Whether two results are the same, bit for bit, in all that every member has."""
    return (
        same_weights(one, two)
        and one.history.equals(two.history)
        and one.events.equals(two.events)
        and (one.steps, one.penalty, one.scale) == (two.steps, two.penalty, two.scale)
    )


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[dict[Any, Any]]:
    """What each member found."""
    folder = tmp_path_factory.mktemp("group")
    assert together(member, folder) == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(MEMBERS)]


@pytest.mark.parametrize("name", CASES, ids="-".join)
def test_members_end_alike_and_as_one_process_with_all_rows(ends, one_thread, name):
    (first, saves, kept), (second, no_saves, not_kept) = (end[name] for end in ends)
    assert alike(first, second)
    alone = fit(*case(*name))
    assert first.validation["fvu"] == pytest.approx(alone.validation["fvu"], rel=1e-3)
    assert second.validation == {"n_rows": 0}  # of several the first alone judges
    assert alone.steps == first.steps
    for column in ("loss", "mse", "fvu", "l0", "lr", "l1", "validation_fvu"):
        found, expected = (t.history[column].drop_null().to_pylist() for t in (first, alone))
        assert found == pytest.approx(expected, rel=1e-3), column
    assert first.history["dead_fraction"].equals(alone.history["dead_fraction"])
    assert first.history["step"].equals(alone.history["step"])
    assert [(e["step"], e["event"], e["features"]) for e in first.events.to_pylist()] == [
        (e["step"], e["event"], e["features"]) for e in alone.events.to_pylist()
    ]
    assert ("revival" in name) == (first.events["event"].to_pylist().count("revived") > 0)
    for tensor, expected in zip(weights(first).values(), weights(alone).values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-2, atol=2e-3)
    # Of several the first alone saves.
    assert (saves, kept) == (alone.steps // 10, list(range(10, alone.steps + 1, 10)))
    assert (no_saves, not_kept) == (0, [])


@pytest.mark.parametrize("name", REFUSED, ids="-".join)
def test_what_looks_at_a_whole_batch_is_refused(ends, name):
    for end in ends:
        assert end[name].startswith(REFUSED[name])
        assert "set resources.train_workers to 1" in end[name]


def test_one_member_that_is_told_to_stop_stops_all_at_one_step_and_they_go_on(ends):
    for end in ends:
        said, resumed = end["stopped"]
        assert said == "stopped after step 10; a checkpoint is saved"
        assert alike(resumed, end[INTERRUPTED][0])
        assert resumed.validation == end[INTERRUPTED][0].validation


def test_a_member_that_is_killed_ends_the_others_and_all_go_on_bit_for_bit(ends, tmp_path):
    assert together(dying_member, tmp_path) == [7, -signal.SIGKILL]
    assert (tmp_path / "said").read_text()
    assert together(resuming_member, tmp_path) == [0, 0]
    for rank in range(MEMBERS):
        resumed, steps = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert steps == [25, 30, 35, 40]  # from the checkpoint of step 20
        assert alike(resumed, ends[rank][INTERRUPTED][0])
        assert resumed.validation == ends[rank][INTERRUPTED][0].validation
