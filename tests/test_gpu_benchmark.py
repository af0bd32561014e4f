"""The GPU's benchmark and check, as far as they go without one."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("sae_ext._C", reason="the kernels are not built")

from benchmarks.gpu import check, contenders, rows, sizes, small
from benchmarks.gpu.__main__ import Bench, Item
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.sweeps import Density, Point
from benchmarks.records import Bar
from benchmarks.step.parity import SETTINGS
from benchmarks.step.problem import Shape
from sae_ext import reference, step_cuda
from sae_ext.ops import Step
from sae_ext.parameters import Objective, Update

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHAPE = Shape(24, 96, 40)


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(CPU, sizes.TRIAL, tmp_path, None, {"date": "today"})


# ---- The whole of it ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trial_goes_through_everything_and_keeps_no_figures(tmp_path):
    results = ROOT / "benchmarks" / "results" / "gpu.csv"
    before = results.read_bytes() if results.exists() else None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--trial", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "wrong:" not in done.stdout
    report = done.stdout[done.stdout.rindex("copy on the device") :]
    for what in ("bar: times faster", "bar: loss over 200 steps", "_PRE_BYTES", "÷floor"):
        assert what in report
    with (tmp_path / "gpu.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert {line["precision"] for line in lines} == set(sizes.PRECISIONS)
    assert {line["contender"] for line in lines} >= {"ours", "dense eager", "dense compiled"}
    assert all(float(line["median_ms"]) > 0 and float(line["over_floor"]) > 0 for line in lines)
    assert len((tmp_path / "curve.csv").read_text(encoding="utf-8").splitlines()) == 201
    assert "five steps" in (tmp_path / "profile.txt").read_text(encoding="utf-8")
    assert (results.read_bytes() if results.exists() else None) == before


def test_the_sanitizers_script_runs(capsys):
    small.main()
    assert capsys.readouterr().out == "small: done\n"


# ---- The plan ----------------------------------------------------------------------------------------


def failing(message: str) -> Item:
    def fail() -> None:
        raise RuntimeError(message)

    return Item("the failing one", 0, fail)


def test_a_failure_is_told_and_stops_nothing_else(bench, monkeypatch, capsys):
    done: list[str] = []
    later = Item("later", 0, lambda: done.append("later"))
    monkeypatch.setattr(bench, "plan", lambda: [failing("no luck"), later])
    bench.run(deadline=time.monotonic() + 60)
    bench.report()
    assert done == ["later"]
    assert "wrong: the failing one: RuntimeError: no luck" in capsys.readouterr().out


def test_a_lost_device_ends_the_plan_and_the_report_still_comes(bench, monkeypatch, capsys):
    lost = failing("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(bench, "plan", lambda: [lost, failing("not reached")])
    bench.run(deadline=time.monotonic() + 60)
    bench.report()
    printed = capsys.readouterr().out
    assert "illegal memory access" in printed
    assert "not reached" not in printed


def test_what_does_not_fit_into_the_time_is_left_out_and_named(bench, monkeypatch, capsys):
    done: list[str] = []
    plan = [
        Item("the long one", 100, lambda: done.append("long")),
        Item("the short one", 1, lambda: done.append("short")),
    ]
    monkeypatch.setattr(bench, "plan", lambda: plan)
    bench.run(deadline=time.monotonic() + 50)
    bench.report()
    assert done == ["short"]
    assert "no time for: the long one" in capsys.readouterr().out


def test_every_bar_is_measured_before_what_has_none(bench):
    full = Bench(CPU, sizes.FULL, bench.out, None, {})
    names = [item.name for item in full.plan()]
    first_extra = next(i for i, name in enumerate(names) if "L0 16" in name)
    with_bars = [i for i, name in enumerate(names) if "L0 64" in name or "densities" in name]
    assert max(with_bars) < first_extra
    assert len(with_bars) == 3 * (len(sizes.FULL.faster) + 1)


# ---- Figures -----------------------------------------------------------------------------------------


def test_the_floor_is_the_lesser_way_at_the_measured_rates():
    shape = Shape(1000, 10_000, 500)
    found = Ceilings(
        copy=1e12, whole={(shape, "tf32"): 1e12}, chunked={(shape, "tf32"): 2e12},
        gathers={1 << 20: 4e12, 3 << 20: 2e12, 1 << 30: 1e12},
    )  # fmt: skip
    product, update = 5.0, 480.0 / 1000  # 10¹⁰ operations; 2·10⁷ parameters of 24 bytes
    few, many = 10_000, 10**8
    # 40 MB of rows: once from 40 MB of weights, twice from 2 MB of the batch.
    gathers = 40e6 / 1e12 * 1000 + 2 * 40e6 / 2e12 * 1000
    assert found.floor_ms(shape, "tf32", few) == pytest.approx(product + gathers + update)
    assert found.floor_ms(shape, "tf32", many) == pytest.approx(5 * product + update)
    assert found.floor_ms(shape, "bfloat16", few) is None


def test_the_crossover_lies_between_the_densities_where_the_ways_change_places():
    points = [Point(0.01, 1.0, 4.0, 4.0), Point(0.1, 8.0, 4.0, 4.0), Point(0.5, 9.0, 4.0, 4.0)]
    crossover = Density(SHAPE, "tf32", points).crossover()
    # In logarithms the ratio goes from 1/4 to 2: two thirds of the way.
    assert crossover == pytest.approx(0.01 * 10 ** (2 / 3))
    assert Density(SHAPE, "tf32", points[1:]).crossover() is None


def test_the_density_bar_follows_the_way_that_the_constants_choose(monkeypatch):
    points = [Point(0.01, 1.0, 4.0, 2.0), Point(0.1, 8.0, 3.0, 2.0)]
    for below, worst in ((0.05, 1.5), (0.5, 4.0), (0.0, 2.0)):
        monkeypatch.setitem(step_cuda._SPARSE_BELOW, "tf32", below)
        assert Density(SHAPE, "tf32", points).bar().measured == worst


@pytest.mark.parametrize(
    ("measured", "relation", "missed"),
    [(2.0, ">=", False), (1.9, ">=", True), (2.1, "<=", True), (None, "<=", False)],
)
def test_a_bar_is_missed_only_where_a_measured_figure_falls_short(measured, relation, missed):
    bar = Bar("speed", measured, relation, 2)
    assert bar.missed == missed
    assert ("MISSED" in str(bar)) == missed
    assert ("not measured" in str(bar)) == (measured is None)


# ---- Contenders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [contenders.OURS, contenders.EAGER, contenders.COMPILED])
def test_a_contender_takes_the_references_step(name, monkeypatch):
    monkeypatch.setattr(contenders, "SETTINGS", SETTINGS)
    start, l0 = sizes.made_up(SHAPE, CPU), 9.0
    params, adam = sizes.weights(start, l0)
    s = SETTINGS
    objective, update = Objective(l1=s.l1, clip=s.clip), Update(lr=s.lr, eps=s.eps)
    seen = reference.step(params, adam, start.x[0], objective, update)
    with torch.compiler.set_stance("force_eager"):
        contender = rows.BUILDERS[name](start, l0, "float32")
        contender(start.x[0])
    assert contender.loss() == pytest.approx(seen.loss, rel=1e-5)
    begin, _ = sizes.weights(start, l0)
    for key, expected in params.tensors().items():
        change = expected - begin.tensors()[key]
        error = contender._params.tensors()[key] - expected
        assert error.norm() <= 1e-3 * change.norm(), key


def test_a_contender_with_another_loss_is_told(monkeypatch):
    start = sizes.made_up(SHAPE, CPU)
    monkeypatch.setattr(rows, "_first_loss", lambda *args: 1.0)
    failures: list[str] = []
    rows.measure(start, "float32", 9, [contenders.OURS], Ceilings(), failures)
    assert len(failures) == 1
    assert "the first loss is off" in failures[0]


class Faulty(Step):
    """Moves weights by too much."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **{**kwargs, "lr": self.factor * kwargs["lr"]})


