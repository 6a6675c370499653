"""The index of webdataset tars: an Arrow IPC file beside each, uncompressed, to be memory-mapped. One row a sample.

It is built from the tar's headers: nothing is extracted, and no header is trusted. What cannot be used is counted.
"""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import xxhash

from data_pipelines.errors import DataError
from data_pipelines.names import is_safe
from data_pipelines.shards.storage import Storage
from data_pipelines.video.files import probe
from data_pipelines.video.reader import Undecodable

MEDIA = frozenset({"mp4", "m4v", "mov", "mkv", "webm", "avi", "jpg", "jpeg", "png", "webp"})
LATENTS = "safetensors"
MEMBER_MAX = 1 << 31  # bytes
TEXT_MAX = 1 << 24  # bytes of a member that is parsed in one piece
TEXTS = frozenset({"txt", "json", "cls"})
HEADERS_MAX = 1 << 15  # bytes of all headers of one member: what stands before it may be a long name, or attributes
NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's rule: the key ends at the first dot of the last part
KEY = re.compile(r"[\w@-]+(/[\w@-]+)*", re.ASCII)  # of our own samples
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("kind", pa.string()),
        ("frames", pa.int32()),
        ("fps", pa.float64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("caption_tokens", pa.int32()),
        ("variant", pa.int16()),
        ("scores", pa.map_(pa.string(), pa.float32())),
    ]
)
DIGEST = b"rows_xxh3"  # in the schema's metadata


@dataclass(frozen=True)
class Row:
    """One line of the index. length: from the sample's first tar header to the end of its last member's padding."""

    key: str
    offset: int  # of the first tar header, in bytes
    length: int
    kind: Literal["video", "image", "latent"]
    frames: int
    fps: float  # 0 for an image
    height: int
    width: int
    caption_tokens: int  # -1: unknown
    variant: int = 0  # of the sizes in which a sample was encoded, which stand side by side; 0 begins a sample
    scores: dict[str, float] = field(default_factory=dict)  # what `prepare` measured


@dataclass(frozen=True)
class Problem:
    """A sample of a tar that is not in the index; an empty key stands for the tar itself. Reasons can be counted."""

    key: str
    reason: str


@dataclass(frozen=True)
class Member:
    """A member of a tar: the sample and suffix that its name says, where it lies, and why it is refused if it is. Bytes."""

    key: str
    suffix: str
    start: int  # of its header
    data: int  # of its content
    size: int
    end: int  # of its padding
    refused: str | None


class TornTar(Exception):
    """The tar cannot be followed any further. The message is the reason, without the file's name."""


