"""The C functions one by one, on memory laid out here: values, edges, guard zones, errors, threads.

Each implementation is asked the same. What CUDA alone has is in test_cuda.py, the screen in test_screen.py.
"""

from __future__ import annotations

import ast
import math
import re
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("sae_ext._C", reason="the kernels are not built")

from cases import (  # noqa: E402
    ADAM,
    BUILDS,
    Case,
    cases,
    compare,
    dense_activate,
    gather,
    kernel_of,
    listed,
    row_norms,
    run,
    run_and_compare,
    update_features,
    words_of,
)
from guarded import Guarded, arrays, code_out, leaves, random, replaced, results  # noqa: E402
from implementations import CPU, Kernels  # noqa: E402

HEADER = Path(__file__).parents[2] / "csrc" / "saek.h"


def test_every_kernel_of_the_module_is_tried_here_or_in_the_screens_file():
    functions = {
        name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("_")
    }
    others = {"isa", "has_openmp", "cuda", "screen", "screen_scratch"}
    assert functions - others == {kernel_of(name) for name in BUILDS}


def test_the_stub_names_what_the_module_has():
    stub = ast.parse((HEADER.parents[1] / "sae_ext" / "_C.pyi").read_text())
    constants = {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign)}
    functions = {n.name: n for n in stub.body if isinstance(n, ast.FunctionDef)}
    assert constants | set(functions) == {name for name in dir(_C) if not name.startswith("_")}
    for name, function in functions.items():
        # pybind11 writes a signature first: compact(*, exec: tuple[...], pre: int, ...) -> int
        signature = re.sub(r"\[[^][]*\]", "", getattr(_C, name).__doc__.splitlines()[0])
        taken = re.findall(r"(\w+): ", signature)
        assert [a.arg for a in function.args.kwonlyargs] == taken, name


@pytest.mark.parametrize("name", BUILDS)
def test_a_kernel_writes_every_element_of_what_it_should_and_nothing_beside(name, offer):
    for case in cases(*offer):
        run_and_compare(name, case)


@pytest.mark.parametrize("name", BUILDS)
def test_a_batch_may_have_more_rows_than_a_block_has_threads(name, kernels):
    run_and_compare(name, Case(kernels, torch.float32, 1030, 3, 5))


# The sums over rows of the dense phase are made in as many parts as there are threads on CUDA.
IN_PARTS = {"dense_activate": {"z_sum"}, "dense_mask": {"grad_b_enc"}}


@pytest.mark.parametrize("rows", [1, 41])
@pytest.mark.parametrize("name", BUILDS)
def test_a_kernel_is_bitwise_equal_for_any_number_of_threads_and_run_to_run(name, offer, rows):
    kernels, dtype = offer
    case = Case(kernels, dtype, rows, d_sae=130 if kernels.queued else 600)
    in_parts = IN_PARTS.get(name, set()) if kernels.queued else set()
    alone = results(run(name, case, threads=1)[0])
    for threads in (2, 3, 64, 1):
        for field, tensor in results(run(name, case, threads)[0]).items():
            if threads == 1 or field not in in_parts:
                assert torch.equal(tensor, alone[field]), f"{field} with {threads} threads"


@pytest.mark.parametrize("name", BUILDS)
def test_an_array_may_start_anywhere(name, offer):
    # Each in turn starts between two registers, where all others start at one.
    case = Case(*offer, rows=5, d_in=64, d_sae=64, aligned=True)
    for path, _ in leaves(BUILDS[name](case, 2)[0]):
        arguments, expected = BUILDS[name](case, 2)
        value = dict(leaves(arguments))[path]
        if isinstance(value, Tensor) and value.numel() > 1:
            arguments = replaced(arguments, path, shifted(value))
        elif isinstance(value, Guarded) and kernel_of(name) != "feature_norms":
            moved = Guarded(tuple(value.inside.shape), value.inside.dtype, value.role)
            moved.inside.copy_(value.inside)
            arguments = replaced(arguments, path, moved)
        else:
            continue
        assert case.kernels.call(kernel_of(name), arguments) in (None, _C.OK)
        compare(name, case, arguments, expected)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, one element further on in memory."""
    place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return place.copy_(tensor)


# ---- The edges of listing --------------------------------------------------------------------------


def numbers(dtype: torch.dtype, rows: int, d_sae: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pre-activations in a format of matrices, and a bias in the format that goes with it."""
    bias = random(d_sae, dtype=Case.of_sums(dtype), seed=1) + shift
    return random(rows, d_sae).to(dtype), bias


