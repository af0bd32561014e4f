"""The shim that runs CUDA kernels on the CPU: what it shows, and what it refuses."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import simt

pytestmark = pytest.mark.skipif(which("g++") is None, reason="g++ is needed")

# The tests of the first half run once more with the sanitizers, in a process of their own.
SANITIZED = "SIMT_SANITIZED" in os.environ
SEEDS = range(8)
UNWRITTEN = -1
POISON = 0xCDCDCDCD
ALL_LANES = 0xFFFFFFFF
KILOBYTE = 1024


class Examples:
    """The kernels of examples.cu, called by name."""

    def __init__(self) -> None:
        self.path = simt.library(simt.HERE / "examples.cu", sanitize=SANITIZED)
        self.library = ctypes.CDLL(str(self.path))

    def run(
        self,
        name: str,
        threads: int = 64,
        given: tuple[int, ...] = (),
        blocks: int = 1,
        layers: int = 1,
        shared: int = 0,
    ) -> tuple[list[int], str | None]:
        """What the array holds afterwards, and what went wrong."""
        array = (ctypes.c_int64 * 3000)(*given, *[UNWRITTEN] * (3000 - len(given)))
        function = self.library[
            name
        ]  # not shared between Python's threads, as an attribute would be
        function.restype = ctypes.c_char_p
        error = function(array, blocks, layers, threads, ctypes.c_int64(shared))
        return list(array), None if error is None else error.decode()

    def right(self, *arguments: Any, **named: Any) -> list[int]:
        out, error = self.run(*arguments, **named)
        assert error is None
        return out

    def wrong(self, *arguments: Any, **named: Any) -> str:
        _, error = self.run(*arguments, **named)
        assert error is not None
        return error

    def seed(self, value: int) -> None:
        simt.seed(self.path, value)


@pytest.fixture(scope="module")
def examples() -> Examples:
    return Examples()


@pytest.fixture(params=SEEDS)
def seeded(request, examples) -> Examples:
    examples.seed(request.param)
    return examples


# ---- Memory and barriers ----


@pytest.mark.parametrize("threads", [1, 7, 32, 40, 256, 1024])
def test_barriers_order_what_threads_write_and_read(seeded, threads):
    out = seeded.right("hand_on_right", threads, blocks=2)
    assert out[: 2 * threads] == [(i + 3) % threads for i in range(threads)] * 2


def test_operations_of_a_warp_order_memory_too(seeded):
    out = seeded.right("hand_on_in_warp", 64, shared=64 * 8)
    assert out[:64] == [i ^ 1 for i in range(64)]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("hand_on_right", "hand_on_without_first"),
        ("hand_on_right", "hand_on_without_second"),
        ("hand_on_in_warp", "hand_on_in_warp_without"),
    ],
)
def test_without_one_of_its_barriers_a_kernel_gives_wrong_numbers(seeded, right, wrong):
    assert seeded.right(wrong, 64, shared=512) != seeded.right(right, 64, shared=512)


def test_what_a_missing_barrier_lets_a_thread_read_may_be_poison(examples):
    out = examples.right("hand_on_without_first", 64)
    assert POISON - 2**32 in out[:64]


def test_shared_memory_is_poison_at_the_start_of_every_block(examples):
    assert examples.right("look_at_shared", 1, blocks=3, shared=12)[:18] == [POISON] * 18


def test_a_functions_shared_array_is_one_for_the_block_and_each_instance_has_its_own(examples):
    assert examples.right("shared_of_functions", 64)[:2] == [10, 20]


def test_atomic_additions_return_what_was_there(examples):
    out = examples.right("add_atomically", 64, (0,) * 66)
    assert out[0] == 64 << 40
    assert sorted(out[1:65]) == list(range(0, 128, 2))
    assert out[65] == 128


# ---- Order ----


def order(examples: Examples) -> list[int]:
    """Numbers of the threads of 3 x 2 blocks of 40, in the order they ran in."""
    return examples.right("note_order", 40, (0,), blocks=3, layers=2)[1 : 1 + 240]


def test_every_thread_runs_once_and_blocks_one_after_another(seeded):
    ran = order(seeded)
    assert sorted(ran) == list(range(240))
    assert len({thread // 40 for thread in ran[:40]}) == 1


def test_the_order_of_blocks_and_threads_is_the_seeds(examples):
    orders = []
    for seed in [*SEEDS, *SEEDS]:
        examples.seed(seed)
        orders.append(order(examples))
    assert orders[: len(SEEDS)] == orders[len(SEEDS) :]
    assert len({tuple(thread // 40 for thread in ran[::40]) for ran in orders}) > len(SEEDS) // 2
    assert len({tuple(thread % 40 for thread in ran[:40]) for ran in orders}) == len(SEEDS)


def test_without_a_new_seed_the_next_launch_runs_in_another_order(examples):
    assert order(examples) != order(examples)


def test_launches_from_two_threads_of_the_host_follow_one_another(examples):
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda _: examples.right("hand_on_right", 256), range(40)))
    assert all(out[:256] == [(i + 3) % 256 for i in range(256)] for out in outs)


# ---- Operations of a warp ----

SOURCES = {
    "idx": lambda lane, n: n * lane & 31,
    "up": lambda lane, n: lane - (n & 31) if lane >= (n & 31) else lane,
    "down": lambda lane, n: lane + (n & 31) if lane + (n & 31) < 32 else lane,
    "xor": lambda lane, n: lane ^ (n & 31),
}
BASES = {
    "shuffle_int": -10,
    "shuffle_int64": 1 << 40,
    "shuffle_float": 1 << 20,
    "shuffle_double": 1 << 40,
}


@pytest.mark.parametrize("n", [0, 1, 5, 16, 31, 32, 33])
@pytest.mark.parametrize("operation", list(SOURCES))
@pytest.mark.parametrize("kernel", list(BASES))
def test_a_shuffle_takes_the_value_of_the_lane_that_cuda_names(examples, kernel, operation, n):
    number, base = list(SOURCES).index(operation), BASES[kernel]
    out = examples.right(kernel, 96, (number, n, base, ALL_LANES))
    expected = [
        base + 32 * warp + SOURCES[operation](lane, n) for warp in range(3) for lane in range(32)
    ]
    assert out[4:100] == expected


def test_a_lane_that_does_not_exist_has_poison_to_give(examples):
    down = list(SOURCES).index("down")
    out = examples.right("shuffle_int", 40, (down, 4, 100, ALL_LANES))
    assert out[4 + 32 : 4 + 36] == [136, 137, 138, 139]
    assert out[4 + 36 : 4 + 40] == [POISON - 2**32] * 4


def test_no_lane_sees_a_value_of_the_next_shuffle(seeded):
    assert seeded.right("sum_prefixes", 64)[:64] == [*range(1, 33)] * 2


@pytest.mark.parametrize("bits", [0, 1, 0x80000000, 0x12345678, ALL_LANES])
def test_a_ballot_has_the_bit_of_every_lane_that_says_yes(examples, bits):
    out = examples.right("vote", 72, (bits,))
    assert out[1:65] == [bits] * 64
    assert out[65:73] == [bits & 0xFF] * 8


@pytest.mark.parametrize("bits", [0, 1, -1, 0x10, 1 << 40, (1 << 63) - 2, -(1 << 63)])
def test_bits_are_counted_and_found(examples, bits):
    unsigned = bits & (1 << 64) - 1
    first = (unsigned & -unsigned).bit_length()
    expected = [(unsigned & ALL_LANES).bit_count(), unsigned.bit_count(), first]
    assert examples.right("bits", 1, (bits,))[1:4] == expected


# ---- What is refused ----


@pytest.mark.parametrize(
    ("kernel", "threads", "message"),
    [
        (
            "early",
            8,
            "deadlock: 1 threads have ended, 7 of 8 threads of a block wait at __syncthreads",
        ),
        ("early_in_warp", 64, "31 of 32 threads of a warp wait at __shfl_xor_sync"),
        ("early_in_warp", 40, "7 of 8 threads of a warp wait at __shfl_xor_sync"),
        ("different_things", 32, "1 of 32 threads of a block wait at __syncthreads"),
        ("different_things", 32, "31 of 32 threads of a warp wait at __syncwarp"),
        ("two_places_in_warp", 32, "in different places: __shfl_down_sync"),
        ("two_ways_in_warp", 32, "in different places: __shfl_"),
        ("two_places", 64, "in different places: __syncthreads"),
    ],
)
def test_threads_that_do_not_meet_are_an_error(seeded, kernel, threads, message):
    assert message in seeded.wrong(kernel, threads)


def test_an_error_names_kernel_block_seed_and_line(examples):
    examples.seed(5)
    error = examples.wrong("early", 8)
    assert error.startswith("leave_early, block 0, seed 5: deadlock")
    lines = (simt.HERE / "examples.cu").read_text().splitlines()
    line = 2 + next(i for i, text in enumerate(lines) if "void leave_early" in text)
    assert "__syncthreads" in lines[line]
    assert f"examples.cu:{line + 1})" in error


def test_a_mask_without_all_lanes_is_an_error(examples):
    error = examples.wrong("shuffle_int", 32, (0, 1, 0, 0xFFFF))
    assert "__shfl_sync" in error
    assert "without all lanes in its mask" in error


@pytest.mark.parametrize(
    "sizes",
    [
        {"threads": 1025},
        {"threads": 0},
        {"threads": -32},
        {"blocks": 0},
        {"blocks": 2**31},
        {"layers": 65536},
        {"shared": 227 * KILOBYTE + 1},
    ],
    ids=str,
)
def test_sizes_no_gpu_runs_are_an_error(examples, sizes):
    assert "cannot run" in examples.wrong("hand_on_right", **sizes)


def test_fixed_and_dynamic_shared_memory_count_together(examples):
    most = 227 * KILOBYTE - 4 * 1024
    examples.right("hand_on_right", 64, shared=most)
    assert f"{227 * KILOBYTE + 16} bytes of shared memory, with numbers" in examples.wrong(
        "hand_on_right", 64, shared=most + 16
    )


@pytest.mark.skipif(SANITIZED, reason="the sanitizer ends the process")
@pytest.mark.parametrize("where", [-1, 4, 63])
@pytest.mark.parametrize("array", ["left", "right", "dynamic shared memory"])
def test_a_write_outside_a_shared_array_is_an_error_that_names_it(examples, array, where):
    number = ["left", "right", "dynamic shared memory"].index(array)
    given = {"threads": 1, "shared": 16}
    examples.right("write_stray", given=(number, 3), **given)
    error = examples.wrong("write_stray", given=(number, where), **given)
    assert error.endswith(f"a thread has written outside {array}")


def test_after_an_error_nothing_runs_until_it_is_asked_for(examples):
    out, error = examples.run("go_on")
    assert error is not None
    assert error.startswith("leave_early")
    assert out[:9] == [0] * 8 + [UNWRITTEN]


def test_after_an_error_the_same_threads_run_again(seeded):
    for kernel in ("early", "two_places", "different_things"):
        seeded.wrong(kernel, 64)
        out = seeded.right("hand_on_right", 64)
        assert out[:64] == [(i + 3) % 64 for i in range(64)]


# ---- With the sanitizers ----

starts_sanitized = pytest.mark.skipif(
    SANITIZED or which("g++") is None or not all(Path(p).is_absolute() for p in simt.runtimes()),
    reason="g++ has no libasan here, or this is the sanitized process",
)


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent,
        env={
            **os.environ,
            "SIMT_SANITIZED": "1",
            "LD_PRELOAD": " ".join(simt.runtimes()),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python itself frees little of what it holds
        },
        capture_output=True,
        text=True,
        timeout=400,
    )


@starts_sanitized
@pytest.mark.slow
def test_switching_between_threads_of_a_kernel_is_nothing_to_the_sanitizers():
    done = sanitized("-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@starts_sanitized
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("run('write_stray', 1, (0, 4), shared=16)", "heap-buffer-overflow"),
        ("run('write_stray', 1, (2, -1), shared=16)", "heap-buffer-overflow"),
        ("run('overflow_int', 64, (1 << 20,))", "signed integer overflow"),
    ],
)
def test_the_sanitizers_see_what_a_thread_does(call, message):
    done = sanitized("-c", f"from test_simt import Examples\nExamples().{call}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "examples.cu" in done.stderr


# ---- The builder ----

WORDS = "no usable CUDA driver or device"


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The sources that the compiler is called for; "-shared" where it links."""
    calls = []
    run = simt._run

    def noted(path: Path, *arguments: str, **named: Any) -> None:
        calls.append("-shared" if "-shared" in arguments else Path(arguments[-1]).name)
        run(path, *arguments, **named)

    monkeypatch.setattr(simt, "_run", noted)
    return calls


