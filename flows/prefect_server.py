"""The Prefect API of a run: the user's own server when one is configured, else a child of ours.

Our child is an ordinary `prefect server start` on a free loopback port, with its database under the
store, so a run's history is kept and the UI is there while it lasts. It starts in the background
while the rest is imported, and dies with this process whatever happens to it.

Nothing here imports prefect: the environment must be settled before prefect is imported.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx

from sae_ext.errors import UserError

_START_SECONDS = 120.0
_CONNECT_SECONDS = 5.0
_STOP_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1

# Telemetry fails noisily without a network, and the console is ours: prefect's own lines go to its
# API, where the UI shows them, and only the worst reach the terminal.
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


class PrefectServer:
    """The API for one run. `begin` returns at once; `wait` makes sure that it answers."""

    def __init__(self, state_dir: Path) -> None:
        self.home = state_dir / "prefect"
        self.url = configured_url()
        self.embedded = self.url is None
        self._child: subprocess.Popen[bytes] | None = None
        self._began = 0.0

    def begin(self) -> None:
        """Settle the environment and, when no server is configured, start ours."""
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        self._began = time.perf_counter()
        if not self.embedded:
            return
        self.home.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/api"
        os.environ["PREFECT_API_URL"] = self.url
        os.environ["PREFECT_HOME"] = str(self.home)
        environment = os.environ | {
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_UI_API_URL": "/api",
        }
        del environment["PREFECT_API_URL"]
        with (self.home / "server.log").open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for us; the server must still record it
                preexec_fn=_die_with_parent,
            )  # fmt: skip

    def wait(self) -> None:
        """Return when the API answers.

        Raises:
            UserError: the configured server does not answer, or ours does not start.
        """
        assert self.url is not None
        limit = _START_SECONDS if self.embedded else _CONNECT_SECONDS
        while not answers(self.url):
            if self._child is not None and self._child.poll() is not None:
                raise UserError(f"the Prefect server did not start: see {self.home / 'server.log'}")
            if time.perf_counter() - self._began > limit:
                raise UserError(
                    f"the Prefect API {self.url} does not answer: start the server, correct "
                    "PREFECT_API_URL, or unset it to run with a server of our own"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """Stop our child; does nothing for a server that is not ours."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None


def configured_url() -> str | None:
    """PREFECT_API_URL from the environment or from the user's active Prefect profile."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    try:
        content = tomllib.loads(profiles.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return None
    name = os.environ.get("PREFECT_PROFILE") or content.get("active")
    url = content.get("profiles", {}).get(name, {}).get("PREFECT_API_URL")
    return str(url) if url else None


def answers(url: str) -> bool:
    """Whether a Prefect API answers there."""
    try:
        return httpx.get(f"{url}/health", timeout=2.0).status_code == httpx.codes.OK
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """In the child: be told to end when the parent does, and hear SIGINT even if the parent ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