def test_the_check_passes_ours_and_not_a_step_that_is_off(monkeypatch):
    monkeypatch.setattr(check, "SHAPES", (SHAPE,))
    failures: list[str] = []
    check.steps(CPU, failures)
    assert failures == []
    monkeypatch.setattr(check, "own_step", lambda device, precision: Faulty(1.1))
    check.steps(CPU, failures)
    for precision in sizes.PRECISIONS:
        assert any(f"{precision}, by entries: the change of W_dec is off" in f for f in failures)


def test_a_curve_that_parts_from_the_references_misses_its_bar(monkeypatch, tmp_path):
    bars = check.curve(CPU, SHAPE, tmp_path / "curve.csv")
    assert not any(bar.missed for bar in bars)
    monkeypatch.setattr(check, "own_step", lambda device, precision: Faulty(1.1))
    bars = check.curve(CPU, SHAPE, tmp_path / "curve.csv")
    assert all(bar.missed for bar in bars)


def test_constants_come_back():
    before = dict(step_cuda._SPARSE_BELOW), step_cuda._PRE_BYTES
    with contenders.constants(**contenders.WAYS["entries"], _PRE_BYTES=7):
        assert step_cuda._PRE_BYTES == 7
        assert set(step_cuda._SPARSE_BELOW.values()) == {2.0}
    assert before == (step_cuda._SPARSE_BELOW, step_cuda._PRE_BYTES)


