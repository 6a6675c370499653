"""Webdataset tars with an index beside each: `shard-000000.tar` and `shard-000000.arrow`.

A sample is a run of members KEY.mp4|KEY.jpg, KEY.txt, KEY.json (raw) or KEY.safetensors, KEY.json (latents), and the
tars open in plain webdataset. The index (index.py) tells where each sample begins and how long it is, so any sample is
one pread. KEY.json carries what the index shows, and a checksum of the other members.
"""

from __future__ import annotations

import json
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from contextlib import suppress
from functools import cached_property
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import xxhash
from webdataset import TarWriter

from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import (
    Row,
    TornTar,
    list_tars,
    members,
    read_index,
    read_metadata,
    scan_tar,
    sync,
    sync_directory,
    write_index,
)

CHECKSUM = "members_xxh3"  # in KEY.json
KEY = re.compile(r"[\w@-]+(/[\w@-]+)*", re.ASCII)


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
        rows, problems = scan_tar(self._hidden)
        if problems or len(rows) != self.samples:
            raise DataError(f"{self.path}: written {self.samples} samples, found {len(rows)} ({problems[:1]})")
        write_index(rows, self.path.with_suffix(".arrow"))
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


class _Descriptor:
    """An open file. It closes when nobody holds it any more, so a reader may outlive its place in the cache."""

    def __init__(self, path: Path) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class ShardSet:
    """All shards of a directory in name order, as one sequence of samples. Reads are thread-safe."""

    OPEN_FILES = 64

    def __init__(self, directory: Path, tars: list[Path], tables: list[pa.Table]) -> None:
        self.directory = directory
        self.table: pa.Table = pa.concat_tables(tables)
        self._tars, self._tables = tars, tables
        self._starts = [0, *accumulate(table.num_rows for table in tables)]
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path) -> ShardSet:
        """Raises `DataError` where there is no directory, no shard, no sample, or a tar without index (or the reverse)."""
        tars = list_tars(directory)
        alone = {path.stem for path in directory.glob("*.arrow") if not path.name.startswith(".")}
        alone -= {tar.stem for tar in tars}
        if alone:
            raise DataError(
                f"{directory / min(alone)}.arrow: its tar is missing; write the shards again or delete the index"
            )
        shards = cls(directory, tars, [read_index(tar.with_suffix(".arrow")) for tar in tars])
        if not len(shards):
            raise DataError(f"{directory}: no sample in its {len(tars)} shards")
        return shards

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet.open, (self.directory,)

    @cached_property
    def fingerprint(self) -> str:
        """xxh3 over the shards' names and indexes: another one when any sample changes place, key, size or shape."""
        state = xxhash.xxh3_64()
        for tar, table in zip(self._tars, self._tables, strict=True):
            state.update(f"{tar.name}\0{table.num_rows}\0".encode())
            for column in table.columns:
                for value in column.chunks:
                    _hash_array(state, value)
        return state.hexdigest()

    @property
    def tars(self) -> tuple[Path, ...]:
        return tuple(self._tars)

    def rows_of(self, shard: int) -> range:
        """The samples of one shard, by its place in `tars`."""
        return range(self._starts[shard], self._starts[shard + 1])

    def key(self, index: int) -> str:
        shard, place = self._place(index)
        return self._tables[shard].column("key")[place].as_py()

    def row(self, index: int) -> Row:
        shard, place = self._place(index)
        return Row(*(column[place].as_py() for column in self._tables[shard].columns))

    def read(self, index: int) -> dict[str, bytes]:
        """The sample's members by suffix, such as {"mp4": ..., "txt": ..., "json": ...}, with one pread.

        Raises `BadSample` when the tar is short, damaged, another one than was indexed, or cannot be read.
        """
        row = self.row(index)
        shard, _ = self._place(index)
        tar = self._tars[shard]
        try:
            content = _pread(self._file(shard), row.length, row.offset)
        except OSError as error:
            raise BadSample(row.key, f"cannot read {tar.name} ({error.strerror})") from error
        if len(content) < row.length:
            raise BadSample(row.key, f"{tar.name} is truncated")
        payload: dict[str, bytes] = {}
        end = 0
        try:
            for member in members(BytesIO(content), len(content), end_mark=False):
                if member.key != row.key or member.refused or member.suffix in payload:
                    raise TornTar(f"finds {member.key}.{member.suffix}")
                payload[member.suffix] = content[member.data : member.data + member.size]
                end = member.end
        except TornTar as error:
            raise BadSample(row.key, f"{tar.name} is not as it was indexed ({error})") from error
        if end != row.length:
            raise BadSample(row.key, f"{tar.name} is not as it was indexed (another length)")
        _verify(row.key, payload)
        return payload

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _file(self, shard: int) -> _Descriptor:
        with self._lock:
            file = self._files.pop(shard, None) or _Descriptor(self._tars[shard])
            self._files[shard] = file
            if len(self._files) > self.OPEN_FILES:
                self._files.popitem(last=False)
        return file


def _pread(file: _Descriptor, length: int, offset: int) -> bytes:
    """All of it, or up to the end of the file: one call of the system gives at most 2 GiB."""
    parts: list[bytes] = []
    while length and (part := os.pread(file.number, length, offset)):
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _verify(key: str, payload: dict[str, bytes]) -> None:
    try:
        expected = json.loads(payload.get("json", b"{}"))[CHECKSUM]
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # not written by us
    if _checksum({suffix: value for suffix, value in payload.items() if suffix != "json"}) != expected:
        raise BadSample(key, "its bytes do not match their checksum")


def _hash_array(state: Any, values: pa.Array) -> None:
    """By value, whatever the padding of the buffers."""
    if not pa.types.is_string(values.type):
        state.update(values.to_numpy())
        return
    _, offsets, data = values.buffers()
    ends = memoryview(offsets).cast("i")[values.offset : values.offset + len(values) + 1]
    state.update(ends)
    state.update(memoryview(data or b"")[ends[0] : ends[-1]])
