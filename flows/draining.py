"""Letting our own Prefect server take in what the flow reported, before it is stopped."""

from __future__ import annotations

import logging
import time

import httpx
from prefect.logging.handlers import APILogHandler

_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def drain(api_url: str, patience: float) -> None:
    """Send the queued log lines, then wait a little until no run is open on the server."""
    for handler in logging.getLogger("prefect.flow_runs").handlers:
        if isinstance(handler, APILogHandler):
            handler.flush()
    deadline = time.perf_counter() + patience
    with httpx.Client(base_url=api_url, timeout=2.0) as client:
        while time.perf_counter() < deadline:
            try:
                if not _open_runs(client):
                    return
            except (httpx.HTTPError, ValueError):
                return  # the server is gone; there is nothing to wait for
            time.sleep(0.2)


def _open_runs(client: httpx.Client) -> int:
    """Task runs of the flow run begun last that the server does not know to have ended."""
    # A deployment may have runs scheduled for later.
    begun = {"flow_runs": {"state": {"type": {"not_any_": ["SCHEDULED"]}}}}
    wanted = {**begun, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
    flows = client.post("/flow_runs/filter", json=wanted)
    newest = flows.raise_for_status().json()
    if not newest:
        return 0
    wanted = {"flow_runs": {"id": {"any_": [newest[0]["id"]]}}}
    tasks = client.post("/task_runs/filter", json=wanted).raise_for_status().json()
    return sum(run["state_type"] not in _FINAL for run in tasks)
