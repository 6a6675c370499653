"""Where shards lie: a directory, or an address that fsspec opens (s3://, gs://, http://), read in ranges.

What comes over the network passes through a cache of blocks on local disk, bounded in bytes and shared by the processes of a
node: the order of samples keeps to a window of shards, so neighbours of a sample are soon wanted too.
"""

import fcntl
import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import fsspec
import pyarrow as pa
import xxhash

from data_pipelines.errors import DataError, MissingData
from data_pipelines.names import is_safe

T = TypeVar("T")
log = logging.getLogger("megasora.storage")

PAUSES = (0.1, 0.4, 1.6, 6.0, 15.0, 30.0, 30.0, 40.0)  # seconds between the tries of a read: storage has its moods
FINAL = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)  # answers, not moods


@dataclass(frozen=True)
class CacheConfig:
    """The local cache of remote shards; 0 bytes: none."""

    directory: Path
    bytes: int

    @classmethod
    def default(cls) -> "CacheConfig":
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(root) / "megasora" / "blocks", 20 << 30)


class Storage(Protocol):
    """The files of one directory, wherever it is. Reads are thread-safe; they go on for two minutes before they raise OSError."""

    address: str

    def names(self) -> list[str]:
        """Of all files that are not hidden, sorted. Raises DataError where there is no such directory."""
        ...

    def read(self, name: str) -> bytes:
        """A whole small file."""
        ...

    def view(self, name: str, offset: int, length: int) -> memoryview:
        """Those bytes, fewer where the file ends, without a copy where the file lies on this machine. Not to be written to."""
        ...

    def mapped(self, name: str) -> pa.NativeFile:
        """The whole file for Arrow: memory-mapped where it lies on a disk of this machine."""
        ...

    def open(self, name: str) -> BinaryIO:
        """For reading here and there."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Puts a file there, complete or not at all."""
        ...


def open_storage(address: str | Path, cache: CacheConfig | None = None) -> Storage:
    """`s3://bucket/shards` and the like by fsspec, anything else as a directory. Raises DataError."""
    address = str(address)
    if "://" not in address:
        return Directory(Path(address))
    try:
        return Remote(address.rstrip("/"), cache or CacheConfig.default())
    except ImportError as error:
        raise DataError(f"{address}: {error}") from None
    except ValueError as error:  # a protocol that fsspec does not know
        raise DataError(f"{address}: {error}") from None


class Directory:
    """Files on a file system of this machine."""

    OPEN_FILES = 64

    def __init__(self, path: Path) -> None:
        self.address, self.path = str(path), path
        self._files: OrderedDict[str, _Mapped] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        if not self.path.is_dir():
            raise MissingData(f"{self.path}: no such directory")
        return sorted(path.name for path in self.path.iterdir() if not path.name.startswith("."))

    def read(self, name: str) -> bytes:
        return _retried((self.path / name).read_bytes)

    def view(self, name: str, offset: int, length: int) -> memoryview:
        return _retried(lambda: self._file(name).view(offset, length))

    def mapped(self, name: str) -> pa.NativeFile:
        return pa.memory_map(str(self.path / name))

    def open(self, name: str) -> BinaryIO:
        return (self.path / name).open("rb")

    def write(self, name: str, content: bytes) -> None:
        hidden = self.path / f".{name}.tmp"
        with hidden.open("wb") as file:
            file.write(content)
            sync(file)
        hidden.replace(self.path / name)
        sync_directory(self.path)

    def _file(self, name: str) -> "_Mapped":
        with self._lock:
            file = self._files.pop(name, None) or _Mapped(self.path / name)
            self._files[name] = file
            if len(self._files) > self.OPEN_FILES:
                self._files.popitem(last=False)
        return file


