"""What is known of a file besides its content: captions, perhaps of parts of it, and a class."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.errors import DataError

LISTS = (".parquet", ".csv", ".jsonl")

Texts = tuple[tuple[str, float], ...]  # captions, each with its weight


@dataclass
class Known:
    """The captions of a file: of the whole, and of parts [start, end) in seconds, which count before it."""

    whole: Texts = ()
    parts: list[tuple[float, float, Texts]] = field(default_factory=list)
    label: int = -1  # its class
    cuts: bool = False  # a piece also ends where a part begins or ends, and what is in no part is left out

    def __bool__(self) -> bool:
        return bool(self.whole or self.parts)

    def at(self, seconds: float) -> Texts:
        """For what happens at that time; empty where nothing is known."""
        for start, end, texts in self.parts:
            if start <= seconds < end:
                return texts
        return self.whole

    def edges(self, fps: float) -> set[int]:
        """The frames that begin a piece, whatever they show."""
        return {frame for span in self._spans(fps) for frame in span} if self.cuts else set()

    def wanted(self, frame: int, fps: float) -> bool:
        return not self.cuts or bool(self.whole) or any(first <= frame < last for first, last in self._spans(fps))

    def end(self, fps: float) -> float:
        """The frame from which on nothing is wanted."""
        if not self.cuts or self.whole:
            return math.inf
        return max((last for _, last in self._spans(fps)), default=math.inf)

    def _spans(self, fps: float) -> list[tuple[int, int]]:
        """The frames [first, last) of each part: those whose time is in it."""
        longest = 2**53  # for an end that is not given
        spans = []
        for start, end, _ in self.parts:
            first, last = (math.ceil(min(time * fps, longest) - 1e-6) for time in (start, end))
            spans.append((first, last))
        return spans


@dataclass(frozen=True)
class Line:
    """One line of captions.jsonl or of a list of files."""

    path: str
    texts: Texts
    start: float
    end: float
    is_part: bool
    label: int


def read_line(entry: Mapping[str, Any], path_key: str) -> Line:
    """Reads {path_key, "caption" or "captions" and perhaps "weights", and perhaps "start", "end" (seconds), "label"}.

    "captions" is a list of texts, or of [text, weight]. What is null, NaN or an empty text is taken as not given. Raises
    ValueError, KeyError or TypeError for anything else.
    """
    given = {key: value for key, value in entry.items() if value is not None and value != "" and value == value}
    path = given[path_key]
    if not isinstance(path, str):
        raise TypeError(f"{path_key} is no text")
    start, end = float(given.get("start", 0)), float(given.get("end", math.inf))
    if not 0 <= start < end:
        raise ValueError(f"from {start} to {end} s")
    label = int(given.get("label", -1))
    return Line(path, read_texts(given), start, end, "start" in given or "end" in given, label)


def read_texts(given: Mapping[str, Any]) -> Texts:
    """See `read_line`. In a table's cell a list may be written as JSON. A caption without a word is left out."""
    if "captions" not in given:
        caption = given.get("caption", "")
        if not isinstance(caption, str):
            raise TypeError("a caption is a text")
        found = [(caption, 1.0)]
    else:
        captions, weights = (_as_list(given.get(name, [])) for name in ("captions", "weights"))
        pairs = [(each, 1.0) if isinstance(each, str) else (each[0], float(each[1])) for each in captions]
        if weights:
            pairs = [(text, float(weight)) for (text, _), weight in zip(pairs, weights, strict=True)]
        found = pairs
    for text, weight in found:
        if not isinstance(text, str) or not 0 < weight < math.inf:
            raise ValueError("a caption is a text, its weight above 0")
        text.encode()  # ValueError for half a surrogate pair, which JSON can write
    return tuple((" ".join(text.split()), weight) for text, weight in found if text.strip())


def _as_list(value: Any) -> list[Any]:
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise TypeError("a list is expected")
    return found


def caption_lines(path: Path) -> Iterator[tuple[int, Line | None]]:
    """The lines of captions.jsonl by number, None for one that cannot be read: {"file", "caption", ...}, see `read_line`."""
    try:
        for number, entry in _json_lines(path) if path.is_file() else ():
            yield number, _line(entry, "file")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def listed_files(path: Path) -> Iterator[tuple[int, Line | None]]:
    """The rows of a parquet, CSV or JSONL list by number, None for one that cannot be read; "path", ..., see `read_line`.

    Raises `DataError` where it is no such file or has no column "path".
    """
    entries = {".parquet": _parquet_rows, ".csv": _csv_rows, ".jsonl": _json_lines}[path.suffix.lower()](path)
    for number, entry in entries:
        yield number, _line(entry, "path")


def _line(entry: Any, path_key: str) -> Line | None:
    try:
        return read_line(entry, path_key)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                yield number, None


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file)
        try:
            _check_columns(path, rows.fieldnames or [])
            for number, row in enumerate(rows, 1):
                # A key None holds the cells beyond the last column.
                yield (number, row if None not in row and _is_utf8(row) else None)
        except csv.Error as error:
            raise DataError(f"{path}: no CSV ({error})") from None


def _is_utf8(row: Mapping[str, str | None]) -> bool:
    try:
        "".join(value for value in row.values() if value).encode()
    except ValueError:
        return False
    return True


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_columns(path, names)
            known = [n for n in names if n in ("path", "caption", "captions", "weights", "label", "start", "end")]
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=known):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: no readable parquet ({str(error).splitlines()[0]})") from None


def _check_columns(path: Path, names: Any) -> None:
    if "path" not in names or not {"caption", "captions"} & set(names):
        raise DataError(f"{path}: needs the columns path and caption or captions, has {', '.join(map(str, names))}")
