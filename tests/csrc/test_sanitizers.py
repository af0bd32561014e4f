"""The kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, under the other tests here.

Arrays then have no guard zones of ours, so that the sanitizer's own begin at the first byte beyond.
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

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCH = """
import importlib.util, sys
path, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("sae_ext._C", path)
sys.modules["sae_ext._C"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import guarded
guarded.GUARD = 0
"""
RUN_PYTEST = "import pytest\nsys.exit(pytest.main(arguments))\n"
# Errors that no other test would notice: a row too many read, a pointer between two numbers.
READ_BEYOND = """
import torch
from guarded import call, code_out
pre, mask = torch.ones(4, 64), torch.zeros(5, dtype=torch.int64)
call("compact", {
    "exec": (module.FLOAT32, 1), "pre": pre, "b_enc": torch.zeros(64), "clip": 1.0, "rows": 5,
    "d_sae": 64, "mask": mask, "out": code_out(5, 400, torch.float32),
})
"""
MISALIGNED = READ_BEYOND.replace('"rows": 5', '"rows": 4').replace(
    '"mask": mask', '"mask": mask.data_ptr() + 1'
)


def library(name: str) -> str | None:
    """Where the compiler keeps a library; None where it has none."""
    compiler = which("g++")
    if compiler is None:
        return None
    found = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, timeout=60
    ).stdout.strip()
    return found if Path(found).is_absolute() else None


# The C++ runtime as well: Python itself is linked without it, and exceptions pass through the sanitizer.
PRELOADED = [library("libasan.so"), library("libstdc++.so")]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(which("g++") is None, reason="g++ is needed"),
    pytest.mark.skipif(None in PRELOADED, reason="g++ has no libasan here"),
    pytest.mark.skipif(
        which("cmake") is None or which("ninja") is None, reason="cmake and ninja are needed"
    ),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory) -> Path:
    """The compiled module with both sanitizers in it."""
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
    module: Path, script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCH + script, module, *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{HERE}",
            "LD_PRELOAD": " ".join(path for path in PRELOADED if path is not None),
            "OMP_WAIT_POLICY": "passive",  # small loops: threads that spin take the processor
            "ASAN_OPTIONS": "detect_leaks=0",  # Python itself frees little of what it holds
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.parametrize(
    ("script", "message"),
    [(READ_BEYOND, "heap-buffer-overflow"), (MISALIGNED, "misaligned address")],
    ids=["read beyond", "misaligned"],
)
def test_the_sanitizers_see_what_they_are_there_for(module, script, message):
    done = run(module, script)
    assert done.returncode != 0
    assert message in done.stderr


# On portable code only what goes through every kernel once: the loops differ, the places do not.
@pytest.mark.parametrize(
    ("isa", "selection"),
    [
        ("", "not plain_c and not every_pair_of_kinds"),
        ("portable", "every_element or edges or left_alone"),
    ],
    ids=["widest", "portable"],
)
def test_no_kernel_reads_or_writes_outside_or_does_what_is_undefined(
    module, isa, selection, tmp_path
):
    done = run(
        module, RUN_PYTEST, "-q", "-x", "-s", "-p", "no:cacheprovider", "-k", selection,
        "tests/csrc/test_kernels.py", "tests/csrc/test_screen.py",
        SPARSEMILL_ISA=isa, HYPOTHESIS_STORAGE_DIRECTORY=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
