"""What the CUDA kernels alone have: work that is skipped, 16-bit matrices, long lists, shared memory."""

from __future__ import annotations

import math

import pytest
import torch

_C = pytest.importorskip("sae_ext._C", reason="the kernels are not built")

from cases import (  # noqa: E402
    BUILDS,
    Case,
    compare,
    kernel_of,
    listed,
    residual,
    run,
    run_and_compare,
    transpose,
    update_features,
)
from guarded import Guarded, arrays, code_out, random, results  # noqa: E402

# ---- Work that is skipped, and what asks for that ----------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
def test_where_work_is_to_be_skipped_nothing_is_written(name, cuda_offer):
    for flag in (1, 7, -1):
        assert_skips(name, Case(*cuda_offer, rows=5, d_in=64, d_sae=70), flag)


def assert_skips(name: str, case: Case, flag: int) -> None:
    arguments, _ = BUILDS[name](case, 2)
    arguments["exec"] = case.kernels.exec(case.stored, skip=torch.tensor([flag]))
    for _, array in arrays(arguments):
        array.inside.fill_(1)  # what is made of poison is often poison again
    assert case.kernels.call(kernel_of(name), arguments) in (None, _C.OK)
    for field, array in arrays(arguments):
        if name == "transpose" and field == "counts":
            # A counting sort's places are cleared by the runtime, which asks nobody.
            assert bool((array.inside.view(torch.int32) <= 1).all()), "columns are counted"
        else:
            assert array.untouched(), f"{field} with {flag}"


@pytest.mark.parametrize("name", BUILDS)
def test_where_work_could_be_skipped_and_need_not_all_is_done(name, cuda_offer):
    case = Case(*cuda_offer, rows=5, d_in=64, d_sae=70)
    arguments, expected = BUILDS[name](case, 2)
    arguments["exec"] = case.kernels.exec(case.stored, skip=torch.tensor([0]))
    assert case.kernels.call(kernel_of(name), arguments) in (None, _C.OK)
    compare(name, case, arguments, expected)


@pytest.mark.parametrize("room", [630, 500, 200])  # enough, only for the first chunk, for none
def test_a_chunk_after_one_that_does_not_fit_is_skipped(cuda_kernels, room):
    pre, bias = random(9, 70).abs() + 1, torch.zeros(70, dtype=torch.float64)
    row_ptr, *others = code_out(9, room, torch.float64)
    counters = others[3].inside
    ends = []
    for begin, end in ((0, 6), (6, 9)):
        part = Guarded.holding(row_ptr.inside[begin : end + 1])
        listed(cuda_kernels, pre[begin:end], bias, clip=0.5, out=(part, *others), skip=counters[3:])
        ends.append(part)
        row_ptr.inside[begin : end + 1] = part.inside
    looked_at, saturated = {630: (630, 630), 500: (630, 420), 200: (420, 0)}[room]
    assert counters.tolist() == [looked_at, saturated, looked_at, _C.TOO_SHORT * (room < 630)]
    assert ends[1].untouched() == (room < 420)


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        # Each makes another of the sums something else than a finite number.
        *(("residual", what) for what in ("", "x", "w", "q", "s")),
        *(("dense_residual", what) for what in ("", "x", "w")),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_finite_number_asks_for_a_halt(cuda_offer, name, spoilt, value):
    case = Case(*cuda_offer, rows=7, d_in=17, d_sae=70)
    if spoilt:
        numbers = case[spoilt].view(-1)
        numbers[3 * len(numbers) // 7] = value  # in the row that has all entries, or one of them
    for before in (0, 5):
        arguments, _ = BUILDS[name](case, 2)
        arguments["halt"] = Guarded.holding(torch.tensor([before]))
        case.kernels.call(name, arguments)
        assert arguments["halt"].inside.item() == (_C.NOT_FINITE if spoilt else before)
    without, _ = BUILDS[name](case, 2)
    without["halt"] = None
    case.kernels.call(name, without)
    for field, tensor in results(without).items():
        seen = results(arguments)[field]
        assert bool(((tensor == seen) | (tensor.isnan() & seen.isnan())).all()), field


# ---- 16-bit matrices ---------------------------------------------------------------------------------


def patterns() -> torch.Tensor:
    """Every 16-bit float, and what lies between two of them: just above, the tie, just below the next."""
    upper = torch.arange(1 << 16)[:, None] << 16
    bits = upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().view(torch.float32)


def test_floats_are_rounded_to_16_bits_as_torch_does(cuda_kernels):
    # An update that changes nothing writes the weights once more, in 16 bits.
    values = patterns().view(-1, 512)
    d_sae, d_in = values.shape
    case = Case(cuda_kernels, torch.bfloat16, 1, d_in, d_sae)
    still = torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0, 1.0], dtype=torch.float64)
    arguments, _ = BUILDS["update_features of sums, pulled"](case, 2)
    arguments = {
        **arguments, "gradient": case.gradient(listed=False, pulled=False), "adam": (still, None),
    }  # fmt: skip
    for name in ("W_enc", "W_dec"):
        arguments[name][0].inside.copy_(values)
    cuda_kernels.call("update_features", arguments)
    for name in ("W_enc", "W_dec"):
        weights, copy = arguments[name][0].inside, arguments[f"{name}_copy"].inside
        assert bool(((weights == values) | (weights.isnan() & values.isnan())).all())
        assert torch.equal(copy.isnan(), values.isnan())
        seen, wanted = (t.view(torch.int16)[~values.isnan()] for t in (copy, weights.bfloat16()))
        assert torch.equal(seen, wanted)


