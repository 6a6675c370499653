"""Webdataset tars with an index beside each: `shard-000000.tar` and `shard-000000.arrow`.

A sample is a run of members KEY.mp4|KEY.jpg, KEY.txt, KEY.json (raw) or KEY.safetensors, KEY.json (latents), and the
tars open in plain webdataset. The index (index.py) tells where each sample begins and how long it is, so any sample is
one pread. KEY.json carries what the index shows, and a checksum of the other members.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.index import (
    DIGEST,
    KEY,
    LATENTS,
    Row,
    TornTar,
    index_bytes,
    index_name,
    list_tars,
    members,
    plain_members,
    read_index,
    read_metadata,
    row_of,
    scan_tar,
)
from data_pipelines.shards.storage import CacheConfig, Directory, Storage, open_storage, sync, sync_directory

CHECKSUM = "members_xxh3"  # in KEY.json
MAPPED = 8192  # indexes of one directory: Linux lets a process map 65,530 files, and a mixture has several directories


class ShardFile:
    """One shard and its index, complete or absent. A context manager: an exception inside leaves nothing.

    The tar is written under a hidden name; its index appears first and the tar last. So no tar of ours stands without
    its index; an index without tar is what a crash between the two leaves, and `ShardSet` refuses it.
    The same samples give the same bytes (fixed owner, mode and time; USTAR, uncompressed).
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise DataError(f"{path}: is there already; write into an empty directory")
        self.path, self.samples = path, 0
        self._hidden = path.with_name(f".{path.name}.tmp")
        self._file = self._hidden.open("wb")
        from webdataset import TarWriter  # seconds to import, since it brings torch: readers do without

        self._tar = TarWriter(self._file, user="", group="", mode=0o444, mtime=0, compress=False)

    @property
    def bytes(self) -> int:
        return self._tar.tarstream.offset

    def write(self, sample: dict[str, Any]) -> None:
        """sample: {"__key__": str, suffix: bytes or str, ..., "json": dict}.

        The dict has kind, frames, fps, height and width, and caption_tokens where known (see `Row`). Raises ValueError
        without them, and for a key of anything but letters, digits and `_-@/` (webdataset cuts it at a dot).
        """
        key = sample["__key__"]
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r}: a key is made of letters, digits and _-@/")
        payload = {
            name: value.encode() if isinstance(value, str) else value
            for name, value in sample.items()
            if name not in ("__key__", "json")
        }
        about = json.dumps({**sample["json"], CHECKSUM: _checksum(payload)}, sort_keys=True).encode()
        if read_metadata(about) is None:
            raise ValueError(f"{key}: json needs kind, frames, fps, height and width, not {sample['json']}")
        self._tar.write({"__key__": key, "json": about, **payload})
        self.samples += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._publish()
            else:
                with suppress(OSError):  # a full disk, say: what is being raised already says so
                    self._tar.close()
        finally:
            self._file.close()
            self._hidden.unlink(missing_ok=True)

    def _publish(self) -> None:
        self._tar.close()
        sync(self._file)
        with self._hidden.open("rb") as file:
            rows, problems = scan_tar(file)
        if problems or len(rows) != self.samples:
            raise DataError(f"{self.path}: written {self.samples} samples, found {len(rows)} ({problems[:1]})")
        Directory(self.path.parent).write(index_name(self.path.name), index_bytes(rows))
        self._hidden.replace(self.path)
        sync_directory(self.path.parent)


class ShardWriter:
    """Samples in order into shard-000000.tar, shard-000001.tar, … of an empty directory. A context manager.

    A shard ends after `samples_per_shard` samples or with the sample that takes it to `max_bytes`.
    Raises `DataError` where the directory has shards already, ValueError for a key that was used before.
    """

    def __init__(self, directory: Path, samples_per_shard: int = 1000, max_bytes: int = 1 << 30) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.glob("*.tar")):
            raise DataError(f"{directory}: holds shards already; write into an empty directory")
        self.directory, self.samples_per_shard, self.max_bytes = directory, samples_per_shard, max_bytes
        self.shards = self.samples = 0
        self._keys: set[str] = set()
        self._open: ShardFile | None = None

    def write(self, sample: dict[str, Any]) -> None:
        """See `ShardFile.write`."""
        if sample["__key__"] in self._keys:
            raise ValueError(f"{sample['__key__']}: key used twice")
        if self._open is None:
            self._open = ShardFile(self.directory / f"shard-{self.shards:06d}.tar")
        self._open.write(sample)
        self._keys.add(sample["__key__"])
        self.samples += 1
        if self._open.samples >= self.samples_per_shard or self._open.bytes >= self.max_bytes:
            self._finish(None)

    def _finish(self, kind: type[BaseException] | None) -> None:
        if self._open is not None:
            shard, self._open = self._open, None
            shard.__exit__(kind)
            self.shards += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._finish(kind)


