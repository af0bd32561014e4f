"""What the build does where a compiler is missing or CUDA is not wanted (configure only), and what nvcc
makes of the kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    which("cmake") is None or which("ninja") is None, reason="cmake and ninja are needed"
)
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
needs_compiler = pytest.mark.skipif(which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def path_with(tmp_path):
    """A PATH that holds cmake, ninja and the named tools, nothing else."""

    def build(*tools: str) -> str:
        folder = tmp_path / "tools"
        folder.mkdir()
        for tool in ("cmake", "ninja", *tools):
            found = which(tool)
            if found is not None:
                # A script, not a link: cmake finds its own files beside itself.
                (folder / tool).write_text(f'#!/bin/sh\nexec "{found}" "$@"\n')
                (folder / tool).chmod(0o755)
        return str(folder)

    return build


def cmake(*arguments: str | Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    names = ("CC", "CXX", "CUDACXX", "CUDA_PATH", "CUDAHOSTCXX")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    return subprocess.run(
        ["cmake", *map(str, arguments)],
        env=environment if path is None else {**environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def configure(
    build: Path, *options: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    pybind11 = pytest.importorskip("pybind11")
    return cmake(
        "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options, path=path,
    )  # fmt: skip


def test_without_a_compiler_the_build_warns_once_and_installs_nothing(tmp_path, path_with):
    path, build = path_with(), tmp_path / "build"
    done = configure(build, path=path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("No C++ compiler found") == 1
    assert "Install a C++ compiler" in done.stderr
    assert cmake("--build", build, path=path).returncode == 0
    assert cmake("--install", build, "--prefix", tmp_path / "out", path=path).returncode == 0
    assert not list(tmp_path.glob("out/**/*_C*"))


def test_cuda_on_without_a_compiler_fails_with_the_reason(tmp_path, path_with):
    done = configure(tmp_path / "build", "-DSAEK_CUDA=ON", path=path_with())
    assert done.returncode != 0
    assert "SAEK_CUDA=ON needs a C++ compiler" in done.stderr


@needs_compiler
def test_cuda_off_leaves_the_cuda_part_out(tmp_path):
    done = configure(tmp_path / "build", "-DSAEK_CUDA=OFF")
    assert done.returncode == 0, done.stderr
    assert "CUDA part: left out (SAEK_CUDA=OFF)" in done.stdout
    assert "device.cu" not in (tmp_path / "build" / "build.ninja").read_text()


@needs_compiler
@pytest.mark.parametrize(("mode", "succeeds"), [("AUTO", True), ("ON", False)])
def test_without_nvcc_auto_goes_on_and_on_says_what_to_do(tmp_path, path_with, mode, succeeds):
    path = path_with("c++", "as", "ld", "ar", "ranlib", "nm", "objdump", "strip")
    done = configure(tmp_path / "build", f"-DSAEK_CUDA={mode}", path=path)
    if Path("/usr/local/cuda/bin/nvcc").exists() and "built with" in done.stdout:
        pytest.skip("nvcc is found outside PATH here")
    assert (done.returncode == 0) == succeeds, done.stderr
    if succeeds:
        assert "CUDA part: left out (no working nvcc)" in done.stdout
    else:
        assert "no working CUDA compiler (nvcc) was found" in " ".join(done.stderr.split())


def test_an_unknown_cuda_mode_is_refused(tmp_path):
    done = configure(tmp_path / "build", "-DSAEK_CUDA=MAYBE")
    assert done.returncode != 0
    assert "SAEK_CUDA must be AUTO, ON or OFF, got 'MAYBE'" in done.stderr


@pytest.mark.skipif(which("nvcc") is None, reason="nvcc is needed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_every_cuda_kernel_compiles_and_keeps_to_its_registers(source, tmp_path):
    architectures = ("80", "90")
    done = subprocess.run(
        [
            "nvcc", "-std=c++17", "-Xptxas", "-v",
            *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures),
            "-c", source, "-o", tmp_path / "kernels.o",
        ],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    for a in architectures:
        kernels = len(re.findall(rf"Compiling entry function .* for 'sm_{a}'", done.stderr))
        assert (kernels > 0) == ("__global__" in source.read_text())
        assert len(spills) == kernels * len(architectures)
    assert set(spills) <= {("0", "0")}, done.stderr
