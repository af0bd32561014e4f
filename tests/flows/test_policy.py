"""Which faults Prefect tries again."""

from __future__ import annotations

import pytest
from prefect.states import Failed
from ray.exceptions import RayActorError

from flows import tuning
from flows.policy import STAGE, worth_retrying
from sae_ext.errors import CorruptArtefact, Stopped, UserError
from workers.pool import WorkerDied


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (WorkerDied("killed"), True),
        (RayActorError(), True),
        (ConnectionError("node lost"), True),
        (UserError("bad row"), False),
        (CorruptArtefact("bad file"), False),
        (Stopped(), False),
        (ValueError("a bug"), False),
    ],
)
def test_only_passing_faults_are_tried_again(error, again):
    assert worth_retrying(None, None, Failed(data=error)) is again


def test_trials_are_tried_again_and_not_the_search_around_them():
    # It has told all of them to stop by then, so that the fault would be told as a stop.
    assert tuning.trial.retries == STAGE["retries"] > 0
    assert tuning.tune.retries == 0