class _Mapped:
    """A file as the page cache holds it. It stays as long as a view does, so a reader may outlive its place among the open ones.

    What is written to a view stays in this process.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else None

    def view(self, offset: int, length: int) -> memoryview:
        if self._mapping is None:
            return memoryview(b"")
        # A file may have been cut since: to touch what is not there any more would end the process.
        end = min(offset + length, self._mapping.size(), len(self._mapping))
        return memoryview(self._mapping)[offset:end]


def _retried(read: Callable[[], T], told: str = "") -> T:
    """`told`: what to say after the first failure, to somebody who may have mistaken the address."""
    for number, pause in enumerate(PAUSES):
        try:
            return read()
        except FINAL:
            raise
        except OSError as error:
            if told and number == 0:
                log.warning("%s: %s", told, error)
            time.sleep(pause)
    return read()


class Remote:
    """Files behind an address of fsspec. A file is known by its size and date or tag, so one that changes is read anew."""

    def __init__(self, address: str, cache: CacheConfig) -> None:
        self.address = address
        with _as_os_error(address):
            self._files, self._root = fsspec.core.url_to_fs(address)
        self._cache = BlockCache(cache.directory, cache.bytes) if cache.bytes else None
        self._facts: dict[str, tuple[int, str]] = {}  # name -> size and token

    def names(self) -> list[str]:
        def look() -> list[dict[str, Any]]:
            with _as_os_error(self.address):
                return list(self._files.ls(self._root, detail=True))

        try:
            found = _retried(look, f"{self.address} does not answer, tried again for {sum(PAUSES) / 60:.0f} minutes")
        except OSError as error:
            raise DataError(f"{self.address}: {error}") from None
        names = []
        for info in found:
            name = str(info["name"]).rstrip("/").rsplit("/", 1)[-1]
            if info.get("type") == "directory" or name.startswith(".") or not is_safe(name):
                continue
            names.append(name)
            if info.get("size") is not None:
                self._facts[name] = self._identify(name, info)
        return sorted(set(names))

    def read(self, name: str) -> bytes:
        return bytes(self.view(name, 0, self._fact(name)[0]))

    def view(self, name: str, offset: int, length: int) -> memoryview:
        size, token = self._fact(name)
        end = min(size, offset + length)
        fetch = partial(self._download, name)
        content = fetch(offset, end) if self._cache is None else self._cache.read(token, size, offset, end, fetch)
        return memoryview(bytearray(content))

    def mapped(self, name: str) -> pa.NativeFile:
        if self._cache is None:
            return pa.BufferReader(self.read(name))
        size, token = self._fact(name)
        # Not by `read`: one of its blocks may be locked together with the whole, which would wait for itself.
        return pa.memory_map(str(self._cache.whole(token, size, lambda: self._download(name, 0, size))))

    def open(self, name: str) -> BinaryIO:
        with _as_os_error(f"{self.address}/{name}"):
            file: BinaryIO = self._files.open(f"{self._root}/{name}", "rb", block_size=1 << 16)
        return file

    def write(self, name: str, content: bytes) -> None:
        with _as_os_error(f"{self.address}/{name}"):
            self._files.pipe_file(f"{self._root}/{name}", content)
            self._files.invalidate_cache(self._root)
        self._facts.pop(name, None)

    def _download(self, name: str, first: int, last: int) -> bytes:
        """Bytes [first, last), past the cache."""
        if first >= last:
            return b""  # servers refuse such a range

        def once() -> bytes:
            with _as_os_error(f"{self.address}/{name}"):
                return bytes(self._files.cat_file(f"{self._root}/{name}", start=first, end=last))

        return _retried(once)

    def _fact(self, name: str) -> tuple[int, str]:
        if name not in self._facts:
            info = _retried(partial(self._info, name))
            if info.get("size") is None:
                raise OSError(f"{self.address}/{name}: the server does not say how long it is")
            self._facts[name] = self._identify(name, info)
        return self._facts[name]

    def _info(self, name: str) -> dict[str, Any]:
        with _as_os_error(f"{self.address}/{name}"):
            return dict(self._files.info(f"{self._root}/{name}"))

    def _identify(self, name: str, info: dict[str, Any]) -> tuple[int, str]:
        marks = [str(info[mark]) for mark in ("ETag", "etag", "md5Hash", "mtime", "LastModified") if info.get(mark)]
        text = "\0".join([self.address, name, str(info["size"]), *marks])
        return int(info["size"]), xxhash.xxh3_128_hexdigest(text.encode())


@contextmanager
def _as_os_error(what: str) -> Iterator[None]:
    """Clients of object stores raise errors of their own; here all that goes wrong with a read is an OSError."""
    try:
        yield
    except (OSError, ImportError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{what}: {type(error).__name__}: {error}") from error


class BlockCache:
    """Blocks of remote files in a directory that all processes of a node may share; those not used for longest go first.

    A block appears by renaming and is fetched once, however many want it. Where the disk is full, nothing is cached.
    """

    BLOCK = 8 << 20  # bytes
    ABANDONED = 3600.0  # seconds after which nobody writes a hidden file any more: its process died

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        directory.mkdir(parents=True, exist_ok=True)
        self._since_sweep = limit  # bytes written; the first block looks what is there

    def read(self, token: str, size: int, offset: int, end: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Bytes [offset, end) of the file `token` of `size` bytes; fetch(first, last) gets what is not here."""
        parts = []
        for block in range(offset // self.BLOCK, -(-end // self.BLOCK)):
            first = block * self.BLOCK
            last = min(first + self.BLOCK, size)
            path = self.directory / f"{token}-{block:06d}"
            low, high = max(offset - first, 0), min(end, last) - first
            part = self._piece(path, last - first, low, high)
            if part is None:
                with self._fetching(path):
                    part = self._piece(path, last - first, low, high)  # somebody else may have been faster
                    if part is None:
                        content = fetch(first, last)
                        self._keep(path, content)
                        part = content[low:high]
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def whole(self, token: str, size: int, fetch: Callable[[], bytes]) -> Path:
        """A small file of `size` bytes in one piece, as a path to map. It is not swept away."""
        path = self.directory / f"{token}-whole"
        if not _is_whole(path, size):
            with self._fetching(path):
                if not _is_whole(path, size):
                    _write(path, fetch())
        return path

    def _piece(self, path: Path, size: int, low: int, high: int) -> bytes | None:
        """Bytes [low, high) of a block of `size` bytes. A block of another length is none: a crash of the machine cuts some."""
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return None
                file.seek(low)
                piece = file.read(high - low)
            os.utime(path)
        except FileNotFoundError:
            return None
        return piece

    def _keep(self, path: Path, content: bytes) -> None:
        with suppress(OSError):
            _write(path, content)
        self._since_sweep += len(content)
        if self._since_sweep > self.limit // 64:
            self._since_sweep = 0
            self._sweep()

    def _sweep(self) -> None:
        blocks = []
        for entry in os.scandir(self.directory):
            if entry.name.startswith(".lock-") or entry.name.endswith("-whole"):
                continue
            with suppress(FileNotFoundError):  # another process sweeps too
                found = entry.stat()
                if not entry.name.startswith("."):
                    blocks.append((found.st_mtime_ns, found.st_size, entry.path))
                elif time.time() - found.st_mtime > self.ABANDONED:
                    Path(entry.path).unlink()
        total = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if total <= self.limit:
                return
            Path(path).unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _fetching(self, path: Path) -> Iterator[None]:
        """One process and thread at a time for each of 64 groups of blocks."""
        group = xxhash.xxh3_64_intdigest(path.name.encode()) % 64
        with (self.directory / f".lock-{group:02d}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _write(path: Path, content: bytes) -> None:
    hidden = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        hidden.write_bytes(content)
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
