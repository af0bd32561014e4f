from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_weights import copied, made_up
from torch import Tensor

from sae_ext.architectures import ReLU
from sae_ext.metrics import ReconstructionSums, evaluate
from sae_ext.metrics.reconstruction import encoder_decoder_cosine
from sae_ext.model import SAE
from sae_ext.ops import Parameters, SparseCode


def empty_code(rows: int) -> SparseCode:
    return SparseCode(
        torch.zeros(rows + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    )


def code_with(l0: list[int], value: float = 1.0) -> SparseCode:
    """A row for each number, with features 0, 1, … up to it active."""
    col = [j for n in l0 for j in range(n)]
    row_ptr = torch.tensor([0, *np.cumsum(l0).tolist()], dtype=torch.int64)
    return SparseCode(row_ptr, torch.tensor(col, dtype=torch.int32), torch.full((len(col),), value))


def measured(
    x: Tensor, guess: Tensor, code: SparseCode | None = None, clip=None, d_sae=8, lengths=None
):
    sums = ReconstructionSums(x.shape[1], d_sae, lengths)
    sums.update(x, guess, code or empty_code(len(x)), clip)
    return sums.metrics()


def rows(n: int = 300, d_in: int = 5, offset: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)).double() + offset


@pytest.fixture(scope="module")
def sae() -> SAE:
    return SAE(made_up(6, 20, bias=-0.5), ReLU(clip=1.5))


# -- explained variance --------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_predicting_the_mean_explains_nothing(offset):
    x = rows(offset=offset)
    found = measured(x, x.mean(dim=0).expand_as(x))
    assert found["fvu"] == pytest.approx(1, abs=1e-9)
    assert found["explained_variance"] == pytest.approx(0, abs=1e-9)


def test_a_perfect_reconstruction_explains_everything():
    found = measured(rows(), rows())
    assert (found["fvu"], found["explained_variance"], found["mse"]) == (0, 1, 0)
    assert found["cosine"] == pytest.approx(1)
    assert found["relative_reconstruction_bias"] == pytest.approx(1)


def test_a_large_common_offset_is_not_taken_for_explained_variance():
    x = rows(offset=50.0)
    found = measured(x, torch.full_like(x, 50.0))
    assert found["cosine"] > 0.99
    assert abs(found["explained_variance"]) < 0.05


def test_the_pooled_ratio_is_that_of_its_definition():
    x, guess = rows(seed=1), rows(seed=1) + 0.3 * rows(seed=2)
    found = measured(x, guess)
    total = (x - x.mean(dim=0)).square().sum()
    assert found["fvu"] == pytest.approx(float((x - guess).square().sum() / total), rel=1e-10)
    assert found["mse"] == pytest.approx(float((x - guess).square().sum(dim=1).mean()), rel=1e-10)
    bias = guess.square().sum() / (x * guess).sum()
    assert found["relative_reconstruction_bias"] == pytest.approx(float(bias), rel=1e-10)


def test_halving_the_reconstruction_halves_its_bias_and_keeps_the_cosine():
    x = rows()
    found = measured(x, x / 2)
    assert found["relative_reconstruction_bias"] == pytest.approx(0.5)
    assert found["cosine"] == pytest.approx(1)


RATIOS = ("fvu", "explained_variance", "cosine", "shrinkage", "relative_reconstruction_bias")


@pytest.mark.parametrize("factor", [1e-7, 1e-3, 7.0, 1e4])
def test_the_units_of_the_activations_do_not_matter_to_ratios(factor):
    x, guess = rows(offset=2), rows(offset=2) + 0.3 * rows(seed=2)
    before, after = measured(x, guess), measured(factor * x, factor * guess)
    for name in RATIOS:
        assert after[name] == pytest.approx(before[name], rel=1e-9)
    assert after["mse"] == pytest.approx(factor**2 * before["mse"], rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 123.456])
@pytest.mark.parametrize("n", [1, 7, 1000])
def test_without_variance_there_is_no_explained_variance(value, n):
    x = torch.full((n, 5), value)
    found = measured(x, x + 0.5)
    assert found["fvu"] is None
    assert found["explained_variance"] is None
    assert found["mse"] == pytest.approx(5 * 0.25, rel=1e-5)


def test_a_small_variance_beside_a_large_mean_is_still_seen():
    x = 100 + 1e-3 * rows(1000)
    found = measured(x, x.mean(dim=0).expand_as(x))
    assert found["fvu"] == pytest.approx(1, abs=1e-3)


