"""With servers a user already has: a Prefect API, a Ray cluster, deployments on a schedule."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import Command, digests, stop

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in family:
        if each.is_running():
            each.kill()
    process.wait(30)


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server of its own."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env={
            **os.environ,
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}/api"
    try:
        deadline = time.monotonic() + 120
        while not answers(url):
            assert time.monotonic() < deadline, "the Prefect server did not start"
            time.sleep(0.2)
        yield url
    finally:
        end(server)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Ray cluster of one node, started as its owner would."""
    port = free_port()
    folder = Path("/tmp") / f"ray-{port}"  # Ray's socket paths must be short
    binary = str(Path(sys.executable).with_name("ray"))
    node = subprocess.Popen(
        [binary, "start", "--head", "--block", "--port", str(port), "--num-cpus", "2",
         "--include-dashboard", "false", "--object-store-memory", "200000000",
         "--temp-dir", str(folder)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline, "Ray did not start"
            time.sleep(0.2)
        time.sleep(5)  # the port opens before the node has joined
        yield f"127.0.0.1:{port}"
    finally:
        end(node)


def flow_runs(api: str) -> list[dict[str, str]]:
    return httpx.post(f"{api}/flow_runs/filter", json={}, timeout=10).json()


def test_on_servers_of_the_user_the_same_run_gives_the_same_bytes_and_leaves_them_up(
    finished, sparsemill, tmp_path, prefect_api, ray_address
):
    store = tmp_path / "store"
    env = {"PREFECT_API_URL": prefect_api, "RAY_ADDRESS": ray_address, "RAY_AUTH_MODE": "disabled"}
    command = sparsemill("run", str(finished["recipe"]), "--store", str(store), env=env)
    assert command.wait() == 0, command.output
    assert digests(store).items() <= finished["digests"].items()
    assert command.left_running() == []
    (run,) = [r for r in flow_runs(prefect_api) if r["name"] == "tiny"]
    assert run["state_type"] == "COMPLETED"
    assert answers(prefect_api)
    host, port = ray_address.split(":")
    assert socket.socket().connect_ex((host, int(port))) == 0


def wait_for_run(command: Command, api: str, deployment: str, timeout: float) -> None:
    def done() -> bool:
        here = httpx.get(f"{api}/deployments/name/campaign/{deployment}", timeout=10).json()["id"]
        return any(
            r["deployment_id"] == here and r["state_type"] == "COMPLETED" for r in flow_runs(api)
        )

    command.until(done, timeout)


def test_served_deployments_run_on_schedule_and_on_demand(finished, sparsemill, prefect_api):
    command = sparsemill(
        "serve",
        str(finished["recipe"]),
        "--cron",
        "* * * * *",
        "--store",
        str(finished["store"]),
        env={"PREFECT_API_URL": prefect_api},
    )

    def registered() -> bool:
        names = httpx.post(f"{prefect_api}/deployments/filter", json={}, timeout=10).json()
        return {d["name"] for d in names} == {"tiny-scheduled", "tiny-on-demand"}

    command.until(registered)
    on_demand = httpx.get(f"{prefect_api}/deployments/name/campaign/tiny-on-demand").json()["id"]
    httpx.post(f"{prefect_api}/deployments/{on_demand}/create_flow_run", json={}).raise_for_status()
    wait_for_run(command, prefect_api, "tiny-on-demand", 90)
    wait_for_run(command, prefect_api, "tiny-scheduled", 150)
    stop(command, 2)
    assert command.left_running() == []


def test_a_schedule_that_is_none_is_refused(finished, sparsemill, prefect_api):
    command = sparsemill(
        "serve",
        str(finished["recipe"]),
        "--cron",
        "every day",
        env={"PREFECT_API_URL": prefect_api},
    )
    assert command.wait() == 2, command.output
    assert "--cron 'every day'" in command.output
