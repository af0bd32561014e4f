from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from sae_ext.errors import UserError
from sae_ext.metrics.stability import agreement, recovery

NUMBERS = ("matched_cosine", "matched_above_0.9", "matched_above_0.7", "mmcs", "mmcs_other")


def directions(m: int, d: int = 32, seed: int = 0) -> Tensor:
    W = torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return W / W.norm(dim=1, keepdim=True)


def shuffled(W: Tensor, seed: int = 9) -> Tensor:
    """The same directions in another order, of other lengths."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(W), generator=generator)
    return W[order] * (0.1 + torch.rand(len(W), 1, generator=generator, dtype=W.dtype))


# -- what agrees ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_neither_order_nor_length_of_the_features_matters(dtype):
    W = directions(40)
    found = agreement(W, shuffled(W).to(dtype))
    assert [found[name] for name in NUMBERS] == pytest.approx([1] * 5, abs=1e-4)
    assert (found["features"], found["other_features"], found["pairs"]) == (40, 40, 40)


def test_the_matching_is_the_best_of_all_one_to_one_matchings():
    W, other = directions(5, 4), directions(5, 4, seed=1)
    cosine = W @ other.T
    best = max(float(cosine[range(5), list(p)].mean()) for p in permutations(range(5)))
    assert agreement(W, other)["matched_cosine"] == pytest.approx(best)


def test_opposite_directions_do_not_agree():
    W = directions(8, 8)
    assert agreement(W, -W)["matched_cosine"] < 0.5
    assert agreement(torch.eye(8), -torch.eye(8))["mmcs"] == 0


@pytest.mark.parametrize(
    ("degrees", "above_9", "above_7"), [(20, 1, 1), (30, 0, 1), (44, 0, 1), (46, 0, 0)]
)
def test_shares_are_of_pairs_whose_cosine_is_above_a_threshold(degrees, above_9, above_7):
    angle = torch.deg2rad(torch.tensor(float(degrees), dtype=torch.float64))
    W = torch.eye(20, dtype=torch.float64)[:10]
    other = W * angle.cos() + torch.eye(20, dtype=torch.float64)[10:] * angle.sin()
    found = agreement(W, other)
    assert (found["matched_above_0.9"], found["matched_above_0.7"]) == (above_9, above_7)
    assert found["matched_cosine"] == pytest.approx(float(angle.cos()))


def test_the_best_cosine_has_a_direction_of_reading():
    W = directions(30)
    found = agreement(W[:10], W)
    assert found["mmcs"] == pytest.approx(1)
    assert found["mmcs_other"] < 0.8
    assert found["pairs"] == 10
    back = agreement(W, W[:10])
    assert back["mmcs"] == pytest.approx(found["mmcs_other"])
    assert back["mmcs_other"] == pytest.approx(1)
    assert back["matched_cosine"] == pytest.approx(1)


def test_a_dictionary_of_copies_is_matched_once_only():
    W = torch.eye(16)
    found = agreement(W, W[:1].expand(16, -1))
    assert found["mmcs_other"] == 1
    assert found["matched_cosine"] == pytest.approx(1 / 16)


# -- chance --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "d"), [(50, 4), (50, 64), (200, 8)])
def test_unrelated_dictionaries_agree_as_far_as_the_null_says(m, d):
    found = agreement(directions(m, d), directions(m, d, seed=1), draws=5)
    for name in ("matched_cosine", "mmcs", "mmcs_other"):
        assert found[name] == pytest.approx(found["null_random"][name], abs=0.06), name
    assert found["null_draws"] == 5


def test_in_few_dimensions_chance_alone_looks_like_agreement():
    found = agreement(directions(500, 3), directions(500, 3, seed=1))
    assert found["mmcs"] > 0.95
    assert found["null_random"]["mmcs"] > 0.95


def test_the_null_is_seeded_and_a_mean_over_its_draws():
    W, other = directions(20), directions(20, seed=1)
    one, again, elsewhere = (agreement(W, other, seed=s)["null_random"] for s in (0, 0, 1))
    assert one == again
    assert one != elsewhere
    single = agreement(W, other, draws=1)["null_random"]
    assert single != one
    assert set(one) == set(NUMBERS)


def test_the_rotated_null_keeps_the_angles_within_the_dictionary():
    W, narrow = directions(100, 8), directions(1, 8, seed=1).expand(100, -1)
    found = agreement(W, narrow, rotated=True)
    random, rotated = found["null_random"], found["null_rotated"]
    # A single direction, wherever it points, is near few others; a hundred of them are near all.
    assert rotated["mmcs"] < 0.4 < random["mmcs"]
    assert rotated["matched_cosine"] == pytest.approx(rotated["mmcs"])
    assert "null_rotated" not in agreement(W, narrow)


# -- samples and masks ---------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "sampled"), [(15, 15), (59, 59), (60, None), (4096, None)])
def test_of_many_features_a_sample_is_matched_with_all_others_and_told(limit, sampled):
    W = directions(60)
    found = agreement(W, shuffled(W), limit=limit)
    assert (found["sampled"], found["other_sampled"]) == (sampled, sampled)
    assert found["pairs"] == (sampled or 60)
    assert [found[name] for name in NUMBERS] == pytest.approx([1] * 5)


def test_the_sample_is_seeded_and_estimates_what_all_would_give():
    W, other = directions(400, 16), directions(300, 16, seed=1)
    whole = agreement(W, other)
    found = agreement(W, other, limit=150)
    assert found == agreement(W, other, limit=150)
    assert found["mmcs"] != agreement(W, other, limit=150, seed=1)["mmcs"]
    assert (found["sampled"], found["other_sampled"]) == (150, 150)
    for name in ("mmcs", "mmcs_other"):
        assert found[name] == pytest.approx(whole[name], abs=0.02)


def test_features_may_be_left_out_on_either_side():
    W = directions(30)
    other = shuffled(W[:20])
    W[25] = 0
    other = torch.cat([other, torch.full((1, 32), torch.nan, dtype=torch.float64)])
    alive, other_alive = torch.arange(30) < 20, torch.arange(21) < 20
    found = agreement(W, other, alive=alive, other_alive=other_alive)
    assert found["matched_cosine"] == pytest.approx(1)
    assert (found["features"], found["other_features"]) == (20, 20)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_a_feature_without_direction_is_an_error_that_names_it(value):
    W, other = directions(8), directions(8, seed=1)
    other[5] = value
    with pytest.raises(UserError, match=r"row 5 of the second dictionary .* mask"):
        agreement(W, other)
    alive = torch.ones(8, dtype=torch.bool)
    alive[2] = False
    with pytest.raises(UserError, match="row 5 of the second dictionary"):
        agreement(W, other, other_alive=alive)


@pytest.mark.parametrize(
    ("other", "options", "said"),
    [
        (directions(8, 31), {}, r"\[8, 32\] and \[8, 31\]"),
        (directions(8)[0], {}, r"decoder rows"),
        (directions(8), {"alive": torch.ones(7, dtype=torch.bool)}, "mask of the first"),
        (directions(8), {"alive": torch.ones(8)}, "mask of the first"),
        (directions(8), {"other_alive": torch.zeros(8, dtype=torch.bool)}, "no features left"),
        (directions(8), {"limit": 0}, "limit and draws"),
        (directions(8), {"draws": 0}, "limit and draws"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(other, options, said):
    with pytest.raises(UserError, match=said) as error:
        agreement(directions(8), other, **options)
    assert "\n" not in str(error.value)


# -- planted directions --------------------------------------------------------------------------


@pytest.mark.parametrize("found", [0, 5, 20])
def test_recovery_is_the_share_of_true_directions_that_are_found(found):
    truth = directions(20, 64)
    W_dec = torch.cat([directions(40, 64, seed=1), 3 * truth[:found]])
    seen = recovery(truth, W_dec)
    assert seen["recovered"] == found / 20
    assert seen["null_recovered"] == 0
    assert seen["pairs"] == 20


def test_true_directions_without_a_match_were_not_found():
    truth = directions(20, 64)
    seen = recovery(truth, truth[:6])
    assert seen["recovered"] == pytest.approx(6 / 20)
    assert seen["matched_above_0.9"] == 1


def test_one_feature_cannot_be_the_match_of_two_true_directions():
    truth = torch.eye(2)
    both = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert recovery(truth, both)["recovered"] == 0
    assert recovery(truth, torch.eye(2)[[0, 0]])["recovered"] == 0.5


def test_dead_features_recover_nothing():
    truth = directions(10, 64)
    alive = torch.arange(10) < 4
    W_dec = torch.where(alive[:, None], truth, torch.zeros_like(truth))
    assert recovery(truth, W_dec, alive=alive)["recovered"] == pytest.approx(0.4)
