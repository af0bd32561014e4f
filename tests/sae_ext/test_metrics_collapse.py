from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_ext.errors import UserError
from sae_ext.metrics import collapse
from sae_ext.metrics.collapse import ALARMS, SAMPLE_ROWS, CollapseSums
from sae_ext.ops import SparseCode


def sparse(h: Tensor) -> SparseCode:
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), (h > 0).sum(dim=1).cumsum(0)])
    return SparseCode(row_ptr, h.nonzero()[:, 1].int(), h[h > 0])


def codes(n: int = 200, m: int = 12, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes that depend on the class, some of them empty, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(k, (n,), generator=generator)
    mean = torch.randn(k, m, generator=generator, dtype=torch.float64)
    h = (mean[labels] + torch.randn(n, m, generator=generator, dtype=torch.float64)).relu()
    h[::17] = 0
    return h, labels


def panel_of(h: Tensor, labels: Tensor, k: int = 3, **variance: float) -> dict:
    sums = CollapseSums(h.shape[1], [f"class {c}" for c in range(k)])
    sums.update(sparse(h), labels)
    return sums.panel(**variance)


def assert_same(one: object, two: object) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_same(one[name], two[name])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert two == (pytest.approx(one, rel=1e-8) if isinstance(one, float) else one)


# -- definitions ---------------------------------------------------------------------------------


def test_every_number_is_that_of_its_definition():
    h, labels = codes()
    found = panel_of(h, labels)
    x, y = h.numpy(), labels.numpy()
    means = np.stack([x[y == c].mean(axis=0) for c in range(3)])
    length = np.linalg.norm(means, axis=1)
    cosine = means @ means.T / np.outer(length, length)
    pairs = [(0, 1), (0, 2), (1, 2)]
    assert found["n_rows"] == 200
    assert found["class_cosine"] == pytest.approx(np.mean([cosine[p] for p in pairs]))
    np.testing.assert_allclose(found["class_cosines"], cosine, rtol=1e-10)
    apart = np.linalg.norm(means[:, None] - means, axis=2) / length.mean()
    np.testing.assert_allclose(found["class_distances"], apart, atol=1e-10)
    mean = x.mean(axis=0)
    assert found["top1_share"] == pytest.approx(mean.max() / mean.sum())
    singular = np.linalg.svd(x - mean, compute_uv=False)
    p = singular / singular.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    variance = singular**2
    assert found["participation_ratio"] == pytest.approx(variance.sum() ** 2 / (variance**2).sum())
    assert found["spectrum_rows"] == 200
    gini = np.abs(mean[:, None] - mean).sum() / (2 * len(mean) * mean.sum())
    assert found["gini"] == pytest.approx(gini)


def test_what_is_told_of_a_class_is_that_of_its_rows():
    h, labels = codes()
    found = panel_of(h, labels)
    within = []
    for c, told in enumerate(found["classes"]):
        x = h[labels == c].numpy()
        u = x[x.any(axis=1)] / np.linalg.norm(x[x.any(axis=1)], axis=1, keepdims=True)
        cosine = (u @ u.T)[~np.eye(len(u), dtype=bool)].mean()
        within.append(cosine)
        l0 = (x > 0).sum(axis=1).mean()
        assert told == {
            "name": f"class {c}",
            "rows": len(x),
            "l0": pytest.approx(l0),
            "active_fraction": pytest.approx(l0 / 12),
            "within_cosine": pytest.approx(cosine),
        }
    assert found["within_class_cosine"] == pytest.approx(np.mean(within))


@pytest.mark.parametrize("factor", [1e-6, 7.0, 1e5])
def test_the_units_of_the_codes_do_not_matter(factor):
    h, labels = codes()
    assert_same(panel_of(h, labels), panel_of(factor * h, labels))


@pytest.mark.parametrize(("mean", "gini"), [([1.0] * 8, 0), ([0.0] * 7 + [3.0], 7 / 8)])
def test_gini_goes_from_equality_to_one_that_has_everything(mean, gini):
    h = torch.tensor([mean] * 4)
    assert panel_of(h, torch.tensor([0, 0, 1, 1]), 2)["gini"] == pytest.approx(gini)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("mean", [0, 1e3])
def test_equal_variance_in_some_directions_has_that_effective_rank(rank, mean):
    h = torch.eye(rank + 1, 8, dtype=torch.float64).repeat(4, 1) + mean
    found = panel_of(h, torch.arange(len(h)) % 2, 2)
    assert found["effective_rank"] == pytest.approx(rank)
    assert found["participation_ratio"] == pytest.approx(rank)


def test_rows_of_one_mean_are_told_from_rows_all_alike():
    same = torch.ones(40, 8)
    eye = torch.eye(8).repeat(5, 1)
    labels = torch.arange(40) // 8 % 2
    alike, spread = panel_of(same, labels, 2), panel_of(eye, labels, 2)
    assert alike["class_cosine"] == pytest.approx(1)
    assert spread["class_cosine"] == pytest.approx(1)
    assert alike["within_class_cosine"] == pytest.approx(1)
    assert spread["within_class_cosine"] < 0.15
    assert alike["effective_rank"] == 0
    assert spread["effective_rank"] == pytest.approx(7)


# -- alarms --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "silent", "sounding"),
    [
        ("class_cosine", 0.9899, 0.99),
        ("top1_share", 0.5, 0.5001),
        ("effective_rank", 2.0, 1.999),
        ("projection_variance", 0.05, 0.0499),
    ],
)
def test_alarms_sound_at_their_thresholds(name, silent, sounding):
    sounds, threshold = ALARMS[name]
    assert not sounds(silent, threshold)
    assert sounds(sounding, threshold)