def members(file: BinaryIO, size: int, *, end_mark: bool) -> Iterator[Member]:
    """The members of a tar of `size` bytes; directories are passed over. Raises `TornTar`.

    end_mark: the zero blocks that end a tar must be there (a piece of a tar has none).
    """
    position = -1
    headers: Any = _Headers(file)
    try:
        tar: Any = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115 - it holds nothing but `file`
        while (info := tar.next()) is not None:
            headers.left = HEADERS_MAX
            tar.members = []  # else it keeps every header
            end = info.offset_data + -(-info.size // 512) * 512
            if info.offset <= position or end < info.offset_data:
                raise TornTar("damaged tar header")  # it would lead backwards, for ever
            position = info.offset
            if info.isdir():
                continue
            match = NAME.fullmatch(info.name)
            key, suffix = (match[1], match[2].lower()) if match else (info.name, "")
            yield Member(key, suffix, info.offset, info.offset_data, info.size, end, _refusal(info, suffix))
            if end > size:
                raise TornTar("truncated tar")
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as error:
        raise TornTar("damaged tar header" if position >= 0 else "not a plain tar") from error
    file.seek(tar.offset)
    mark = file.read(1024)
    if len(mark) < 512 and (mark or end_mark):
        raise TornTar("truncated tar")
    if mark.strip(b"\0"):
        raise TornTar("damaged tar header")


class _Headers:
    """A tar as tarfile reads it: headers and what belongs to them, whose sizes it believes, at most HEADERS_MAX a member."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file, self.left = file, HEADERS_MAX

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise TornTar("tar header too large")
        return self._file.read(size)


def plain_members(content: memoryview) -> list[Member] | None:
    """The members of a piece of a tar that has plain headers as `ShardFile` writes them; None: ask `members`."""
    found, position = [], 0
    while position + 512 <= len(content):
        header = bytes(content[position : position + 512])
        name, _, rest = header[:100].partition(b"\0")
        if header[257:265] != b"ustar\x0000" or header[156:157] != b"0" or rest.strip(b"\0") or header[345]:
            return None
        try:
            size, checksum = int(header[124:135], 8), int(header[148:154], 8)
            match = NAME.fullmatch(name.decode("ascii"))
        except ValueError:
            return None
        if match is None or not KEY.fullmatch(match[1]) or checksum != sum(header) - sum(header[148:156]) + 256:
            return None
        data = position + 512
        end = data + -(-size // 512) * 512
        suffix = match[2].lower()
        if end > len(content) or not suffix.isalnum() or size > _most(suffix):
            return None
        found.append(Member(match[1], suffix, position, data, size, end, None))
        position = end
    return found


def _refusal(info: tarfile.TarInfo, suffix: str) -> str | None:
    if not is_safe(str(PurePosixPath(info.name))):  # "./a.mp4" is usual
        return "unsafe path"
    if not info.isreg() or info.issparse():
        return "link, device or sparse member"
    if not suffix:
        return "no key and suffix in the name"
    if info.size > _most(suffix):
        return "member too large"
    return None


def _most(suffix: str) -> int:
    return TEXT_MAX if suffix in TEXTS else MEMBER_MAX


def scan_tar(file: BinaryIO) -> tuple[list[Row], list[Problem]]:
    """The index of a tar, by its headers and its KEY.json. Only a sample without usable KEY.json is decoded.

    A sample is a run of members of one key, as in webdataset. One that has a refused member is refused as a whole.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    seen: set[str] = set()
    for group in _groups(members(file, size, end_mark=True), problems):
        found = _index(file, group, size)
        if isinstance(found, Row) and found.key in seen:
            found = Problem(found.key, "duplicate key")
        if isinstance(found, Row):
            seen.add(found.key)
            rows.append(found)
        else:
            problems.append(found)
    return rows, sorted(problems, key=lambda problem: problem.key == "")


def _groups(found: Iterator[Member], problems: list[Problem]) -> Iterator[list[Member]]:
    """Runs of members of one key. Where the tar is torn, what was complete before still comes."""
    group: list[Member] = []
    try:
        for member in found:
            if group and group[0].key != member.key:
                yield group
                group = []
            group.append(member)
    except TornTar as error:
        problems.append(Problem("", str(error)))
    if group:
        yield group


def _index(file: BinaryIO, group: list[Member], size: int) -> Row | Problem:
    """The members of one key -> its row, or why it has none."""
    key = group[0].key
    refused = next((member.refused for member in group if member.refused), None)
    if refused:
        return Problem(key, refused)
    if group[-1].end > size:
        return Problem(key, "cut off")
    by_suffix = {member.suffix: member for member in group}
    if len(by_suffix) < len(group):
        return Problem(key, "two members of one name")

    def content(suffix: str) -> bytes:
        file.seek(by_suffix[suffix].data)
        return file.read(by_suffix[suffix].size)

    media = [suffix for suffix in by_suffix if suffix in MEDIA or suffix == LATENTS]
    if len(media) != 1:
        return Problem(key, "more than one video, image or latents" if media else "no video, image or latents")
    if media[0] != LATENTS and ("txt" not in by_suffix or not content("txt").strip()):
        return Problem(key, "no caption")
    about = read_metadata(content("json")) if "json" in by_suffix else None
    if about is None:
        if media[0] == LATENTS:
            return Problem(key, "no metadata")
        try:
            about = asdict(probe(content(media[0])))
        except Undecodable:
            return Problem(key, "undecodable")
    tokens, variant = about.get("caption_tokens", -1), about.get("variant", 0)
    return Row(
        key=key,
        offset=group[0].start,
        length=group[-1].end - group[0].start,
        kind=about["kind"],
        frames=about["frames"],
        fps=float(about["fps"]),
        height=about["height"],
        width=about["width"],
        caption_tokens=tokens if _is_count(tokens) else -1,
        variant=variant if _is_count(variant) and variant < 2**15 else 0,
        scores=_scores(about.get("scores")),
    )


def _scores(found: object) -> dict[str, float]:
    """{name: finite number} and nothing else."""
    if not isinstance(found, dict):
        return {}
    numbers = {name: _number(value) for name, value in sorted(found.items()) if name.isprintable()}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _number(value: object) -> float:
    """NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # JSON has integers of any length
        return math.nan


def read_metadata(content: bytes) -> dict[str, Any] | None:
    """A KEY.json that has all that the index needs (kind, frames, fps, height, width), else None."""
    try:
        about = json.loads(content)
        good = about["kind"] in ("video", "image", "latent") and math.isfinite(about["fps"]) and about["fps"] >= 0
        good = good and all(_is_count(about[name]) and about[name] > 0 for name in ("frames", "height", "width"))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return about if good else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def index_shard(storage: Storage, tar: str) -> dict[str, Any]:
    """Scans one tar and writes its index beside it.

    Returns {"samples", "problems": {reason: count}, "examples": {reason: [keys]}}.
    """
    with storage.open(tar) as file:
        rows, problems = scan_tar(file)
    storage.write(index_name(tar), index_bytes(rows))
    examples: dict[str, list[str]] = {}
    for problem in problems:
        kept = examples.setdefault(problem.reason, [])
        if len(kept) < 5:
            kept.append(f"{tar}:{problem.key}")
    counts = Counter(problem.reason for problem in problems)
    return {"samples": len(rows), "problems": dict(sorted(counts.items())), "examples": examples}


def index_directory(storage: Storage, progress: Callable[[int, int, str], None]) -> dict[str, Any]:
    """`index_shard` for every tar of a directory; progress(done, all, name). One report over all, with "shards".

    Raises `DataError` where there is no tar or no usable sample.
    """
    tars = list_tars(storage)
    report: dict[str, Any] = {"shards": len(tars), "samples": 0, "problems": {}, "examples": {}}
    for done, tar in enumerate(tars):
        progress(done, len(tars), tar)
        one = index_shard(storage, tar)
        report["samples"] += one["samples"]
        for reason, count in one["problems"].items():
            report["problems"][reason] = report["problems"].get(reason, 0) + count
            report["examples"][reason] = (report["examples"].get(reason, []) + one["examples"][reason])[:5]
    progress(len(tars), len(tars), "")
    if not report["samples"]:
        raise DataError(f"{storage.address}: no usable sample in {len(tars)} tars ({describe(report['problems'])})")
    return report


def describe(counts: dict[str, int]) -> str:
    """{"no caption": 2, "cut off": 1} -> "no caption 2, cut off 1"."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "nothing found"


def list_tars(storage: Storage, names: list[str] | None = None) -> list[str]:
    tars = [name for name in (storage.names() if names is None else names) if name.endswith(".tar")]
    if not tars:
        raise DataError(f"{storage.address}: no shard (*.tar) in it")
    return tars


def index_name(tar: str) -> str:
    return tar.removesuffix(".tar") + ".arrow"


def index_bytes(rows: list[Row]) -> bytes:
    """The Arrow file of an index, with a digest of its rows."""
    digest = xxhash.xxh3_64()
    for row in rows:
        digest.update(repr(astuple(row)).encode())
    columns = list(zip(*(_values(row) for row in rows), strict=True)) if rows else [()] * len(SCHEMA)
    schema = SCHEMA.with_metadata({DIGEST: digest.hexdigest().encode()})
    arrays = [pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)]
    table = pa.table(arrays, schema=schema)
    content = BytesIO()
    with pa.ipc.new_file(content, schema) as writer:
        writer.write_table(table)
    return content.getvalue()


def _values(row: Row) -> tuple[Any, ...]:
    return (*astuple(row)[:-1], list(row.scores.items()))


def row_of(table: pa.Table, place: int) -> Row:
    values = [column[place].as_py() for column in table.columns]
    values[-1] = dict(values[-1])
    return Row(*values)


def read_index(storage: Storage, tar: str, *, mapped: bool) -> pa.Table:
    """The index of a tar, mapped into memory or read into it. Raises `DataError`."""
    name = index_name(tar)
    path = f"{storage.address}/{name}"
    try:
        content = storage.mapped(name) if mapped else pa.BufferReader(storage.read(name))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; `megasora index` writes the index of a tar") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        with content as file:  # a mapping outlives the file
            table = pa.ipc.open_file(file).read_all()
        table.validate()  # lengths against each other, without a look at the rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged index; write it again with `megasora index`") from error
    if not table.schema.equals(SCHEMA) or not (table.schema.metadata or {}).get(DIGEST, b"").isalnum():
        raise DataError(f"{path}: an index with other columns; write it again with `megasora index`")
    if any(column.null_count for column in table.columns):
        raise DataError(f"{path}: an index with empty cells; write it again with `megasora index`")
    return table
