"""Which faults Prefect tries again."""

from __future__ import annotations

import pytest
from prefect.states import Failed
from ray.exceptions import RayActorError

from flows.policy import worth_retrying
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
