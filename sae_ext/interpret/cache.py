"""Replies of a language model on disk, so that nothing is asked (or paid for) twice.

One SQLite file in write-ahead mode, safe for threads and for processes of one machine. A reply is
stored as it came, before anyone tries to read it; a better parser needs no new calls.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_ext.errors import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY,
    request TEXT NOT NULL,
    body TEXT NOT NULL,
    seconds REAL NOT NULL
) WITHOUT ROWID
"""


def request_key(request: Mapping[str, Any]) -> str:
    """The sha256 of a request's canonical JSON; the caller leaves secrets out."""
    return hashlib.sha256(_canonical(request).encode()).hexdigest()


class ReplyCache:
    """Replies by the hash of everything that decides them.

    Args:
        path: the database file; made when absent.

    Raises:
        UserError: the file cannot be opened or is not such a cache.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=60, check_same_thread=False, isolation_level=None
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"reply cache {path} cannot be used ({error}): delete the file or choose another"
            ) from error

    def get(self, key: str) -> str | None:
        """The stored reply, or None."""
        with self._lock:
            row = self._db.execute("SELECT body FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, request: Mapping[str, Any], body: str, seconds: float) -> str:
        """Store a reply and return the one that counts: the first, if two raced."""
        key = request_key(request)
        with self._lock:
            self._db.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)",
                (key, _canonical(request), body, seconds),
            )
        return self.get(key) or body

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM replies").fetchone()[0])

    def close(self) -> None:
        """Close the file; what was put stays."""
        with self._lock:
            self._db.close()


def _canonical(request: Mapping[str, Any]) -> str:
    return json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