def test_codes_that_tell_classes_apart_sound_no_alarm():
    h, labels = codes()
    assert panel_of(h, labels)["alarms"] == []


def test_each_kind_of_collapse_sounds_its_own_alarm():
    h, labels = codes(m=40)
    common = h + 50 * torch.rand(40, generator=torch.Generator().manual_seed(3)).double()
    assert panel_of(common, labels)["alarms"] == ["class_cosine"]
    dominant = h.clone()
    dominant[labels == 0, 0] += 200
    assert panel_of(dominant, labels)["alarms"] == ["top1_share"]
    line = torch.stack([labels.double(), 2.0 - labels, torch.ones(200)], dim=1)
    assert panel_of(line, labels)["alarms"] == ["effective_rank"]


@pytest.mark.parametrize(
    ("now", "initial", "share", "alarms"),
    [
        (0.04, 1.0, 0.04, ["projection_variance"]),
        (4.0, 100.0, 0.04, ["projection_variance"]),
        (0.06, 1.0, 0.06, []),
        (None, 1.0, None, []),
        (1.0, None, None, []),
        (1.0, 0.0, None, []),
    ],
)
def test_a_projection_that_shrinks_is_measured_against_its_beginning(now, initial, share, alarms):
    h, labels = codes()
    found = panel_of(h, labels, projection_variance=now, initial_projection_variance=initial)
    assert found["projection_variance"] == (None if share is None else pytest.approx(share))
    assert found["alarms"] == alarms


# -- what is missing -----------------------------------------------------------------------------


def test_without_rows_nothing_is_claimed():
    assert CollapseSums(4, ["a", "b"]).panel() == {"n_rows": 0}


@pytest.mark.parametrize("k", [1, 2])
def test_one_class_with_rows_has_no_cosine_between_classes(k):
    h, _ = codes()
    found = panel_of(h + 50, torch.zeros(200, dtype=torch.int64), k)
    for name in ("class_cosine", "class_cosines", "class_distances"):
        assert found[name] is None
    assert found["alarms"] == []
    assert found["effective_rank"] > 2


def test_a_class_without_rows_is_missing_and_not_zero():
    h, labels = codes(k=3)
    labels[labels == 1] = 2
    found = panel_of(h, labels)
    assert found["classes"][1] == {
        "name": "class 1", "rows": 0, "l0": None, "active_fraction": None, "within_cosine": None,
    }  # fmt: skip
    assert found["class_cosines"][0][1] is found["class_distances"][1][2] is None
    assert found["class_cosine"] == found["class_cosines"][0][2]
    a, b = h[labels == 0].mean(dim=0), h[labels == 2].mean(dim=0)
    apart = (a - b).norm() / ((a.norm() + b.norm()) / 2)
    assert found["class_distances"][0][2] == pytest.approx(float(apart))


def test_a_class_without_activity_has_a_distance_but_no_cosine():
    h, labels = codes(k=3)
    h[labels == 1] = 0
    found = panel_of(h, labels)
    assert found["class_cosines"][0][1] is found["class_cosines"][1][1] is None
    assert found["class_distances"][0][1] > 0
    assert found["class_cosine"] == found["class_cosines"][0][2]


def test_codes_without_any_activity_have_no_shares():
    found = panel_of(torch.zeros(20, 6), torch.arange(20) % 2, 2)
    for name in ("top1_share", "gini", "class_cosine", "within_class_cosine"):
        assert found[name] is None, name
    assert found["effective_rank"] == 0
    assert found["classes"][0]["l0"] == 0
    assert found["alarms"] == ["effective_rank"]


