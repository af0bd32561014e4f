"""The artefact store: where every stage leaves its result, and how a rerun knows what is done.

    <root>/<kind>/<key>/manifest.json     written last, in one atomic step: present means complete
                       /<files>           each written under a temporary name and renamed

A key is the hash of everything that decides the content (the stage's config and the keys of its
inputs), so equal work has an equal address: running twice costs nothing, two campaigns share what
they have in common, and a killed run finds its finished pieces. The root is any fsspec URL; an
object store's PUT is the atomic step there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from sae_ext.errors import CorruptArtefact, UserError

Content = bytes | Sequence[memoryview]
"""What a file is to hold: all of it, or its parts."""
MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_CHUNK = 1 << 22
_AT_ONCE, _AHEAD = 32, 1024  # files read from elsewhere at once, and held at most
_FETCHED = "fetched"
KINDS = ("activations", "saes", "trials", "features", "interpretations", "campaigns")

# Part of every key: raised when a stage's code changes what the same config produces, so that
# old artefacts are not taken for new ones.
STAGE_VERSIONS = {
    **dict.fromkeys(KINDS, 1),
    "saes": 3,
    "trials": 3,
    "campaigns": 2,
    "activations": 2,
}


@dataclass(frozen=True)
class Manifest:
    """What an artefact is, what it was made from and what its files hash to."""

    kind: str
    key: str
    config: dict[str, Any]
    """Resolved configuration of the stage: everything, beside the inputs, that decides the content."""
    inputs: dict[str, str]
    """Keys of the artefacts (or hashes of the outside data) it was made from, by role."""
    files: dict[str, dict[str, Any]]
    """File name to `{"sha256": hex, "bytes": int}`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Facts about the content a reader wants without opening it (row counts, dtypes, summaries)."""
    created: str = ""
    code_version: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent, by phase."""
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """Hash over all file hashes: equal digests mean equal bytes. Times and machine do not count."""
        return _sha256(_canonical({name: f["sha256"] for name, f in self.files.items()}))


class StoredFile(NamedTuple):
    """A file that is there."""

    bytes: int
    changed: float
    """Seconds since 1970."""