def assert_lists_what_is_positive(kernels: Kernels, pre: Tensor, bias: Tensor, clip: float) -> None:
    _, (row_ptr, col, val, _, counters) = listed(kernels, pre, bias, clip=clip)
    summed = pre + bias
    rows, columns = (summed > 0).nonzero(as_tuple=True)
    assert torch.equal(col.inside, columns.int())
    assert row_ptr.inside.diff().tolist() == torch.bincount(rows, minlength=len(pre)).tolist()
    assert row_ptr.inside[0] == 0
    over = int((summed > clip).sum())
    assert counters.inside.tolist() == [len(rows), over, pre.numel(), 0]
    picked = summed[rows, columns]
    assert torch.equal(val.inside, torch.where(picked > clip, -clip, picked))


@pytest.mark.parametrize("d_sae", [1, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("shift", [-9.0, -1.0, 9.0])
def test_compaction_lists_each_positive_entry_once_in_order(offer, d_sae, shift):
    kernels, dtype = offer
    assert_lists_what_is_positive(kernels, *numbers(dtype, 13, d_sae, shift), clip=8.0)


# Wider than what a block of threads takes at a time, in 8 columns each, or in words of 64.
@pytest.mark.parametrize("d_sae", [2048, 2056, 4100, 16_384, 16_392, 16_500])
def test_compaction_of_wide_rows_lists_each_positive_entry_once_in_order(offer, d_sae):
    kernels, dtype = offer
    assert_lists_what_is_positive(kernels, *numbers(dtype, 3, d_sae), clip=1.0)


@pytest.mark.parametrize("rows", [1024, 1025, 2100])
def test_compaction_of_many_rows_lists_each_positive_entry_once_in_order(kernels, rows):
    assert_lists_what_is_positive(kernels, *numbers(torch.float32, rows, 40), clip=1.0)


def edges(dtype: torch.dtype) -> tuple[list[float], float]:
    """Numbers at the edges of zero and of a clip of 2, and the smallest of them."""
    above = torch.tensor(2.0, dtype=dtype).nextafter(torch.tensor(3.0, dtype=dtype)).item()
    denormal = torch.finfo(dtype).smallest_normal / 4
    return [0.0, -0.0, -denormal, denormal, 2.0, above, math.inf, -math.inf, math.nan], denormal


@pytest.mark.parametrize("column", [3, 70])  # in a whole word of 64 columns, and in the rest
@pytest.mark.parametrize("d_sae", [75, 80])
def test_compaction_at_the_edges_of_zero_and_clip(offer, column, d_sae):
    kernels, dtype = offer
    values, denormal = edges(dtype)
    pre = torch.full((len(values), d_sae), -1.0, dtype=dtype)
    pre[:, column] = torch.tensor(values, dtype=dtype)
    bias = torch.zeros(d_sae, dtype=Case.of_sums(dtype))
    _, (row_ptr, col, val, _, counters) = listed(kernels, pre, bias, clip=2.0)
    assert row_ptr.inside.diff().tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1]
    assert col.inside.tolist() == [column] * 5
    assert val.inside[:4].tolist() == [denormal, 2.0, -2.0, -2.0]
    assert val.inside[4].isnan()
    assert counters.inside[1] == 2


@pytest.mark.parametrize("column", [3, 70])
def test_dense_activation_at_the_edges_of_zero_and_clip(offer, column):
    kernels, dtype = offer
    values, denormal = edges(dtype)
    case = Case(kernels, dtype, len(values), 1, 75)
    case["pre"].fill_(-1.0)
    case["pre"][:, column] = torch.tensor(values, dtype=dtype)
    case["b_enc"].zero_()
    arguments, _ = dense_activate(case, 2)
    kernels.call("dense_activate", {**arguments, "clip": 2.0})
    z = results(arguments)["pre"]
    assert z[:-1, column].tolist() == [0.0, 0.0, 0.0, denormal, 2.0, 2.0, 2.0, 0.0]
    assert not z[:-1, column].signbit().any()
    assert z[-1, column].isnan()
    passing = torch.zeros(len(values), 75, dtype=torch.bool)
    passing[[3, 4, 8], column] = True
    assert torch.equal(results(arguments)["passes"], words_of(passing))
    assert results(arguments)["fired"][column] == column + 5
    assert results(arguments)["saturated"].tolist() == [102]


def test_compaction_without_a_clip_keeps_infinity_as_it_is(kernels):
    pre = torch.tensor([[math.inf, 1.0]], dtype=torch.float64)
    _, (_, _, val, _, counters) = listed(kernels, pre, torch.zeros(2, dtype=torch.float64))
    assert val.inside.tolist() == [math.inf, 1.0]
    assert counters.inside[1] == 0


def assert_written_as_far_as_it_fits(
    kernels: Kernels, out: tuple[Any, ...], first: int, col: Tensor, val: Tensor
) -> None:
    """The CPU writes none of the entries where they do not all fit, CUDA those of the rows that do."""
    row_ptr, seen_col, seen_val, capacity, _ = out
    ends = row_ptr.inside[row_ptr.inside <= capacity]
    fits = int(ends[-1]) - first if len(ends) and kernels.queued else 0
    assert torch.equal(seen_col.inside[first : first + fits], col[:fits].int())
    assert torch.equal(seen_val.inside[first : first + fits], val[:fits])
    for array in (seen_col, seen_val):
        assert bool(array.unwritten()[:first].all()), "rows listed before are not touched"
        assert bool(array.unwritten()[first + fits :].all())


@pytest.mark.parametrize("first", [0, 17])
@pytest.mark.parametrize("short", [1, 30, 10_000])
def test_too_short_arrays_are_reported_and_not_written_beyond(kernels, short, first):
    pre, bias = random(9, 70), torch.zeros(70, dtype=torch.float64)
    picked, columns = pre[pre > 0], (pre > 0).nonzero()[:, 1]
    total = first + len(picked)
    capacity = max(total - short, 0)
    code, out = listed(kernels, pre, bias, capacity=capacity, first=first)
    assert code == (_C.OK if kernels.queued else _C.OVERFLOW)
    assert out[4].inside.tolist() == [total, 0, 630, _C.TOO_SHORT]
    assert torch.equal(
        out[0].inside, first + torch.cat([torch.zeros(1), (pre > 0).sum(1).cumsum(0)])
    )
    assert_written_as_far_as_it_fits(kernels, out, first, columns, picked)
    code, (_, col, val, _, counters) = listed(kernels, pre, bias, capacity=total, first=first)
    assert code == _C.OK
    assert counters.inside.tolist() == [total, 0, 630, 0]
    assert torch.equal(val.inside[first:], picked)
    assert bool(val.inside[:first].isnan().all()), "rows listed before are not touched"
    assert bool((col.inside[:first] == -77).all())


def test_saturated_entries_of_rows_that_do_not_fit_are_not_counted(kernels):
    pre, bias = random(9, 70).abs() + 1, torch.zeros(70, dtype=torch.float64)
    _, out = listed(kernels, pre, bias, clip=0.5, capacity=629)
    assert out[4].inside.tolist() == [630, 0, 630, _C.TOO_SHORT]
    _, out = listed(kernels, pre, bias, clip=0.5, capacity=630)
    assert out[4].inside.tolist() == [630, 630, 630, 0]


@pytest.mark.parametrize("room", [630, 500, 200])  # enough, only for the first chunk, for none
def test_the_counters_go_on_from_chunk_to_chunk(kernels, room):
    pre, bias = random(9, 70).abs() + 1, torch.zeros(70, dtype=torch.float64)
    row_ptr, *others = code_out(9, room, torch.float64)
    chunks = ((0, 6), (6, 9))
    for begin, end in chunks:
        part = Guarded.holding(row_ptr.inside[begin : end + 1])
        listed(kernels, pre[begin:end], bias, clip=0.5, out=(part, *others))
        row_ptr.inside[begin : end + 1] = part.inside
    assert row_ptr.inside.tolist() == list(range(0, 631, 70))
    saturated = sum(70 * (end - begin) for begin, end in chunks if 70 * end <= room)
    assert others[3].inside.tolist() == [630, saturated, 630, _C.TOO_SHORT * (room < 630)]


def test_nothing_active_needs_no_arrays_at_all(kernels):
    bias = torch.full((70,), -99.0, dtype=torch.float64)
    code, (row_ptr, _, _, _, counters) = listed(kernels, random(9, 70), bias, capacity=0)
    assert code == _C.OK
    assert row_ptr.inside.tolist() == [0] * 10
    assert counters.inside.tolist() == [0, 0, 630, 0]


@pytest.mark.parametrize("first", [0, 17])
@pytest.mark.parametrize("short", [0, 1, 30])
def test_gathering_reports_too_short_arrays_and_does_not_write_beyond(kernels, short, first):
    case = Case(kernels, torch.float64)
    arguments, expected = gather(case, 2)
    nnz, over, n, _ = expected["out.4"].tolist()
    whole = results(run("gather", case)[0])
    out = code_out(case.rows, first + nnz - short, case.dtype, first)
    code = kernels.call("gather", {**arguments, "out": out})
    assert code == (_C.OVERFLOW if short and not kernels.queued else _C.OK)
    assert out[4].inside.tolist() == [
        first + nnz,
        0 if short else over,
        n,
        _C.TOO_SHORT * (short > 0),
    ]
    assert torch.equal(out[0].inside, first + expected["out.0"])
    if short:
        assert_written_as_far_as_it_fits(kernels, out, first, whole["out.1"], whole["out.2"])
    else:
        assert torch.equal(out[1].inside[first:], expected["out.1"])
        assert torch.equal(out[2].inside[first:], whole["out.2"])
        for array in out[1:3]:
            assert bool(array.unwritten()[:first].all()), "rows listed before are not touched"


@pytest.mark.parametrize("change", [-1, 1])
def test_a_support_of_another_length_than_its_rows_say_is_refused_on_the_cpu(change):
    # CUDA does not look at what pointers point at before it queues anything.
    arguments, _ = gather(Case(CPU, torch.float64), 2)
    refused(CPU, "gather", {**arguments, "support_length": arguments["support_length"] + change})


@pytest.mark.parametrize(
    "name", ["gather", "decode", "residual", "dz", "transpose", "feature_gradients of entries"]
)
def test_without_entries_the_arrays_of_entries_may_be_missing_on_the_cpu(name):
    arguments, expected = BUILDS[name](Case(CPU, torch.float64, share=0.0), 2)
    for path, value in leaves(arguments):
        if isinstance(value, (Tensor, Guarded)) and path in OF_ENTRIES:
            arguments = replaced(arguments, path, None)
            expected.pop(path, None)
    assert CPU.call(kernel_of(name), arguments) in (None, _C.OK)
    compare(name, Case(CPU, torch.float64), arguments, expected)


@pytest.mark.parametrize("name", BUILDS)
def test_a_batch_without_entries_is_a_batch_like_any_other(name, offer):
    run_and_compare(name, Case(*offer, rows=5, d_in=17, d_sae=65, share=0.0))


@pytest.mark.parametrize("name", ["update", "update_features of entries"])
def test_without_a_factor_the_gradient_is_taken_as_it_is(name, kernels):
    ends = []
    for factor in (None, torch.ones(1, dtype=torch.float64)):
        arguments, _ = BUILDS[name](Case(kernels, torch.float64), 2)
        kernels.call(kernel_of(name), replaced(arguments, "adam.1", factor))
        ends.append(results(arguments))
    for field, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][field]), field


