from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_weights import made_up
from torch import Tensor

from sae_ext.metrics import ReconstructionSums, evaluate
from sae_ext.model import SAE
from sae_ext.ops import SparseCode


def empty_code(rows: int) -> SparseCode:
    return SparseCode(
        torch.zeros(rows + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    )


def code_with(l0: list[int], value: float = 1.0) -> SparseCode:
    """A row for each number, with features 0, 1, … up to it active."""
    col = [j for n in l0 for j in range(n)]
    row_ptr = torch.tensor([0, *np.cumsum(l0).tolist()], dtype=torch.int64)
    return SparseCode(row_ptr, torch.tensor(col, dtype=torch.int32), torch.full((len(col),), value))


def measured(x: Tensor, guess: Tensor, code: SparseCode | None = None, clip=None, d_sae=8):
    sums = ReconstructionSums(x.shape[1], d_sae)
    sums.update(x, guess, code or empty_code(len(x)), clip)
    return sums.metrics()


def rows(n: int = 300, d_in: int = 5, offset: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)).double() + offset


@pytest.fixture(scope="module")
def sae() -> SAE:
    return SAE(made_up(6, 20, bias=-0.5), clip=1.5)


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


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_the_units_of_the_activations_do_not_matter_to_ratios(factor):
    x, guess = rows(offset=2), rows(offset=2) + 0.3 * rows(seed=2)
    before, after = measured(x, guess), measured(factor * x, factor * guess)
    for name in ("fvu", "explained_variance", "cosine", "relative_reconstruction_bias"):
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
    assert_same(found, measured(x, sae.decode(code), code, sae.clip, d_sae=20))
    p = sae.parameters
    z = ((x - p.b_dec) @ p.W_enc + p.b_enc).relu().clamp(max=1.5)
    assert found["l0"] == pytest.approx(float((z > 0).sum(dim=1).double().mean()))
    assert found["clip_rate"] == pytest.approx(float((z == 1.5).sum() / (z > 0).sum()))
    assert found["clip_rate"] > 0