def stage_key(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The address of a stage's result: 16 hex digits of a hash over (kind, version, config, inputs)."""
    content = {
        "kind": kind,
        "version": STAGE_VERSIONS[kind],
        "config": dict(config),
        "inputs": dict(inputs),
    }
    return _sha256(_canonical(content))[:16]


class Store:
    """Artefacts under one root URL. Cheap to open; safe to use from many processes at once."""

    def __init__(self, url: str) -> None:
        self.url = str(url)
        # Listings are never cached: other processes add files while this one looks.
        self.fs, self.root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if self.is_local:
            self.url = self.root  # absolute: a worker elsewhere stands in another folder

    @classmethod
    def open(cls, url: str, *, writable: bool = False) -> Store:
        """Open the store at `url` (a folder or any fsspec URL).

        Raises:
            UserError: the URL's protocol is unknown, or `writable` is asked for and a first file
                cannot be written there.
        """
        try:
            store = cls(url)
        except (ValueError, ImportError) as error:
            raise UserError(f"store {url!r} cannot be opened: {error}") from error
        if writable:
            try:
                store.fs.makedirs(store.root, exist_ok=True)
                probe = f"{store.root}/{_temporary_name('probe')}"
                store.fs.pipe_file(probe, b"")
                store.fs.rm_file(probe)
            except Exception as error:
                raise UserError(
                    f"store {url!r} cannot be written to ({_first_line(error)}): "
                    "choose another folder with --store or `store:` in the recipe"
                ) from error
        return store

    # -- looking -------------------------------------------------------------------------------

    def path(self, kind: str, key: str, name: str = "") -> str:
        """Where a file of an artefact lies, as a path of the store's file system."""
        return f"{self.root}/{kind}/{key}/{name}".rstrip("/")

    def complete(self, kind: str, key: str) -> bool:
        """Whether the artefact is committed and every file it lists is there.

        Raises:
            CorruptArtefact: a listed file has another size than when it was committed.
        """
        if not self.fs.exists(self.path(kind, key, MANIFEST)):
            return False
        # One listing: there may be a hundred thousand of them.
        root = self.path(kind, key)
        there = {
            str(path).split(f"/{kind}/{key}/", 1)[1]: facts["size"]
            for path, facts in self.fs.find(root, detail=True).items()
        }
        for name, facts in self.manifest(kind, key).files.items():
            if name not in there:
                return False
            if there[name] != facts["bytes"]:
                path = self.path(kind, key, name)
                raise _corrupt(path, f"has {there[name]} bytes instead of {facts['bytes']}")
        return True

    def has_file(self, kind: str, key: str, name: str) -> bool:
        """Whether a file was put, committed or not."""
        return bool(self.fs.exists(self.path(kind, key, name)))

    def names(self, kind: str, key: str, folder: str) -> list[str]:
        """Names of the files put into a folder of an artefact, committed or not, in ascending order.

        Args:
            folder: "" for the artefact's own.
        """
        root = self.path(kind, key, folder)
        found = self.fs.find(root) if self.fs.exists(root) else []
        names = (str(path).split(f"/{kind}/{key}/", 1)[1] for path in found)
        return sorted(n for n in names if "/.tmp-" not in n)

    def list(self, kind: str) -> list[str]:
        """Keys of the committed artefacts of a kind, newest first."""
        if not self.fs.exists(f"{self.root}/{kind}"):
            return []
        found = [str(p) for p in self.fs.glob(f"{self.root}/{kind}/*/{MANIFEST}")]
        keys = [p.rsplit("/", 2)[1] for p in found]
        return sorted(keys, key=lambda key: self.manifest(kind, key).created, reverse=True)

    def manifest(self, kind: str, key: str) -> Manifest:
        """The manifest of a committed artefact.

        Raises:
            UserError: there is no such artefact.
            CorruptArtefact: the manifest cannot be read.
        """
        path = self.path(kind, key, MANIFEST)
        try:
            return Manifest(**json.loads(self.fs.cat_file(path)))
        except FileNotFoundError:
            raise UserError(f"{kind}/{key} is not in the store {self.url}") from None
        except (ValueError, TypeError) as error:
            raise _corrupt(path, f"is not a manifest ({_first_line(error)})") from error

    def find(self, prefix: str, kinds: tuple[str, ...] = KINDS) -> tuple[str, str]:
        """The one artefact whose key starts with `prefix`, as (kind, key).

        Raises:
            UserError: none or several match.
        """
        hits = [(k, key) for k in kinds for key in self.list(k) if key.startswith(prefix)]
        if len(hits) == 1:
            return hits[0]
        what = "nothing" if not hits else " and ".join(f"{k}/{key}" for k, key in hits[:4])
        raise UserError(f"{prefix!r} matches {what} in {self.url}: see `sparsemill store ls`")

    # -- reading -------------------------------------------------------------------------------

    def read(self, kind: str, key: str, name: str) -> bytes:
        """The bytes of one file."""
        try:
            return bytes(self.fs.cat_file(self.path(kind, key, name)))
        except FileNotFoundError:
            raise UserError(f"{kind}/{key} has no file {name} in {self.url}") from None

    def read_all(self, kind: str, key: str, names: Sequence[str]) -> Iterator[bytes]:
        """The bytes of many files, in order; from elsewhere several at once, as each is a round trip."""
        if self.is_local:
            yield from (self.read(kind, key, name) for name in names)
            return
        with ThreadPoolExecutor(_AT_ONCE, "read-store") as pool:
            for start in range(0, len(names), _AHEAD):
                part = names[start : start + _AHEAD]
                yield from pool.map(lambda name: self.read(kind, key, name), part)

    def read_table(
        self, kind: str, key: str, name: str, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """One Parquet file as a table, or some of its columns."""
        (found,) = self.read_tables(kind, key, [name], columns)
        return found

    def read_tables(
        self, kind: str, key: str, names: Sequence[str], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """Many Parquet files as tables, or some of their columns, in order."""
        wanted = None if columns is None else [*columns]
        for name, data in zip(names, self.read_all(kind, key, names), strict=True):
            try:
                yield pq.read_table(io.BytesIO(data), columns=wanted)
            except pa.ArrowInvalid as error:
                path = self.path(kind, key, name)
                raise _corrupt(path, f"is not a readable table ({_first_line(error)})") from error

    def local(self, kind: str, key: str, name: str, *, verify: bool = False) -> Path:
        """A path on this machine's disk to a file of the store, fetched and checked when remote.

        Args:
            verify: compare with the checksum in the manifest also when the file is local already;
                a cached copy that fails is fetched again.

        Raises:
            CorruptArtefact: the file is missing, or the checksum differs.
        """
        if self.is_local:
            path = Path(self.path(kind, key, name))
            if verify:
                self._check(kind, key, name, path)
            return path
        cached = _cache_dir() / _FETCHED / _sha256(self.url.encode())[:12] / kind / key / name
        if verify and cached.exists():
            try:
                self._check(kind, key, name, cached)
            except CorruptArtefact:
                cached.unlink(missing_ok=True)  # only the copy is known to be bad
        try:
            os.utime(cached)  # those used longest ago make room for others
        except FileNotFoundError:
            self._fetch(kind, key, name, cached)
            _make_room(cached)
        return cached

    def wrong(self, kind: str, key: str, name: str) -> str | None:
        """What is wrong with a committed file, which is read and hashed where it lies; None where nothing is."""
        facts = self.manifest(kind, key).files[name]
        digest, size = hashlib.sha256(), 0
        try:
            with self.fs.open(self.path(kind, key, name), "rb") as stream:
                while part := stream.read(_CHUNK):
                    digest.update(part)
                    size += len(part)
        except FileNotFoundError:
            return "is missing"
        if size != facts["bytes"]:
            return f"has {size} bytes instead of {facts['bytes']}"
        return None if digest.hexdigest() == facts["sha256"] else "does not match its checksum"

    def folders(self, kind: str) -> dict[str, dict[str, StoredFile]]:
        """Every artefact of a kind, committed or not, with the files that are there."""
        root = f"{self.root}/{kind}"
        found: dict[str, dict[str, StoredFile]] = {}
        for path, facts in (
            self.fs.find(root, detail=True) if self.fs.exists(root) else {}
        ).items():
            key, _, name = str(path).split(f"/{kind}/", 1)[1].partition("/")
            changed = facts.get("mtime") or facts.get("LastModified") or facts.get("created") or 0.0
            seconds = changed.timestamp() if hasattr(changed, "timestamp") else float(changed)
            found.setdefault(key, {})[name] = StoredFile(int(facts["size"]), seconds)
        return found

    def _fetch(self, kind: str, key: str, name: str, cached: Path) -> None:
        """Copy a remote file into the cache, whole and checked or not at all."""
        cached.parent.mkdir(parents=True, exist_ok=True)
        fresh = cached.with_name(_temporary_name(cached.name))
        try:
            self.fs.get_file(self.path(kind, key, name), str(fresh))
            self._check(kind, key, name, fresh)
            fresh.replace(cached)
        except FileNotFoundError:
            raise _corrupt(self.path(kind, key, name), "is missing") from None
        finally:
            fresh.unlink(missing_ok=True)

    def _check(self, kind: str, key: str, name: str, path: Path) -> None:
        expected = self.manifest(kind, key).files[name]["sha256"]
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:
            raise _corrupt(self.path(kind, key, name), "is missing") from None
        if found != expected:
            raise _corrupt(self.path(kind, key, name), "does not match its checksum")

    # -- writing -------------------------------------------------------------------------------

    def put(self, kind: str, key: str, name: str, data: Content) -> dict[str, Any]:
        """Write one file so that it is either absent or whole; return its facts for the manifest.

        Args:
            data: parts are written one after the other, without being put together.

        Raises:
            UserError: the store cannot be written to (full, read-only, gone).
        """
        path = self.path(kind, key, name)
        try:
            if self.is_local:
                write_atomically(Path(path), data)
            elif isinstance(data, bytes):
                self.fs.pipe_file(path, data)
            else:
                with tempfile.TemporaryDirectory(prefix="sparsemill-") as folder:
                    local = Path(folder, "file")
                    write_atomically(local, data)
                    self.fs.put_file(
                        str(local), path
                    )  # in pieces, and there as a whole or not at all
        except Exception as error:
            raise UserError(
                f"{path} cannot be written ({_first_line(error)}): see that the store is there and has room, and "
                "run the same command, which goes on"
            ) from error
        return self.facts_of(data)

    @staticmethod
    def facts_of(data: Content) -> dict[str, Any]:
        """Size and checksum of a file's content."""
        digest, size = hashlib.sha256(), 0
        for part in [data] if isinstance(data, bytes) else data:
            digest.update(part)
            size += len(part)
        return {"sha256": digest.hexdigest(), "bytes": size}

    def put_table(
        self, kind: str, key: str, name: str, table: pa.Table, **options: Any
    ) -> dict[str, Any]:
        """Write a table as Parquet (zstd); `options` go to `pyarrow.parquet.write_table`."""
        return self.put(kind, key, name, table_bytes(table, **options))

    def facts(self, kind: str, key: str, name: str) -> dict[str, Any]:
        """Size and checksum of a file put earlier."""
        return self.facts_of(self.read(kind, key, name))

    def commit(
        self,
        kind: str,
        key: str,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        files: Mapping[str, dict[str, Any]],
        extra: Mapping[str, Any] | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> Manifest:
        """Declare an artefact complete by writing its manifest; call it last."""
        manifest = Manifest(
            kind=kind,
            key=key,
            config=dict(config),
            inputs=dict(inputs),
            files={name: dict(files[name]) for name in sorted(files)},
            extra=dict(extra or {}),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            code_version=code_version(),
            machine={
                "host": socket.gethostname(),
                "cpus": os.cpu_count(),
                "platform": platform.platform(),
                "python": platform.python_version(),
            },
            timings={k: round(v, 3) for k, v in (timings or {}).items()},
        )
        self.put(kind, key, MANIFEST, json.dumps(vars(manifest), indent=1).encode())
        return manifest

    def remove(self, kind: str, key: str, name: str) -> None:
        """Remove one file that no manifest lists; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(kind, key, name))

    def prune(self, kind: str, key: str) -> None:
        """Remove folders of an artefact that hold nothing; an object store has none."""
        if not self.is_local:
            return
        for folder, _, _ in os.walk(self.path(kind, key), topdown=False):
            with contextlib.suppress(OSError):  # it holds something
                Path(folder).rmdir()

    def sweep(self, kind: str, key: str) -> None:
        """Remove temporary files that dead processes of this machine left in an artefact's folder."""
        folder = Path(self.path(kind, key))
        if not self.is_local or not folder.is_dir():
            return
        for path in folder.rglob(f".tmp-{socket.gethostname()}-*"):
            pid = int(path.name.split("-")[-3])
            if not Path(f"/proc/{pid}").exists():
                path.unlink(missing_ok=True)

    def state_dir(self) -> Path:
        """A local folder for what belongs to this store but cannot live in it (databases)."""
        if self.is_local:
            folder = Path(self.root) / ".state"
        else:
            folder = _cache_dir() / "state" / _sha256(self.url.encode())[:12]
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def table_bytes(table: pa.Table, **options: Any) -> bytes:
    """A table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return bytes(sink.getvalue())


def code_version() -> str:
    """The installed version of this library, or "unknown" when it runs from a bare checkout."""
    try:
        return metadata.version("sparsemill")
    except metadata.PackageNotFoundError:
        return "unknown"


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _temporary_name(name: str) -> str:
    return (
        f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{name.replace('-', '_')}"
    )


def write_atomically(path: Path, data: Content) -> None:
    """Write a file of this machine so that it is either absent, as it was, or whole; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary_name(path.name))
    try:
        with temporary.open("wb") as stream:
            for part in [data] if isinstance(data, bytes) else data:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def _cache_dir() -> Path:
    default = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        folder = Path(os.environ.get("SPARSEMILL_CACHE") or Path(default) / "sparsemill")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "sparsemill-cache"
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cache_bytes() -> float:
    """How much may be kept of other machines' files: SPARSEMILL_CACHE_GB, or 100 GB."""
    given = os.environ.get("SPARSEMILL_CACHE_GB", "100")
    try:
        size = float(given)
    except ValueError:
        size = -1.0
    if not size >= 0:
        raise UserError(f"SPARSEMILL_CACHE_GB must be a number of gigabytes, got {given!r}")
    return size * 1e9


def _make_room(newest: Path) -> None:
    """Remove files used longest ago until the cache keeps to its size; those that are mapped stay readable."""
    limit = _cache_bytes()
    files = []
    for path in (_cache_dir() / _FETCHED).rglob("*"):
        with contextlib.suppress(OSError):  # another process makes room too
            facts = path.stat()
            if path.is_file() and path != newest and not path.name.startswith(".tmp-"):
                files.append((facts.st_mtime, facts.st_size, path))
    size = newest.stat().st_size + sum(f[1] for f in files)
    for _, bytes_, path in sorted(files):
        if size <= limit:
            return
        path.unlink(missing_ok=True)
        size -= bytes_


def _corrupt(path: str, what: str) -> CorruptArtefact:
    return CorruptArtefact(
        f"{path} {what}: delete that file and run the same command, which makes it again"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