def _checksum(payload: dict[str, bytes]) -> str:
    state = xxhash.xxh3_64()
    for suffix in sorted(payload):
        state.update(suffix.encode())
        state.update(payload[suffix])
    return state.hexdigest()


class ShardSet:
    """All shards of a directory in name order, as one sequence of samples. Reads are thread-safe."""

    def __init__(self, storage: Storage, tars: list[str], tables: list[pa.Table], cache: CacheConfig | None) -> None:
        self.storage, self.tars = storage, tuple(tars)
        self._tables, self._cache = tables, cache
        self._looked_at: set[int] = set()
        self._starts = [0, *accumulate(table.num_rows for table in tables)]
        self._ranges = [tuple(table.column(name).to_numpy() for name in ("offset", "length")) for table in tables]

    @classmethod
    def open(cls, address: str | Path, cache: CacheConfig | None = None) -> ShardSet:
        """Of a directory, or of an address that fsspec opens, through the cache.

        Raises `DataError` where there is no directory, no shard, no sample, or a tar without index (or the reverse).
        """
        storage = open_storage(address, cache)
        names = storage.names()
        tars = list_tars(storage, names)
        alone = {name for name in names if name.endswith(".arrow")} - {index_name(tar) for tar in tars}
        if alone:
            raise DataError(
                f"{storage.address}/{min(alone)}: its tar is missing; write the shards again or delete the index"
            )
        shards = cls._of(storage, tars, cache)
        if not len(shards):
            raise DataError(f"{storage.address}: no sample in its {len(tars)} shards")
        return shards

    @classmethod
    def _of(cls, storage: Storage, tars: list[str], cache: CacheConfig | None) -> Self:
        """Maps the indexes, which processes then share, or reads them where they are too many."""
        look = partial(read_index, storage, mapped=len(tars) <= MAPPED)
        with ThreadPoolExecutor(32) as pool:
            return cls(storage, tars, list(pool.map(look, tars)), cache)

    @property
    def address(self) -> str:
        return self.storage.address

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.address, self._cache, self._packed_names, self.fingerprint)

    @cached_property
    def _packed_names(self) -> bytes:
        """The tars, for a pickle: one goes with every job of a worker, and there may be 100,000 of them."""
        return zlib.compress("\0".join(self.tars).encode())

    @cached_property
    def fingerprint(self) -> str:
        """xxh3 over the shards' names and indexes: another one when any sample changes place, key, size or shape."""
        return xxhash.xxh3_64_hexdigest(repr(sorted(self.digests.items())).encode())

    @property
    def digests(self) -> dict[str, str]:
        """Of each shard the number of its samples and the digest of their rows."""
        return {
            tar: f"{table.num_rows} {table.schema.metadata[DIGEST].decode()}"
            for tar, table in zip(self.tars, self._tables, strict=True)
        }

    @property
    def sizes(self) -> list[int]:
        """Samples of each shard."""
        return [table.num_rows for table in self._tables]

    def rows_of(self, shard: int) -> range:
        """The samples of one shard, by its place in `tars`."""
        return range(self._starts[shard], self._starts[shard + 1])

    def columns(self, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        """Numeric columns, or scores by `scores.NAME` (NaN where there is none), of one shard after the other."""
        texts = any(name.startswith("scores.") for name in names)
        for shard, table in enumerate(self._tables):
            yield tuple(_column(self._sound(shard) if texts else table, name) for name in names)

    def key(self, index: int) -> str:
        shard, place = self._place(index)
        return self._sound(shard).column("key")[place].as_py()

    def value(self, index: int, column: str) -> Any:
        shard, place = self._place(index)
        return self._sound(shard).column(column)[place].as_py()

    def row(self, index: int) -> Row:
        shard, place = self._place(index)
        return row_of(self._sound(shard), place)

    def shard_of(self, index: int) -> str:
        """The tar that a sample lies in."""
        return self.tars[self._place(index)[0]]

    def read(self, index: int) -> dict[str, Any]:
        """The sample's members by suffix, such as {"mp4": ..., "txt": ..., "json": ...}, with one read of a range.

        Members are bytes, latents a view of what was read: they are large, and their tensors can lie where they are.

        Raises `BadSample` when the tar is short, damaged, missing or another one than was indexed, and OSError when storage
        fails: that is no fault of the sample, and to go on with others would change what is trained.
        """
        shard, place = self._place(index)
        key, tar = self.key(index), self.tars[shard]
        offset, length = (int(column[place]) for column in self._ranges[shard])
        if offset < 0 or length <= 0:
            raise BadSample(key, f"{index_name(tar)} is damaged")
        try:
            content = self.storage.view(tar, offset, length)
        except FileNotFoundError as error:
            raise BadSample(key, f"cannot read {tar} ({error.strerror or error})") from error
        except OSError as error:
            error.add_note(f"reading sample {key} in {self.address}/{tar}")
            raise
        if len(content) < length:
            raise BadSample(key, f"{tar} is truncated")
        payload: dict[str, Any] = {}
        end = 0
        try:
            window = cast(BinaryIO, _Window(content))
            for member in plain_members(content) or members(window, length, end_mark=False):
                if member.key != key or member.refused or member.suffix in payload:
                    raise TornTar(f"finds {member.key}.{member.suffix}")
                part = content[member.data : member.data + member.size]
                payload[member.suffix] = part if member.suffix == LATENTS else bytes(part)
                end = member.end
        except TornTar as error:
            raise BadSample(key, f"{tar} is not as it was indexed ({error})") from error
        if end != length:
            raise BadSample(key, f"{tar} is not as it was indexed (another length)")
        _verify(key, payload)
        return payload

    def _sound(self, shard: int) -> pa.Table:
        """The index of a shard, looked at as a whole before the first text of it is read: a text that says that it lies elsewhere
        would end the process. Numbers lie where they lie. Raises `DataError`."""
        if shard not in self._looked_at:
            try:
                self._tables[shard].validate(full=True)
            except pa.ArrowInvalid:
                path = f"{self.address}/{index_name(self.tars[shard])}"
                raise DataError(f"{path}: damaged index; write it again with `megasora index`") from None
            self._looked_at.add(shard)
        return self._tables[shard]

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]