# ---- The script --------------------------------------------------------------------------------------

STUB = """#!/bin/bash
case "$*" in
  *sysconfig*) dirname "$0" ;;
  *'-m pytest'*) echo 'FAILED tests/a.py::test_b'; echo '1 failed'; exit 1 ;;
  *benchmarks.gpu.small*) echo 'small: done' ;;
  *'-m benchmarks.gpu'*) echo "the table of $*"; exit ${BENCHMARK_STATUS:-0} ;;
esac
"""
SANITIZER = """#!/bin/bash
case "$*" in
  *memcheck*) echo '=========     at void saek::cuda::decode_rows<float>(int)'; exit 9 ;;
  *racecheck*) echo 'Device not supported'; exit 1 ;;
  *) echo '=========     at void cublas_kernel(int)'; echo 'small: done'; exit 9 ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """The check with everything that it calls replaced; a process's result."""
    stubs = {
        "python": STUB, "compute-sanitizer": SANITIZER,
        **dict.fromkeys(("cmake", "ninja", "nvcc", "nvidia-smi"), "#!/bin/bash\necho said\n"),
    }  # fmt: skip
    for name, text in stubs.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def run(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        for name, text in changed.items():
            (tmp_path / name.replace("_", "-")).write_text(text, encoding="utf-8")
        own = {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "LIMIT": "100"}
        return subprocess.run(
            [ROOT / "benchmarks" / "gpu_check.sh", *arguments],
            env={**os.environ, **own}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


def test_the_script_comes_to_the_table_whatever_fails_and_tells_it_last(script, tmp_path):
    done = script("--trial", cmake="#!/bin/bash\necho 'error: no compiler'\nexit 1\n")
    assert done.returncode == 1
    table = done.stdout.index("the table of -m benchmarks.gpu --out")
    assert "--trial" in done.stdout[table:]
    assert "--minutes 1.00" in done.stdout[table:] or "--minutes 0.9" in done.stdout[table:]
    last = done.stdout[table:]
    assert "part: build: FAILED" in last
    assert "part: kernels: FAILED" in last
    assert "part: steps: FAILED" in last
    assert "part: memcheck: FAILED" in last
    assert "part: racecheck: did not run; Device not supported" in last
    assert "part: initcheck: no report of our kernels" in last
    assert "test_b" in (tmp_path / "out" / "check.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(("benchmark", "status"), [("exit 0", 0), ("exit 1", 1)])
def test_the_scripts_exit_status_is_that_of_its_parts(script, benchmark, status):
    python = f"""#!/bin/bash
case "$*" in
  *sysconfig*) dirname "$0" ;;
  *'-m pytest'*) echo '5 passed' ;;
  *'-m benchmarks.gpu'*) {benchmark} ;;
esac
"""
    clean = "#!/bin/bash\necho 'small: done'\n"
    done = script(python=python, compute_sanitizer=clean)
    assert done.returncode == status, done.stdout
    assert "memcheck: clean" in done.stdout
