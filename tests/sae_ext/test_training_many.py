"""Several autoencoders in one pass over the data: each ends as it would have alone."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from made_up_training import RELU, SHORT, fit, planted, same, variant

from sae_ext.activations.dataset import Dataset
from sae_ext.config import SAEConfig, TrainConfig, with_changes
from sae_ext.errors import Diverged, Stopped, UserError
from sae_ext.training.config import BufferConfig
from sae_ext.training.job import Job, Place
from sae_ext.training.run import run_to_end, train_many

pytestmark = pytest.mark.usefixtures("one_thread")
Config = tuple[SAEConfig, TrainConfig]
ALONE = Place(readers=0)
"""Nothing is read ahead, so that reads can be counted."""


class Counted(Dataset):
    """The planted rows; counts how often how many rows were asked for."""

    def __init__(self) -> None:
        self.key, self.d_in = planted().key, planted().d_in
        self.rows, self.column, self.where = planted().rows, planted().column, planted().where
        self.asked: Counter[int] = Counter()

    def gather(self, rows):
        self.asked[len(rows)] += 1
        return planted().gather(rows)

    @property
    def batches(self) -> int:
        """How many batches were read: nothing else is as long."""
        return self.asked[SHORT.batch_rows]


def shorter(config: Config, steps: int) -> Config:
    return config[0], with_changes(config[1], {"steps": steps})


COMPANY: dict[str, Config] = {
    "plain": (RELU, SHORT),
    "another seed": (RELU, with_changes(SHORT, {"seed": 1})),
    "another penalty": (RELU, with_changes(SHORT, {"objective.l1.weight": 3.0})),
    "weighted rows": (RELU, with_changes(SHORT, {"objective.mse.row_weight": "importance"})),
    "another beginning": (with_changes(RELU, {"b_dec": "geometric_median"}), SHORT),
    "other intervals": (RELU, with_changes(SHORT, {"log_every": 7, "checkpoint_every": 13})),
    "shorter": shorter((RELU, SHORT), 23),
    "wider": (SAEConfig(d_sae=48), SHORT),
    **{f"{a} {v}": variant(a, v) for a, v in (
        ("relu", "revival"), ("relu", "target_l0"), ("topk", "auxk"), ("topk", "early_stopping"),
        ("batchtopk", "plain"), ("jumprelu", "usage"),
    )},
}  # fmt: skip


def together(configs: list[Config], hooks: list[dict[str, Any]] | None = None, **more: Any) -> Any:
    """The generator of a training of several."""
    hooks = hooks or [{} for _ in configs]
    jobs = [Job(*config, **hook) for config, hook in zip(configs, hooks, strict=True)]
    return train_many(more.pop("data", planted()), jobs, **more)


def checkpoints(config: Config) -> list[bytes]:
    """All that a run saves: after 10 steps, after 20 ..., and after its last."""
    saved: list[bytes] = []
    fit(*config, save_checkpoint=saved.append)
    return saved


@pytest.fixture(scope="module")
def alone(one_thread):
    return {name: fit(*config) for name, config in COMPANY.items()}


def test_each_of_several_ends_bit_for_bit_as_alone_and_rows_are_read_once(alone):
    data = Counted()
    trained = run_to_end(together(list(COMPANY.values()), data=data, place=ALONE))
    for name, found in zip(COMPANY, trained, strict=True):
        assert same(found, alone[name]), name
    assert {t.steps for t in trained} >= {30, 23, 40}
    assert data.batches == 40


def test_several_draw_from_one_buffer():
    buffer = BufferConfig(rows=300, min_rows=100, fresh=0.7)
    configs = [
        (sae, with_changes(config, {"buffer": buffer}))
        for sae, config in list(COMPANY.values())[:3]
    ]
    for config, found in zip(configs, run_to_end(together(configs)), strict=True):
        assert same(found, fit(*config))


def test_progress_says_which_of_several_it_is_of(run_to_end):
    configs = [COMPANY["plain"], COMPANY["shorter"]]
    progress, trained = run_to_end(together(configs))
    for number, found in enumerate(trained):
        steps = [p.step for p in progress if p.number == number]
        assert steps == found.history["step"].to_pylist()
        assert {p.steps for p in progress if p.number == number} == {configs[number][1].steps}


def test_one_that_has_a_later_checkpoint_waits_for_the_others(alone, run_to_end):
    names = ["another seed", "plain", "another penalty"]
    data = Counted()
    later = checkpoints(COMPANY["plain"])[1]
    hooks = [{}, {"load_checkpoint": lambda: later}, {}]
    progress, trained = run_to_end(
        together([COMPANY[n] for n in names], hooks, data=data, place=ALONE)
    )
    for name, found in zip(names, trained, strict=True):
        assert same(found, alone[name])
    assert [p.step for p in progress if p.number == 1] == [25, 30, 35, 40]
    assert data.batches == 40


def test_one_that_has_ended_holds_up_nobody(alone):
    # After 30 steps, which were all, 30 of 40, and 23, which were all.
    places = {"topk early_stopping": -1, "plain": 2, "shorter": -1}
    names = list(places)
    kept = {name: checkpoints(COMPANY[name])[place] for name, place in places.items()}
    hooks = [{"load_checkpoint": lambda n=n: kept[n]} for n in names]
    data = Counted()
    trained = run_to_end(together([COMPANY[n] for n in names], hooks, data=data, place=ALONE))
    for name, found in zip(names, trained, strict=True):
        assert same(found, alone[name])
    assert data.batches == 10


def test_several_that_have_all_ended_are_given_back_without_a_read(alone):
    last = {name: checkpoints(COMPANY[name])[-1] for name in ("plain", "shorter")}
    data = Counted()
    hooks = [{"load_checkpoint": lambda n=n: last[n]} for n in last]
    trained = run_to_end(together([COMPANY[n] for n in last], hooks, data=data, place=ALONE))
    assert all(same(found, alone[n]) for n, found in zip(last, trained, strict=True))
    assert data.batches == 0


@pytest.mark.parametrize("order", [["plain", "another seed"], ["another seed", "plain"]])
def test_stopped_while_one_waits_all_go_on_bit_for_bit_together_and_alone(alone, order):
    kept: dict[str, bytes] = {"plain": checkpoints(COMPANY["plain"])[1]}
    saved: Counter[str] = Counter()

    def hooks(name: str) -> dict[str, Any]:
        def save(data: bytes) -> None:
            kept[name] = data
            saved[name] += 1

        return {"load_checkpoint": lambda: kept.get(name), "save_checkpoint": save}

    looks = iter(range(100))
    configs, company = [COMPANY[n] for n in order], [hooks(n) for n in order]
    with pytest.raises(Stopped, match="stopped after step 13"):
        run_to_end(together(configs, company, stop=lambda: next(looks) == 13))
    assert saved == {"another seed": 2}  # at steps 10 and 13
    assert same(fit(*COMPANY["plain"], load_checkpoint=lambda: kept["plain"]), alone["plain"])
    for name, found in zip(order, run_to_end(together(configs, company)), strict=True):
        assert same(found, alone[name])


def test_one_that_diverges_is_told_in_its_place_and_the_others_end_as_alone(alone):
    wild = RELU, with_changes(SHORT, {"lr": 1e25})
    found = run_to_end(together([COMPANY["plain"], wild, COMPANY["shorter"]]))
    assert same(found[0], alone["plain"])
    assert same(found[2], alone["shorter"])
    assert isinstance(found[1], Diverged)
    assert re.search(r"not finite at step \d+: lower train\.lr \(now 1e\+25\)", str(found[1]))


def test_stopped_before_it_is_seen_that_one_diverges_the_others_are_saved(alone):
    wild = RELU, with_changes(SHORT, {"lr": 1e25})
    saved: list[bytes] = []
    hooks = [{}, {"save_checkpoint": saved.append}]
    looks = iter(range(100))
    with pytest.raises(Stopped, match=r"stopped after step \d;"):
        # Results are looked at after ten steps.
        run_to_end(together([wild, COMPANY["plain"]], hooks, stop=lambda: next(looks) == 3))
    assert len(saved) == 1
    assert same(fit(*COMPANY["plain"], load_checkpoint=lambda: saved[0]), alone["plain"])


def test_where_all_diverge_no_more_is_read():
    data = Counted()
    wild = RELU, with_changes(SHORT, {"lr": 1e25})
    found = run_to_end(together([wild, wild], data=data, place=ALONE))
    assert all(isinstance(one, Diverged) for one in found)
    assert data.batches < 20


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch_rows": 16}, r"train\.batch_rows is 32 and 16"),
        ({"order_seed": 3}, r"train\.order_seed is 0 and 3"),
        ({"buffer": BufferConfig()}, r"train\.buffer is None and BufferConfig"),
    ],
)
def test_configurations_that_would_read_other_rows_are_refused(changes, named):
    other = RELU, with_changes(SHORT, changes)
    with pytest.raises(UserError, match=f"{named}.*must agree on it"):
        run_to_end(together([COMPANY["plain"], other]))


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        run_to_end(together([]))
