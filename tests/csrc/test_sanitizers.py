"""The kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, under the other tests here.

The CPU's as they are built, CUDA's compiled for the CPU (see simt/). Arrays then have no guard zones of
ours, so that the sanitizer's own begin at the first byte beyond.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

pytest.importorskip("sae_ext._C", reason="the kernels are not built")
pybind11 = pytest.importorskip("pybind11", reason="pybind11 is needed to build the kernels")

import simt  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
AS_BUILT = """
import importlib.util, sys
path, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("sae_ext._C", path)
sys.modules["sae_ext._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import guarded
guarded.GUARD = 0
"""
SIMULATED = """
import os, sys
os.environ["SAEK_SIMT_MODULE"], *arguments = sys.argv[1:]
import guarded
guarded.GUARD = 0
"""
RUN_PYTEST = "import pytest\nsys.exit(pytest.main(arguments))\n"
# Errors that no other test would notice: a row too many read, a pointer between two numbers.
READ_BEYOND = """
import torch
from guarded import code_out
from implementations import CPU
pre, mask = torch.ones(4, 64), torch.zeros(5, dtype=torch.int64)
CPU.call("compact", {
    "exec": CPU.exec(torch.float32), "pre": pre, "b_enc": torch.zeros(64), "clip": 1.0, "rows": 5,
    "d_sae": 64, "mask": mask, "counts": None, "out": code_out(5, 400, torch.float32),
})
"""
MISALIGNED = READ_BEYOND.replace('"rows": 5', '"rows": 4').replace(
    '"mask": mask', '"mask": mask.data_ptr() + 1'
)

# The runtimes to preload; None of them is a path where the compiler has no such library.
PRELOADED = simt.runtimes() if which("g++") is not None else []

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(which("g++") is None, reason="g++ is needed"),
    pytest.mark.skipif(
        not all(Path(path).is_absolute() for path in PRELOADED), reason="g++ has no libasan here"
    ),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    """The compiled module with both sanitizers in it."""
    if which("cmake") is None or which("ninja") is None:
        pytest.skip("cmake and ninja are needed")
    build = tmp_path_factory.mktemp("sanitized")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
    for command in (
        [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DSAEK_CUDA=OFF",
            "-DCMAKE_CXX_COMPILER=g++", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        ["cmake", "--build", build, "--target", "_C"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    (built,) = build.glob("_C*.so")
    return built


def run(
    script: str, module: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, module, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{HERE}",
            "LD_PRELOAD": " ".join(PRELOADED),
            "OMP_WAIT_POLICY": "passive",  # small loops: threads that spin take the processor
            "ASAN_OPTIONS": "detect_leaks=0",  # Python itself frees little of what it holds
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=500,
    )


def run_tests(
    script: str, module: Path, selection: str, *files: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return run(
        script + RUN_PYTEST, module, "-q", "-x", "-s", "-p", "no:cacheprovider", "-k", selection,
        *(f"tests/csrc/{file}" for file in files), **environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "message"),
    [(READ_BEYOND, "heap-buffer-overflow"), (MISALIGNED, "misaligned address")],
    ids=["read beyond", "misaligned"],
)
def test_the_sanitizers_see_what_they_are_there_for(module, script, message):
    done = run(AS_BUILT + script, module)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (("rows.cu", "if (row >= a.rows) return;", "if (row > a.rows) return;"), "heap-buffer-overflow"),
        (("rows.cu", "in_pieces<N>(a.d_in, of<T>(a.matrix))", "a.d_in % N == 0"), "misaligned address"),
    ],
    ids=["read beyond", "misaligned"],
)  # fmt: skip
def test_the_sanitizers_see_what_they_are_there_for_in_cuda_kernels(mutation, message):
    done = run_tests(
        SIMULATED, simt.build(sanitize=True, mutation=mutation),
        "simt and row_norms and (every_element or anywhere)", "test_kernels.py",
    )  # fmt: skip
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


# On portable code only what goes through every kernel once: the loops differ, the places do not.
@pytest.mark.parametrize(
    ("isa", "selection"),
    [
        ("", "(cpu or screen) and not every_pair_of_kinds"),
        (
            "portable",
            "(cpu or screen) and (every_element or edges or left_alone or written_beyond)",
        ),
    ],
    ids=["widest", "portable"],
)
def test_no_kernel_reads_or_writes_outside_or_does_what_is_undefined(
    module, isa, selection, tmp_path
):
    done = run_tests(
        AS_BUILT, module, selection, "test_kernels.py", "test_screen.py",
        SPARSEMILL_ISA=isa, HYPOTHESIS_STORAGE_DIRECTORY=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_no_cuda_kernel_reads_or_writes_outside_or_does_what_is_undefined():
    # A selection, because threads that take turns take ten times as long with the sanitizers.
    done = run_tests(
        SIMULATED, simt.build(sanitize=True),
        "simt and ((every_element and float32) or (bfloat16 and (anywhere or long or shared))"
        " or written_beyond or edges)",
        "test_kernels.py", "test_cuda.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
