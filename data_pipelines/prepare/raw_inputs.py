"""What `prepare` reads: a tree of files, one file, a webdataset, or a list of files with captions -> its sources, in order."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipelines.errors import BadSample, DataError
from data_pipelines.names import is_below
from data_pipelines.prepare.captions import LISTS, Known, caption_lines, listed_files, read_texts
from data_pipelines.prepare.config import PrepareConfig
from data_pipelines.shards.index import MEDIA
from data_pipelines.shards.tars import ShardSet
from data_pipelines.video.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

CAPTIONS = "captions.jsonl"
READERS = 16  # threads that look at files: on network storage that is mostly waiting
Drop = Callable[[str, str], None]  # (reason, what): counts what is not used


@dataclass(slots=True)
class Source:
    """A video or image that may become samples."""

    name: str  # relative to the input
    slug: str  # the beginning of its keys, unlike any other source's
    place: Path | int  # a file, or its number in the webdataset
    known: Known
    bytes: int = 0  # where that is known


@dataclass
class Inputs:
    """What `prepare` was given."""

    sources: list[Source]
    shards: ShardSet | None  # of a webdataset
    fingerprint: str  # another one when names, captions or content change
    found: int  # files or samples, with those that are no sources


def open_inputs(config: PrepareConfig, output: Path, drop: Drop) -> Inputs:
    """The sources in the order of their names (of a list: its own order). Raises `DataError` where there is no such input.

    A directory that holds tars is a webdataset, and a file that is named like a list is one; `output` is passed over.
    Whoever copies the input elsewhere finds the same fingerprint. The files of a list are not looked at for it.
    """
    if "://" in config.input:
        return _webdataset(config.input)
    root = Path(config.input)
    if not root.exists():
        raise DataError(f"prepare.input={root}: no such file or directory")
    if root.is_file() and root.suffix.lower() in LISTS:
        return _list(root, Path(config.root) if config.root else root.parent, drop)
    if root.is_dir() and any(not path.name.startswith(".") for path in root.glob("*.tar")):
        return _webdataset(config.input)
    return _tree(root, output, drop)


def read_source(source: Source, shards: ShardSet | None) -> tuple[Path | bytes, Known]:
    """The content, and what is known of it. Raises `BadSample` for a sample of a webdataset that is none."""
    if isinstance(source.place, Path):
        return source.place, source.known
    assert shards is not None
    members = shards.read(source.place)
    media = [content for suffix, content in members.items() if suffix in MEDIA]
    if len(media) != 1:
        raise BadSample(source.name, "no video or image")
    try:
        about = json.loads(members.get("json", b"{}"))
        captions = read_texts({"captions": about["captions"]} if isinstance(about, dict) and "captions" in about
                              else {"caption": members.get("txt", b"").decode()})  # fmt: skip
        label = int(members.get("cls", b"-1"))
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError):
        raise BadSample(source.name, "unreadable caption or class") from None
    return media[0], Known(captions, label=label)


def _tree(root: Path, output: Path, drop: Drop) -> Inputs:
    """Videos and images by their suffix; hidden files are passed over."""
    files = _files_below(root, drop) if root.is_dir() else {root.name: root}
    made = f"{output.relative_to(root.resolve()).as_posix()}/" if output.is_relative_to(root.resolve()) else None
    names, found = [], 0
    for name, path in sorted(files.items()):
        if path.name.startswith(".") or name == CAPTIONS or path.suffix.lower() == ".txt":
            continue
        if made is not None and name.startswith(made):
            continue
        found += 1
        if not name.isprintable():
            drop("not a printable UTF-8 name", ascii(name))
        elif path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            names.append(name)
        else:
            drop("not a video or image by its name", name)
    known = {name: Known() for name in names}
    _read_caption_file((root if root.is_dir() else root.parent) / CAPTIONS, known, drop)
    slugs = make_slugs({name: name.rsplit(".", 1)[0] for name in names})
    sources = [Source(name, slugs[name], files[name], known[name]) for name in names]
    state = xxhash.xxh3_64()
    with ThreadPoolExecutor(READERS) as pool:
        for source, look in zip(sources, pool.map(_look, [files[name] for name in names]), strict=True):
            if look.caption is not None:
                source.known.whole = read_texts({"caption": look.caption})
            elif look.bad_caption:
                drop("caption is not UTF-8", source.name)
            source.bytes = look.bytes
            state.update(f"{source.name}\0{_known(source.known)}\0{look.digest}\0".encode())
    return Inputs(sources, None, state.hexdigest(), found)


def _files_below(root: Path, drop: Drop) -> dict[str, Path]:
    """By their names relative to `root`. A folder that cannot be listed is dropped; raises `DataError` if that is `root`."""

    def not_listed(error: OSError) -> None:
        folder = Path(error.filename)
        if folder == root:
            raise DataError(f"prepare.input={root}: {error.strerror}")
        drop("unreadable folder", f"{folder.relative_to(root).as_posix()} ({error.strerror})")

    files = {}
    for folder, below, names in os.walk(root, onerror=not_listed):
        below[:] = [name for name in below if not name.startswith(".")]
        for path in (Path(folder) / name for name in names):
            # Where a folder may be listed only, its files will be counted as unreadable.
            with suppress(PermissionError):
                if not path.is_file():
                    continue
            files[path.relative_to(root).as_posix()] = path
    return files


def _read_caption_file(path: Path, known: dict[str, Known], drop: Drop) -> None:
    for number, line in caption_lines(path):
        if line is None:
            drop(f"unreadable line of {CAPTIONS}", f"line {number}")
        elif line.path not in known:
            drop("caption without file", line.path)
        else:
            about = known[line.path]
            about.label = line.label if line.label >= 0 else about.label
            if line.is_part:
                about.parts.append((line.start, line.end, line.texts))
            elif line.texts:
                about.whole = line.texts


@dataclass(frozen=True)
class _Look:
    bytes: int
    digest: str
    caption: str | None
    bad_caption: bool


def _look(path: Path) -> _Look:
    """Size, a digest of the first and last 64 KiB, and the caption in NAME.txt."""
    caption, bad = None, False
    try:
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
    except ValueError:
        bad = True
    except OSError:
        pass
    try:
        with path.open("rb") as file:
            state = xxhash.xxh3_64(file.read(1 << 16))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 16)))
            state.update(file.read())
    except OSError:
        return _Look(0, "unreadable", caption, bad)
    return _Look(size, f"{state.hexdigest()} {size}", caption, bad)


def _list(path: Path, root: Path, drop: Drop) -> Inputs:
    """Rows of one path together: each that names a part adds it, others add captions of the whole. Only files below `root` are
    opened: lists come from others."""
    known: dict[str, Known] = {}
    for number, line in listed_files(path):
        if line is None:
            drop(f"unreadable row of {path.name}", f"row {number}")
        elif not line.path.isprintable():
            drop("not a printable UTF-8 name", ascii(line.path))
        elif not is_below(line.path, root):
            drop("outside of prepare.root", line.path)
        else:
            about = known.setdefault(line.path, Known(cuts=True))
            about.label = line.label if line.label >= 0 else about.label
            if line.is_part:
                about.parts.append((line.start, line.end, line.texts))
            else:
                about.whole += line.texts
    slugs = make_slugs({name: re.sub(r"[.][^./]*$", "", name) for name in known})
    state = xxhash.xxh3_64()
    for name, about in known.items():
        state.update(f"{name}\0{_known(about)}\0".encode())
    sources = [Source(name, slugs[name], root / name, about) for name, about in known.items()]
    return Inputs(sources, None, state.hexdigest(), len(sources))


def _webdataset(address: str) -> Inputs:
    shards = ShardSet.open(address)
    names = [f"{shards.tars[s]}/{shards.key(i)}" for s in range(len(shards.tars)) for i in shards.rows_of(s)]
    slugs = make_slugs({name: name.split("/", 1)[1] for name in names})
    lengths = [int(length) for (column,) in shards.columns("length") for length in column]
    sources = [Source(name, slugs[name], i, Known(), lengths[i]) for i, name in enumerate(names)]
    return Inputs(sources, shards, shards.fingerprint, len(sources))


def make_slugs(stems: dict[str, str]) -> dict[str, str]:
    """{name: what it is called} -> {name: what its keys begin with}: letters, digits, _ and -, at most 60, unlike any other's."""
    slugs = {name: re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-") for name, stem in stems.items()}
    uses = Counter(slugs.values())
    for name, slug in slugs.items():
        if uses[slug] > 1 or not 0 < len(slug) <= 60:  # a key must fit into a tar header
            slugs[name] = f"{slug[:43]}-{xxhash.xxh3_64_hexdigest(name.encode())}".strip("-")
    uses = Counter(slugs.values())
    if len(uses) < len(slugs):
        twice = next(name for name, slug in slugs.items() if uses[slug] > 1)
        raise DataError(f"{twice}: another file would have the same keys; rename it")
    return slugs


def _known(known: Known) -> str:
    """All of it, for comparing."""
    facts: list[Any] = [known.whole, known.parts, known.label, known.cuts]
    return json.dumps(facts)
