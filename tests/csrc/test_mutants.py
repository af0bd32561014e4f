"""A test of the tests: a CUDA kernel with a mistake planted in it does not pass them.

The mistakes are those that parallel code invites: a barrier that is missing, a bound, a rank or a starting
point that is off by one, a case left out. The kernels are compiled for the CPU (see simt/).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

pytest.importorskip("sae_ext._C", reason="the kernels are not built")
pytest.importorskip("pybind11", reason="pybind11 is needed to build the kernels")

import simt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(which("g++") is None, reason="g++ is needed"),
]
HERE = Path(__file__).parent
BARRIER = "  __syncthreads();"

# What is wrong; the file, its text and the mistake; the tests, or the kernels they try, that are to notice.
MUTANTS = {
    "block_sum gives the total before it is there": (
        "common.cuh", f"shared[kWarp] = v;\n  }}\n{BARRIER}", "shared[kWarp] = v;\n  }",
        "update_features",
    ),
    "block_sum_before adds up sums before they are there": (
        "common.cuh", f"shared[warp()] = upto;\n{BARRIER}", "shared[warp()] = upto;", "compact",
    ),
    "place_entries lets rows overtake one another": (
        "features.cu", f"= dz[k];\n    }}\n  {BARRIER}", "= dz[k];\n    }", "transpose",
    ),
    "sum_long_lists does not wait until its parts are added up": (
        "features.cu", f"+ c0 + i] = sum;\n    }}\n  {BARRIER}", "+ c0 + i] = sum;\n    }",
        "long_lists",
    ),
    "sum_warps adds up columns before they are there": (
        "dense.cu", f"kWarp + lane()] = high;\n{BARRIER}", "kWarp + lane()] = high;", "dense_mask",
    ),
    "list_supported ranks entries from 1": (
        "code.cu", "start + before, a.support_col", "start + before + 1, a.support_col", "gather",
    ),
    "mark leaves out the last column of a tail": (
        "code.cu", "static_cast<int>(d_sae - c) : 0", "static_cast<int>(d_sae - c) - 1 : 0",
        "compaction",
    ),
    "place takes a row that is one entry too long": (
        "code.cu", "end <= l.out.capacity", "end <= l.out.capacity + 1", "too_short",
    ),
    "place counts from the first row of the call": (
        "code.cu", "l.out.row_ptr[l.slice] +", "l.out.row_ptr[0] +", "more_rows",
    ),
    "mark takes an entry at the clip for saturated": (
        "code.cu", "e < n && sum > clip", "e < n && sum >= clip", "edges",
    ),
    "write_entry loses the sign of saturated entries": (
        "code.cu", "pre > clip ? -clip : pre", "pre > clip ? clip : pre", "compaction",
    ),
    "sum_long_lists does not look whether to skip": (
        "features.cu", "kWarps * kColumns);\n  if (skipped(skip)) return;",
        "kWarps * kColumns);\n  static_cast<void>(skip);", "skipped",
    ),
}  # fmt: skip


def run(module: Path, selection: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
            "-k", f"simt and ({selection})", "test_cuda.py", "test_kernels.py",
        ],
        cwd=HERE, env={**os.environ, "SAEK_SIMT_MODULE": str(module)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.parametrize("mistake", MUTANTS)
def test_a_mistake_in_a_kernel_does_not_pass_the_tests(mistake):
    file, text, instead, selection = MUTANTS[mistake]
    done = run(simt.build(mutation=(file, text, instead)), selection)
    # Tests that failed, or an end by a signal; not a selection that is empty.
    assert done.returncode == 1 or done.returncode < 0, done.stdout[-3000:]


def test_without_a_mistake_the_same_tests_pass():
    done = run(simt.build(), "too_short or transpose or skipped_long_lists")
    assert done.returncode == 0, done.stdout[-3000:]