@lru_cache(maxsize=16)
def _opened(address: str, cache: CacheConfig | None, packed_names: bytes, fingerprint: str) -> ShardSet:
    """What a pickle stands for: a worker process that gets one with every job opens it once. Shards that came later are left out.

    Raises `DataError` where it is not what was pickled any more.
    """
    tars = zlib.decompress(packed_names).decode().split("\0")
    shards = ShardSet._of(open_storage(address, cache), tars, cache)
    if shards.fingerprint != fingerprint:
        raise DataError(f"{address}: its shards were changed while they are read")
    return shards


def _column(table: pa.Table, name: str) -> np.ndarray:
    if name.startswith("scores."):
        values = pc.map_lookup(table.column("scores"), name.removeprefix("scores."), "first")
        return pc.fill_null(values, float("nan")).to_numpy()
    return table.column(name).to_numpy()


class _Window:
    """A view of bytes as a file to read from, without copying them."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def read(self, size: int) -> bytes:
        part = bytes(self._content[self._position : self._position + size])
        self._position += len(part)
        return part

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def tell(self) -> int:
        return self._position


def _verify(key: str, payload: dict[str, Any]) -> None:
    try:
        expected = json.loads(payload.get("json", b"{}"))[CHECKSUM]
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # not written by us
    if _checksum({suffix: value for suffix, value in payload.items() if suffix != "json"}) != expected:
        raise BadSample(key, "its bytes do not match their checksum")
