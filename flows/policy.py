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
    # Said outright, as an event loop elsewhere in the process would make the answer a coroutine.
    ask: Any = get_state_exception
    return isinstance(ask(state, _sync=True), TRANSIENT)


# Ray's own retries are off: one owner. Results live in the store, so Prefect caches nothing.
STAGE: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": [1, 10],
    "retry_condition_fn": worth_retrying,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}