def test_without_rows_nothing_is_claimed():
    assert ReconstructionSums(3, 8).metrics() == {"n_rows": 0}


def test_a_reconstruction_of_zero_has_no_bias_ratio():
    x = rows()
    assert measured(x, torch.zeros_like(x))["relative_reconstruction_bias"] is None


@pytest.mark.parametrize(
    ("offset", "guess", "expected"),
    [
        (0.0, lambda x: 0.7 * x, 0.91),
        (3.0, lambda x: x.mean(dim=0).expand_as(x), 0.0),
        (3.0, lambda x: x + 1, 0.0),
        (3.0, lambda x: x + 0.1, 0.99),
    ],
    ids=["shrunk", "mean", "offset of one sigma", "offset of a tenth"],
)
def test_neither_a_common_mean_nor_a_constant_error_passes_for_quality(offset, guess, expected):
    x = rows(4096, 64, offset=offset)
    assert measured(x, guess(x))["explained_variance"] == pytest.approx(expected, abs=2e-3)


def test_rows_of_any_length_weigh_by_their_variance():
    lengths = torch.exp(2 * rows(2000, 1, seed=3))
    x = lengths * rows(2000, 16)
    noise = 0.3 * rows(2000, 16, seed=2) * lengths.square().mean().sqrt()
    found = measured(x, x + noise)["explained_variance"]
    exact = 1 - noise.square().sum() / (x - x.mean(dim=0)).square().sum()
    assert found == pytest.approx(float(exact), rel=1e-9)
    assert found > 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])
def test_rows_of_low_precision_far_from_zero_are_measured_as_in_float64(dtype, mean):
    x = (rows(2000, 16) + mean).to(dtype)
    guess = (rows(2000, 16) + mean + 0.5 * rows(2000, 16, seed=2)).to(dtype)
    found = measured(x, guess)
    exact, rebuilt = x.double(), guess.double()
    error = (exact - rebuilt).square().sum()
    fvu = error / (exact - exact.mean(dim=0)).square().sum()
    ratio = rebuilt.norm(dim=1) / exact.norm(dim=1)
    assert found["fvu"] == pytest.approx(float(fvu), rel=1e-8)
    assert found["mse"] == pytest.approx(float(error) / 2000, rel=1e-12)
    assert found["shrinkage"] == pytest.approx(float(ratio.mean()), rel=1e-12)


def test_shrinkage_is_the_mean_ratio_of_lengths():
    x = rows(100)
    factor = torch.linspace(0.2, 1.0, 100).double()[:, None]
    assert measured(x, factor * x)["shrinkage"] == pytest.approx(0.6)
    assert measured(x, torch.zeros_like(x))["shrinkage"] == 0
    assert measured(x, -x)["shrinkage"] == pytest.approx(1)


def test_rows_without_length_are_left_out_of_ratios_by_row_and_counted():
    x = rows(10)
    x[:4] = 0
    x[4] = 1e-13
    guess = 0.5 * x
    guess[:5] = 1
    found = measured(x, guess)
    assert found["rows_without_length"] == 5
    assert found["shrinkage"] == pytest.approx(0.5)
    assert found["cosine"] == pytest.approx(1)
    assert found["n_rows"] == 10
    none = measured(torch.zeros(3, 5), torch.ones(3, 5))
    assert (none["shrinkage"], none["cosine"], none["rows_without_length"]) == (None, None, 3)


def test_a_reconstruction_of_zero_has_cosine_zero():
    x = rows(10)
    guess = x.clone()
    guess[:5] = 0
    assert measured(x, guess)["cosine"] == pytest.approx(0.5)


def test_the_bias_is_the_factor_that_would_rescale_the_reconstruction_best():
    x, guess = rows(seed=1), 0.6 * rows(seed=1) + 0.3 * rows(seed=2)
    bias = measured(x, guess)["relative_reconstruction_bias"]

    def error(factor: float) -> float:
        return float((guess / factor - x).square().sum())

    assert all(error(bias) < error(bias * near) for near in (0.9, 0.99, 1.01, 1.1))


# -- sparsity ------------------------------------------------------------------------------------


def test_l0_is_the_mean_number_of_active_features():
    found = measured(rows(4), rows(4), code_with([0, 3, 8, 1]))
    assert found["l0"] == 3
    assert found["l1"] == 3