@starts_sanitized
@pytest.mark.slow
def test_a_built_module_has_the_cuda_part_and_is_made_once(compiled):
    pytest.importorskip("pybind11")
    path = simt.build()
    compiled.clear()
    assert simt.build() == path
    assert compiled == []
    module = simt.load(path)
    assert module.cuda()["built"]
    assert module.cuda()["reason"] == WORDS
    assert module.__file__ == str(path)
    assert sys.modules.get("sae_ext._C") is not module


@starts_sanitized
@pytest.mark.slow
def test_a_mutant_is_another_module_and_compiles_one_file(compiled, tmp_path, monkeypatch):
    pytest.importorskip("pybind11")
    original = simt.build()
    # What is kept stays as it was; what the mutant needs of it is there.
    shutil.copytree(simt.KEPT / "objects", tmp_path / "objects", copy_function=os.symlink)
    monkeypatch.setattr(simt, "KEPT", tmp_path)
    compiled.clear()
    mutant = simt.build(mutation=("saek.cpp", WORDS, "changed"))
    assert compiled == ["saek.cpp", "-shared"]
    assert simt.load(mutant).cuda()["reason"] == "changed"
    assert simt.load(original).cuda()["reason"] == WORDS


@starts_sanitized
@pytest.mark.parametrize(("old", "times"), [("int ", "[0-9]+"), ("no such text", "0")])
def test_a_mutation_of_a_text_that_is_not_there_once_is_refused(old, times):
    pytest.importorskip("pybind11")
    with pytest.raises(ValueError, match=f"saek.cpp has {times} times"):
        simt.build(mutation=("saek.cpp", old, "new"))


def test_a_header_is_part_of_what_an_object_is_known_by():
    names = {file.name for file in simt._files(simt.HERE / "simt.cpp", (simt.ROOT / "csrc",))}
    assert names == {"simt.cpp", "simt.h", "saek.h"}
