"""What is decided once per process: the instruction set, the fallback, what a diagnosis says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_ext import native, ops

compiled = pytest.mark.skipif(native.MISSING is not None, reason="the kernels are not built")
ROOT = Path(__file__).parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            "PATH": os.environ["PATH"],
            "OMP_WAIT_POLICY": "passive",  # small loops: threads that spin take the processor
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_description_says_what_runs_and_why():
    seen = ops.describe()
    assert seen["implementation"] == ops.implementation()
    assert (seen["fallback_reason"] is None) == seen["implementation"].startswith("cpu-")
    assert seen["threads"] == torch.get_num_threads()
    assert (seen["cuda"]["reason"] is None) == bool(seen["cuda"]["devices"])


def test_the_description_of_the_fallback_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(native, "MISSING", "no such module")
    seen = ops.describe()
    assert (seen["implementation"], seen["fallback_reason"]) == ("reference", "no such module")
    assert seen["cuda"]["reason"] == "the compiled kernels are not built"
    assert not seen["openmp"]


FLAGS = {
    "portable": "",
    "avx2": " avx2 ",
    "avx512": " avx512bw ",
    "avx512vnni": " avx512_vnni ",
}
# The numbers of whole steps, each kernel by itself, and the edges.
SUBSET = "float64_equal or errs_at_most or every_element or edges"


def processor_has(isa: str) -> bool:
    info = Path("/proc/cpuinfo")
    return isa == "portable" or (info.exists() and FLAGS[isa] in info.read_text())


@compiled
@pytest.mark.parametrize("isa", FLAGS)
def test_each_instruction_set_equals_the_reference(isa, tmp_path):
    if not processor_has(isa):
        pytest.skip(f"this processor has no {isa}")
    if isa == native.isa():
        pytest.skip(f"{isa} is what all the other tests run on")
    name = python("-c", "import sae_ext.ops as o; print(o.implementation())", SPARSEMILL_ISA=isa)
    assert name.stdout == f"cpu-{isa}\n", name.stderr
    done = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SUBSET,
        "tests/csrc/test_kernels.py", "tests/sae_ext/test_ops.py",
        SPARSEMILL_ISA=isa, HYPOTHESIS_STORAGE_DIRECTORY=str(tmp_path), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@compiled
def test_an_instruction_set_that_cannot_run_is_named():
    done = python(
        "-c",
        "import sae_ext.ops as o\n"
        "try: o.implementation()\n"
        "except o.UserError as error: print(error)\n",
        SPARSEMILL_ISA="sse9",
    )
    assert "SPARSEMILL_ISA" in done.stdout, done.stderr
    assert "portable, avx2, avx512 or avx512vnni" in done.stdout


def test_without_the_compiled_module_one_warning_names_the_remedy_and_the_reference_runs():
    done = python(
        "-c",
        "import sys\n"
        "sys.modules['sae_ext._C'] = None\n"
        "import sae_ext.ops as o, importlib\n"
        "from made_up_weights import batch, made_up\n"
        "p = made_up(6, 20)\n"
        "o.Step()(p, o.AdamState.zeros(p), batch(4, 6), l1=1.0, lr=0.1)\n"
        "o.decode(o.encode(batch(4, 6), p), p)\n"
        "o.autoencode(batch(4, 6), p)\n"
        "print(o.implementation(), bool(o.describe()['fallback_reason']))\n"
        "try: o.Step('cpu')\n"
        "except o.UserError as error: print(error)\n",
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "reference True"
    assert "make setup" in second
    assert done.stderr.count("make setup") == 1
    assert "C++ compiler" in done.stderr