@pytest.mark.parametrize("l0", [[2] * 40, list(range(8)) * 5, [0] * 39 + [8], [5]])
def test_quantiles_of_l0_split_the_rows_as_they_say(l0):
    quantiles = measured(rows(len(l0)), rows(len(l0)), code_with(l0))["l0_quantiles"]
    assert list(quantiles) == ["p05", "p25", "p50", "p75", "p95"]
    for name, value in quantiles.items():
        expected = np.quantile(l0, int(name[1:]) / 100, method="inverted_cdf")
        assert value == expected


def test_dead_and_dense_features_are_counted_over_all_features():
    # Feature 0 fires in all 40 rows, feature 1 in 4 of them (a tenth, not more), the others never.
    l0 = [2] * 4 + [1] * 36
    found = measured(rows(40), rows(40), code_with(l0))
    assert found["dead_fraction"] == 6 / 8
    assert found["dead_rows"] == 40
    assert found["dense_fraction"] == 1 / 8


@pytest.mark.parametrize(
    ("fired", "dense", "frequent"),
    [(0, 0, 0), (1, 0, 0), (10, 0, 0), (11, 0, 1), (100, 0, 1), (101, 1, 1)],
)
def test_dense_and_frequent_are_more_than_a_tenth_and_more_than_a_hundredth(fired, dense, frequent):
    found = measured(rows(1000), rows(1000), code_with([1] * fired + [0] * (1000 - fired)))
    assert found["dense_fraction"] == dense / 8
    assert found["frequent_fraction"] == frequent / 8


def test_firing_rates_are_counted_by_half_decades_and_silence_apart():
    # Features fire in 1000, 100, 99, 10 and 1 of 1000 rows; three never do.
    l0 = [5] + [4] * 9 + [3] * 89 + [2] + [1] * 900
    histogram = measured(rows(1000), rows(1000), code_with(l0))["density_histogram"]
    edges, features = histogram["log10_edges"], histogram["features"]
    assert (edges[0], edges[-1], len(edges)) == (-7, 0, len(features) + 1)
    assert histogram["never_fired"] == 3
    counted = {edge: count for edge, count in zip(edges, features, strict=False) if count}
    assert counted == {-3.0: 1, -2.0: 1, -1.5: 1, -1.0: 1, -0.5: 1}


def test_a_rate_below_the_lowest_edge_counts_in_the_lowest_bin():
    sums = ReconstructionSums(3, 2)
    sums.update(rows(1, 3), rows(1, 3), code_with([1]), None)
    sums.rows = 10**9
    histogram = sums.metrics()["density_histogram"]
    assert histogram["features"][0] == 1
    assert histogram["never_fired"] == 1


def test_the_weighted_l1_counts_an_activation_by_what_it_writes():
    lengths = np.array([2.0, 0.5, 1, 1, 1, 1, 1, 1])
    found = measured(rows(2), rows(2), code_with([1, 2], value=3.0), lengths=lengths)
    assert found["l1"] == 4.5
    assert found["l1_weighted"] == (2 * 3 * 2.0 + 3 * 0.5) / 2
    assert measured(rows(2), rows(2), code_with([1, 2]))["l1_weighted"] is None


