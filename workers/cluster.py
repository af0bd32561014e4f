"""Starting Ray on this machine, or joining a cluster by its address, and leaving nothing behind.

Embedded: `ray.init("local")` with a small object store and no dashboard; never the address of some
other cluster that happens to run here. Cluster: `host:port`, checked by a plain connection first, as
Ray itself takes half a minute to say that nobody answers.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

from sae_ext.errors import UserError

_CONNECT_SECONDS = 5.0
_SLICE_SECONDS = 0.2
_STOP_SECONDS = 30.0
_ROUNDING = 1e-9  # ten tenths of a GPU are one
_OBJECT_STORE_BYTES = 256 * 2**20  # arrays cross in pieces of tens of megabytes at most


class Cluster:
    """Ray for the length of one run. `begin` returns at once; `wait` makes sure it is up.

    Without an address, RAY_ADDRESS counts; without that, Ray starts on this machine.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._released = threading.Event()
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Start Ray in the background; a second call does nothing."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._live, name="ray", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Start Ray if nobody has, and return when it is ready.

        Raises:
            UserError: the address does not answer, or Ray cannot start.
        """
        self.begin()
        while not self._ready.wait(timeout=_SLICE_SECONDS):
            pass  # in slices, so that Ctrl-C is heard
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Disconnect, and stop what we started; does nothing when nothing was."""
        self._released.set()
        if self._thread is not None:
            self._thread.join(timeout=_STOP_SECONDS)

    def _live(self) -> None:
        """The thread that starts Ray also stops it: Ray's processes end with the thread that made them."""
        try:
            (self._join if self.address else self._embed)()
        except UserError as error:
            self._error = error
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self._error = UserError(f"Ray cannot start ({first}): see `sparsemill doctor`")
        finally:
            self._ready.set()
        self._released.wait()
        if self._error is None:
            _import_ray().shutdown()

    def _embed(self) -> None:
        # Idle OpenMP threads that spin would take the cores from the other workers.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ["RAY_AUTH_MODE"] = (
            "disabled"  # Ray 2.60 turns it on by itself; all is loopback here
        )
        ray = _import_ray()
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            logging_level="ERROR",
        )

    def _join(self) -> None:
        assert self.address is not None
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        host, _, port = self.address.removeprefix("ray://").rpartition(":")
        if self.address != "auto":
            try:
                socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
            except (OSError, ValueError) as error:
                raise UserError(
                    f"the Ray address {self.address!r} does not answer ({error}): correct resources.ray_address "
                    "or RAY_ADDRESS, or leave both out to use this machine"
                ) from error
        ray = _import_ray()
        ray.init(address=self.address, logging_level="ERROR")


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def require_room(cpus: float, gpus: float = 0, together: int = 1) -> None:
    """Check that so many actors of that size could ever run at once.

    Raises:
        UserError: they could not, so that asking would wait for ever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fields = "lower resources.cpus_per_worker or resources.train_cpus"
    for name, needed, field in (("CPU", cpus, fields), ("GPU", gpus, "lower resources.train_gpus")):
        most = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if needed > most:
            raise UserError(
                f"a worker needs {needed:g} {name}s, but the largest Ray node has {most:g}: {field}"
            )
    wanted = {name: needed for name, needed in (("CPU", cpus), ("GPU", gpus)) if needed}
    fit = sum(
        min(int(node.get(name, 0.0) / needed + _ROUNDING) for name, needed in wanted.items())
        for node in nodes
    )
    if fit < together:
        size = " and ".join(f"{needed:g} {name}s" for name, needed in wanted.items())
        raise UserError(
            f"{together} workers of {size} must run at once, but Ray has room for {fit}: lower "
            "resources.train_workers, or what each of them takes"
        )