def test_entries_take_their_gradients_from_the_rows_as_they_are_stored(cuda_kernels):
    case = Case(cuda_kernels, torch.bfloat16)
    arguments, _ = run("residual", case)
    got = results(arguments)
    product = got["grad"].double() @ case.exact("W_dec").T
    penalty = 3 / case.rows * case.exact("s")[:, None] * case.exact("q")
    expected = ((product + penalty) * case.passes)[case.active]
    assert (got["dz"].double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["update_features of entries", "update_features of sums, pulled"])
@pytest.mark.parametrize("missing", ["W_enc_copy", "W_dec_copy"])
def test_a_copy_of_the_weights_is_written_where_it_is_wanted(cuda_offer, name, missing):
    case = Case(*cuda_offer, rows=9, d_in=64, d_sae=30, aligned=True)
    arguments, expected = BUILDS[name](case, 2)
    del expected[missing]
    arguments[missing] = None
    case.kernels.call("update_features", arguments)
    compare(name, case, arguments, expected)


# ---- Many entries ------------------------------------------------------------------------------------

OF_LISTS = [name for name in BUILDS if "of entries" in name]


def long_lists(offer, d_in: int, slots: int) -> Case:
    """Three features with more entries than one block is to sum, and one with just as many as it is."""
    case = Case(
        *offer,
        offer[0].module.LONG_LIST + 1,
        d_in,
        300,
        share=0.02,
        everywhere=(0, 5, 7, 299),
        slots=slots,
    )
    case["pre"][0, 5] = -99
    case.list_entries()
    assert case.long.tolist() == [0, 7, 299]
    return case


@pytest.mark.parametrize("slots", [8, 3, 2, 1])
def test_features_with_long_lists_are_noted_as_far_as_there_is_room(cuda_kernels, slots):
    case = long_lists((cuda_kernels, torch.float32), 3, slots)
    for threads in (1, 5):
        arguments, expected = transpose(case, threads)
        cuda_kernels.call("transpose", arguments)
        compare("transpose", case, arguments, expected)
        noted = case.long[:slots].tolist()
        seen = arguments["entries"][4].inside
        assert seen[: 1 + len(noted)].tolist() == [len(noted), *noted]
        assert bool((seen[1 + len(noted) :] == -77).all())


