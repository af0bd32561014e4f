"""What every stage's Prefect task has in common: who retries, what is worth retrying, no caching."""

from __future__ import annotations

from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import get_state_exception
from prefect.tasks import Task

from workers.pool import TRANSIENT


def worth_retrying(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """A dead worker or a lost connection may go better next time; a mistake or a stop will not."""
    return isinstance(get_state_exception(state), TRANSIENT)


# Ray's own retries are off: one owner. Results live in the store, so Prefect caches nothing.
STAGE: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [1, 10],
    "retry_condition_fn": worth_retrying,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}