def test_a_decoder_row_of_zeros_has_no_direction_and_no_length(offer):
    case = Case(*offer)
    case["W_dec"][7] = 0
    arguments, _ = update_features(listed=True, pulled=False, unit_norm=True)(case, 2)
    for array in arguments["W_dec"][1:]:
        array.inside[7] = 0
    still = ADAM[0].clone()
    still[1] = 0.0
    case.kernels.call("update_features", {**arguments, "adam": (still, ADAM[1])})
    seen = results(arguments)
    assert torch.equal(seen["W_dec.0"][7], torch.zeros(case.d_in, dtype=case.dtype))
    assert all(bool(t.isfinite().all()) for t in seen.values())
    arguments, _ = row_norms(case, 2)
    case.kernels.call("row_norms", arguments)
    assert results(arguments)["out"][7] == 0


# ---- Refusals --------------------------------------------------------------------------------------

# Pointers that may be null: they mean "1", "0", or "not wanted".
OPTIONAL = {
    "decode": {"bias"},
    "residual": {"b_dec", "recon_weight", "l1_weight", "feature_weight", "halt"},
    "dz": {"grad", "grad_l1", "feature_weight", "grad_activity", "grad_val"},
    "transpose": {"row_weight", "entries.4"},
    "feature_gradients": {"dW_enc", "dW_dec"},
    "dense_activate": {"row_weight"},
    "dense_residual": {"b_dec", "recon_weight", "halt"},
    "dense_mask": {"l1_weight", "feature_weight"},
    "update": {"adam.1"},
    "update_features": {"adam.1", "W_enc_copy", "W_dec_copy"},
}
# As long as there are entries: with none of them, null is right.
OF_ENTRIES = {
    "dz", "support_col", "scratch", "out.1", "out.2",
    *(f"{group}.{i}" for group in ("code", "entries", "gradient.0") for i in (1, 2, 3)),
}  # fmt: skip