def test_the_weighted_l1_is_that_of_any_split_of_length_between_code_and_decoder(sae):
    p, factor = sae.parameters, torch.linspace(0.1, 5.0, 20).double()
    wide = Parameters(
        p.W_enc_rows * factor[:, None], p.b_enc * factor, p.W_dec / factor[:, None], p.b_dec
    )
    x = rows(100, 6)
    one, two = (evaluate(SAE(w), [x]).metrics() for w in (p, wide))
    assert two["l1_weighted"] == pytest.approx(one["l1_weighted"], rel=1e-9)
    assert two["l1"] != pytest.approx(one["l1"], rel=0.01)
    assert two["fvu"] == pytest.approx(one["fvu"], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_clip_that_the_dtype_rounds_still_counts_as_reached(dtype):
    sae = SAE(copied(made_up(6, 20), dtype), ReLU(clip=0.7))
    x = rows(200, 6)
    p = sae.parameters
    pre = (x.to(dtype) - p.b_dec) @ p.W_enc + p.b_enc
    over = (pre > 0.71).sum() / (pre > 0).sum()
    assert evaluate(sae, [x]).metrics()["clip_rate"] >= float(over) > 0.1


def test_the_clip_rate_is_the_share_of_firings_at_the_clip():
    code = code_with([2, 2])._replace(val=torch.tensor([1.0, 3.0, 2.9, 3.0]))
    assert measured(rows(2), rows(2), code, clip=3.0)["clip_rate"] == 0.5
    assert measured(rows(2), rows(2), code, clip=None)["clip_rate"] == 0
    assert measured(rows(2), rows(2), empty_code(2), clip=3.0)["clip_rate"] is None


# -- partitions ----------------------------------------------------------------------------------


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == (
            pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        ), name


@given(st.lists(st.integers(1, 120), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_neither_batches_nor_the_order_of_merging_change_the_metrics(sae, sizes, random):
    x = rows(sum(sizes), 6, offset=1)
    x[::13] = 0
    whole = evaluate(sae, [x]).metrics()
    parts = list(torch.split(x, sizes))
    assert_same(evaluate(sae, parts).metrics(), whole)
    sums = [evaluate(sae, [part]) for part in parts]
    random.shuffle(sums)
    for other in sums[1:]:
        sums[0].merge(other)
    assert_same(sums[0].metrics(), whole)


def test_an_evaluation_is_that_of_the_reconstruction_itself(sae):
    x = rows(200, 6)
    code = sae.encode(x)
    found = evaluate(sae, [x]).metrics()
    lengths = sae.parameters.W_dec.norm(dim=1).numpy()
    assert_same(found, measured(x, sae.decode(code), code, sae.clip, d_sae=20, lengths=lengths))
    p = sae.parameters
    z = ((x - p.b_dec) @ p.W_enc + p.b_enc).relu().clamp(max=1.5)
    assert found["l0"] == pytest.approx(float((z > 0).sum(dim=1).double().mean()))
    assert found["clip_rate"] == pytest.approx(float((z == 1.5).sum() / (z > 0).sum()))
    assert found["clip_rate"] > 0


def test_what_is_rebuilt_is_compared_with_what_the_decoder_approximates(sae):
    class Doubling(SAE):
        def target(self, x: Tensor) -> Tensor:
            return 2 * x

    x = rows(100, 6)
    found = evaluate(Doubling(sae.parameters, sae.architecture), [x]).metrics()
    code = sae.encode(x)
    assert found["mse"] == measured(2 * x, sae.decode(code), code, 1.5, d_sae=20)["mse"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [2.0, 100.0])
def test_the_fast_sae_on_rows_of_low_precision_is_measured_as_the_exact_one(sae, dtype, mean):
    x = rows(500, 6, offset=mean).to(dtype)
    fast = SAE(copied(sae.parameters, torch.float32), sae.architecture)
    found, exact = evaluate(fast, [x]).metrics(), evaluate(sae, [x]).metrics()
    for name in (*RATIOS, "l0", "l1", "l1_weighted"):
        assert found[name] == pytest.approx(exact[name], rel=1e-4), name


# -- the weights ---------------------------------------------------------------------------------


def test_encoder_decoder_cosines_are_told_as_quantiles_over_features():
    p = made_up(6, 200)
    cosine = (p.W_enc_rows * p.W_dec).sum(dim=1) / p.W_enc_rows.norm(dim=1)
    found = encoder_decoder_cosine(SAE(p))
    assert list(found) == ["p05", "p25", "p50", "p75", "p95"]
    for name, value in found.items():
        below = float((cosine <= value).double().mean())
        assert below == pytest.approx(int(name[1:]) / 100, abs=0.01)


def test_encoder_decoder_cosines_leave_out_features_without_length():
    p = made_up(6, 20)
    p.W_enc_rows.copy_(3 * p.W_dec)
    p.W_dec[:10] = 0
    assert encoder_decoder_cosine(SAE(p)) == pytest.approx(dict.fromkeys(
        ["p05", "p25", "p50", "p75", "p95"], 1.0
    ))  # fmt: skip
    p.W_dec[:] = 0
    assert encoder_decoder_cosine(SAE(p)) is None


def test_encoder_and_decoder_of_different_widths_have_no_cosine():
    p = made_up(6, 20)
    other = Parameters(p.W_enc_rows, p.b_enc, made_up(9, 20).W_dec, torch.zeros(9))
    assert encoder_decoder_cosine(SAE(other)) is None