def test_a_single_row_has_no_spectrum():
    found = panel_of(torch.ones(1, 4), torch.zeros(1, dtype=torch.int64), 1)
    assert found["effective_rank"] is found["participation_ratio"] is None
    assert found["classes"][0]["within_cosine"] is None


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([0, 1, 3]), r"row 2 .* label 3.* 3 classes"),
        (torch.tensor([0, -1, 0]), "row 1 .* label -1"),
        (torch.tensor([0, 1]), "each of the 3 rows"),
        (torch.tensor([0.0, 1.0, 2.0]), "give an integer"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, said):
    sums = CollapseSums(4, ["a", "b", "c"])
    with pytest.raises(UserError, match=said):
        sums.update(sparse(torch.ones(3, 4)), labels)
    assert sums.panel() == {"n_rows": 0}


# -- partitions and samples ----------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_neither_batches_nor_the_order_of_merging_change_the_panel(sizes, random):
    h, labels = codes(sum(sizes))
    parts = list(zip(torch.split(h, sizes), torch.split(labels, sizes), strict=True))
    streamed, merged = CollapseSums(12, ["class 0", "class 1", "class 2"]), []
    for part, label in parts:
        streamed.update(sparse(part), label)
        merged.append(CollapseSums(12, streamed.classes))
        merged[-1].update(sparse(part), label)
    random.shuffle(merged)
    for other in merged[1:]:
        merged[0].merge(other)
    assert_same(panel_of(h, labels), streamed.panel())
    assert_same(streamed.panel(), merged[0].panel())


def many_features(n: int, seed: int = 0, batch: int = 10_000, first: int = 0) -> CollapseSums:
    """Sums that keep a sample, over rows of which row i alone has i + 1 in feature 0."""
    h, labels = codes(n)
    h[:, 0] = torch.arange(first + 1, first + n + 1)
    sums = CollapseSums(12, ["a", "b", "c"], seed)
    for part, label in zip(torch.split(h, batch), torch.split(labels, batch), strict=True):
        sums.update(sparse(part), label)
    return sums


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse, "EXACT_FEATURES", 11)


def kept(sums: CollapseSums) -> set[int]:
    return set(sums.second.kept[:, [0]].toarray()[:, 0].astype(int).tolist())


@pytest.mark.parametrize("n", [5, SAMPLE_ROWS])
def test_a_sample_of_all_rows_has_the_spectrum_of_all_rows(monkeypatch, n):
    exact = many_features(n).panel()
    monkeypatch.setattr(collapse, "EXACT_FEATURES", 11)
    sums = many_features(n)
    assert len(kept(sums)) == n
    assert_same(exact, sums.panel())


@pytest.mark.usefixtures("sampling")
def test_many_features_are_judged_by_a_seeded_sample_that_batches_do_not_change():
    whole = many_features(3000)
    assert whole.panel()["spectrum_rows"] == SAMPLE_ROWS == len(kept(whole))
    assert whole.panel()["n_rows"] == 3000
    assert kept(whole) == kept(many_features(3000, batch=7))
    assert kept(whole) != kept(many_features(3000, seed=1))


@pytest.mark.usefixtures("sampling")
def test_a_merged_sample_is_uniform_over_the_partitions():
    one, two = many_features(3000, seed=0), many_features(1000, seed=1, first=3000)
    one.merge(two)
    rows = kept(one)
    assert len(rows) == SAMPLE_ROWS
    expected, spread = SAMPLE_ROWS / 4, math.sqrt(SAMPLE_ROWS * 3 / 16)
    assert abs(sum(row > 3000 for row in rows) - expected) < 4 * spread
    assert abs(sum(row <= 1500 for row in rows) - 1.5 * expected) < 5 * spread


@pytest.mark.usefixtures("sampling")
def test_the_order_of_merging_does_not_change_a_sample():
    def parts() -> list[CollapseSums]:
        return [many_features(900, seed=s, first=900 * s) for s in range(3)]

    (a, b, c), (d, e, f) = parts(), parts()
    a.merge(b)
    a.merge(c)
    f.merge(e)
    f.merge(d)
    assert kept(a) == kept(f)


@pytest.mark.usefixtures("sampling")
def test_a_sample_estimates_the_effective_rank_of_all_rows():
    h, labels = codes(6000)
    sums = CollapseSums(12, ["a", "b", "c"])
    sums.update(sparse(h), labels)
    centred = h - h.mean(dim=0)
    p = torch.linalg.svdvals(centred)
    p = p / p.sum()
    exact = float(torch.exp(-(p * p.log()).sum()))
    assert sums.panel()["effective_rank"] == pytest.approx(exact, rel=0.01)