def refused(kernels: Kernels, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{kernel_of(name)}: a pointer is null or a size"):
        kernels.call(kernel_of(name), arguments)
    for field, array in arrays(arguments):
        assert array.untouched(), field


@pytest.mark.parametrize("name", BUILDS)
def test_a_null_pointer_is_refused_before_anything_is_written(name, kernels):
    arguments, _ = BUILDS[name](Case(kernels, torch.float64), 2)
    tried = 0
    for path, value in leaves(arguments):
        if not isinstance(value, (Tensor, Guarded)) or path in OPTIONAL.get(kernel_of(name), ()):
            continue
        if path.startswith("gradient.") and path not in needed_of_the_gradient(name, kernels):
            continue
        refused(kernels, name, replaced(arguments, path, None))
        tried += 1
    assert tried > 0


def needed_of_the_gradient(name: str, kernels: Kernels) -> set[str]:
    """Pointers of a gradient that cannot be missing, given the others."""
    made_of = {"gradient.3", "gradient.4"}
    if "entries" in name:
        made_of = {"gradient.1", "gradient.2", *(f"gradient.0.{i}" for i in range(4))}
        if kernels.queued:  # a list of long lists, and so a place for their rows
            made_of.add("gradient.8")
    pulled = {"gradient.7"} if "pulled" in name else set()
    bias = set() if name.startswith("feature_gradients") else {"gradient.5"}
    return made_of | pulled | bias


@pytest.mark.parametrize("name", BUILDS)
def test_an_impossible_size_is_refused_before_anything_is_written(name, kernels):
    arguments, _ = BUILDS[name](Case(kernels, torch.float64), 2)
    for path, size in leaves(arguments):
        if not isinstance(size, int) or isinstance(size, bool):
            continue
        values = [0, -1]
        if path == "exec.0":
            values = [2, -1]
        elif path == "exec.1":
            values = [3, -1]
        elif path in ("out.3", "shared_bytes"):  # 0 asks for no arrays, for no memory
            values = [-1]
        elif path == "entries.5" or path == "gradient.0.5":
            values = [0, -1] if dict(leaves(arguments))[path[:-1] + "4"] is not None else []
        elif path == "support_length" and kernels.queued:  # CUDA takes the caller's word for it
            values = [-1]
        elif numbered_in_32_bits(kernel_of(name), path):
            values.append(2**31)
        for value in values:
            refused(kernels, name, replaced(arguments, path, value))


def numbered_in_32_bits(kernel: str, path: str) -> bool:
    if path == "d_sae":
        return kernel in ("compact", "transpose")
    if path == "rows":
        return kernel in ("compact", "gather", "dense_activate", "dense_residual")
    return path == "code.3"


@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("name", ["compact", "gather", "dense_activate"])
def test_a_clip_that_is_not_positive_is_refused(name, kernels, clip):
    arguments, _ = BUILDS[name](Case(kernels, torch.float64), 2)
    refused(kernels, name, {**arguments, "clip": clip})


@pytest.mark.parametrize("change", [(2, 1.0), (2, -0.1), (3, 1.0), (3, math.nan)], ids=str)
@pytest.mark.parametrize("name", ["update", "update_features of entries"])
def test_decay_rates_of_moments_outside_0_to_1_are_refused_on_the_cpu(name, change):
    place, value = change
    arguments, _ = BUILDS[name](Case(CPU, torch.float64), 2)
    adam = ADAM[0].clone()
    adam[place] = value
    refused(CPU, name, {**arguments, "adam": (adam, ADAM[1])})


@pytest.mark.parametrize("name", BUILDS)
def test_the_cpu_offers_no_bfloat16_and_says_so_before_anything_is_written(name):
    arguments, _ = BUILDS[name](Case(CPU, torch.float32), 2)
    with pytest.raises(ValueError, match=f"{kernel_of(name)}: not offered for this device"):
        CPU.call(kernel_of(name), {**arguments, "exec": CPU.exec(torch.bfloat16)})
    for field, array in arrays(arguments):
        assert array.untouched(), field


@pytest.mark.skipif(which("cc") is None, reason="no C compiler")
def test_the_header_is_plain_c():
    done = subprocess.run(
        ["cc", "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-xc",
         HEADER],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_cuda_answers_with_or_without_a_device():
    seen = _C.cuda()
    assert (seen["reason"] is None) == (len(seen["devices"]) > 0)
    if not seen["built"]:
        assert seen["reason"] == "built without CUDA"
    for device in seen["devices"]:
        assert device["name"]
        assert device["memory_bytes"] > 0


@pytest.mark.parametrize("name", BUILDS)
def test_where_there_is_no_device_a_call_says_so_and_touches_nothing(name):
    seen = _C.cuda()
    if seen["devices"]:
        pytest.skip("there is a device")
    absent = Kernels("absent", _C)
    arguments, _ = BUILDS[name](Case(absent, torch.float32), 2)
    error, words = ValueError, "built without CUDA"
    if seen["built"]:
        error, words = RuntimeError, "the CUDA runtime refused a launch: .*(driver|device)"
    with pytest.raises(error, match=f"{kernel_of(name)}: {words}"):
        absent.call(kernel_of(name), arguments)
    for field, array in arrays(arguments):
        assert array.untouched(), field