@pytest.mark.parametrize("name", OF_LISTS)
@pytest.mark.parametrize("slots", [5, 2, 0])  # enough, too few, none
@pytest.mark.parametrize("d_in", [37, 296])
def test_long_lists_are_summed_the_same_wherever_they_are_noted(cuda_offer, name, slots, d_in):
    case = long_lists(cuda_offer, d_in, slots)
    case.aligned = d_in == 296
    run_and_compare(name, case)


@pytest.mark.parametrize("name", OF_LISTS)
def test_where_work_is_to_be_skipped_long_lists_are_not_summed_either(name, cuda_kernels):
    assert_skips(name, long_lists((cuda_kernels, torch.float32), 3, 2), 1)


@pytest.mark.parametrize("name", OF_LISTS)
def test_long_lists_are_summed_the_same_from_run_to_run(cuda_offer, name):
    case = long_lists(cuda_offer, 40, 2)
    first, second = (results(run(name, case)[0]) for _ in range(2))
    for field, tensor in first.items():
        assert torch.equal(tensor, second[field]), field


def test_more_features_than_one_block_has_sums_of_are_sorted(cuda_kernels):
    run_and_compare("transpose", Case(cuda_kernels, torch.float32, 2, 1, 66_000, share=0.01))


def test_a_row_of_many_supported_entries_is_listed_in_order(cuda_kernels):
    run_and_compare("gather", Case(cuda_kernels, torch.float64, 3, 2, 1100, share=0.9))


# ---- Shared memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("d_in", [64, 65])
@pytest.mark.parametrize("centred", [True, False])
def test_decoder_rows_kept_in_shared_memory_change_nothing(cuda_offer, d_in, centred):
    case = Case(*cuda_offer, rows=7, d_in=d_in, d_sae=150, aligned=True)
    row = d_in * case.stored.itemsize
    seen = []
    # None, less than one, some, and more than the longest row has.
    for size in (0, row - 1, 3 * row + 5, 151 * row):
        arguments, expected = residual(centred)(case, 2)
        arguments["shared_bytes"] = size
        case.kernels.call("residual", arguments)
        compare("residual", case, arguments, expected)
        seen.append(results(arguments))
    for other in seen[1:]:
        for field, tensor in other.items():
            assert torch.equal(tensor, seen[0][field]), field


@pytest.mark.parametrize("beyond", [0, 1, 4])
@pytest.mark.parametrize("pulled", [True, False])
def test_a_row_too_long_for_shared_memory_is_kept_in_scratch(cuda_offer, beyond, pulled):
    kernels, stored = cuda_offer
    d_in = kernels.module.SHARED_ROW // Case.of_sums(stored).itemsize + beyond
    case = Case(kernels, stored, 4, d_in, 5, aligned=True)
    build = update_features(listed=True, pulled=pulled, unit_norm=not pulled)
    arguments, expected = build(case, 2)
    assert (arguments["scratch"] is None) == (beyond == 0)
    if beyond:
        with pytest.raises(ValueError, match="a pointer is null or a size"):
            kernels.call("update_features", {**arguments, "scratch": None})
    kernels.call("update_features", arguments)
    compare("update_features", case, arguments, expected)


@pytest.mark.parametrize("threads", [1, 3, 200])
def test_scratch_that_is_not_needed_changes_nothing(cuda_offer, threads):
    case = Case(*cuda_offer, rows=9, d_in=64, d_sae=30)
    build = update_features(listed=True, pulled=False, unit_norm=True)
    arguments, expected = build(case, threads)
    arguments["scratch"] = case.scratch(threads, case.d_in)
    case.kernels.call("update_features", arguments)
    compare("update_features", case, arguments, expected)
    without = results(run("update_features of entries", case, threads)[0])
    for field, tensor in results(arguments).items():
        assert torch.equal(tensor, without[field]), field
