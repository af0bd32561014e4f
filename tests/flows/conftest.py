"""The real command on a tiny recipe, in a process of its own, and the clean-up after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from sae_ext import corpora
from sae_ext.config import CorpusConfig
from sae_ext.store import KINDS, Store

TINY: dict[str, Any] = {
    "name": "tiny",
    "host": {"layer": 1, "max_tokens": 64},
    "harvest": {"unit_kb": 2},
    "sae": {"d_sae": 128},
    "train": {"steps": 400, "batch_rows": 512, "checkpoint_every": 20, "log_every": 20},
    "analyse": {"pool": 512},
    "interpret": {"features": 40, "positives": 8, "negatives": 8},
}
DOCUMENTS = 160


def hear_interrupts() -> None:
    """A shell starts background jobs deaf to SIGINT, and so would be what the tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """`sparsemill ARGUMENTS` as a user runs it, with its output and its whole family of processes."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        settings = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RAY_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=hear_interrupts,
            env={**settings, "COLUMNS": "200", **(env or {})},
        )
        self.lines: list[str] = []
        self.family: dict[int, psutil.Process] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._reader.start()
        self._watcher.start()

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return "".join(self.lines)

    def wait(self, timeout: float = 240) -> int:
        """The exit code."""
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    def until(self, condition: Any, timeout: float = 120) -> None:
        """Wait until `condition()` holds; fail if the command ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.output}"
            assert time.monotonic() < deadline, f"still waiting:\n{self.output}"
            time.sleep(0.01)

    def left_running(self) -> list[str]:
        """Processes of the family that are still there."""
        return [
            " ".join(p.cmdline())[:100]
            for p in self.family.values()
            if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        ]

    def reap(self) -> None:
        """End whatever is left."""
        for process in [*self.family.values()]:
            if process.is_running():
                process.kill()
        self.process.kill()
        self.process.wait(30)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def _watch(self) -> None:
        while self.process.poll() is None:
            try:
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    self.family.setdefault(child.pid, child)
            except psutil.Error:
                pass
            time.sleep(0.1)


@pytest.fixture
def sparsemill() -> Iterator[Any]:
    """Start commands; all of their processes are ended with the test."""
    started: list[Command] = []

    def start(*arguments: str, env: dict[str, str] | None = None) -> Command:
        started.append(Command(*arguments, env=env))
        return started[-1]

    yield start
    for command in started:
        command.reap()


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of the real corpus as a user's file."""
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    documents = corpora.load(CorpusConfig())[::20][:DOCUMENTS]
    rows = [{"id": d.doc_id, "text": d.text, "label": d.label} for d in documents]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, corpus_file: Path) -> Any:
    """Write the tiny recipe with some changes; returns its path.

    One worker, as each imports torch anew; how many there are changes no byte.
    """

    def write(**changes: Any) -> Path:
        content = {**TINY, "corpus": {"source": str(corpus_file)}, "resources": {"workers": 1}}
        for name, value in changes.items():
            old = content.get(name)
            content[name] = (
                {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            )
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> dict[str, Any]:
    """One uninterrupted run: its store and the digests of what it made."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "corpus": {"source": str(corpus_file)}}))
    command = Command("run", str(path), "--store", str(folder / "store"))
    try:
        assert command.wait() == 0, command.output
        assert command.left_running() == []
    finally:
        command.reap()
    return {
        "recipe": path,
        "store": folder / "store",
        "digests": digests(folder / "store"),
        "output": command.output,
    }


def digests(url: Path) -> dict[str, str]:
    """Of every committed artefact, the hash over its files' hashes."""
    store = Store(str(url))
    return {
        f"{kind}/{key}": store.manifest(kind, key).digest
        for kind in KINDS
        for key in store.list(kind)
    }


def stop(command: Command, how: signal.Signals) -> float:
    """Send a signal and return the seconds until the command is gone."""
    started = time.monotonic()
    command.process.send_signal(how)
    command.wait(30)
    return time.monotonic() - started
