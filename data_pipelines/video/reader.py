"""The frames of a video file, one after the other, from any of them on.

Files are not trusted: only the containers named here are opened, and sizes are checked before decoding.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Self

import av
import numpy as np
from av.error import FFmpegError

SIDE_MAX = 16384  # pixels: a header that claims more is refused
PIXELS_MAX = 1 << 26

# Playlist formats (HLS, concat, DASH) are left out on purpose: they make FFmpeg open other files and addresses.
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,flv,ogg,gif,h264,hevc,ivf,yuv4mpegpipe"
# Containers with a table of key frames, and a time for each frame.
SEEKABLE = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
FRAME_IN_A_PACKET = frozenset({"h264", "hevc", "vp9", "av1", "dav1d"})  # decoders that give one for each
REORDERED = 32  # no decoder gives a frame so many packets late
# Boxes of MP4 with tables somewhere inside.
BOXES = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"})
BOXES_MAX = 1_000_000
SLACK = Fraction(1, 1000)  # seconds
STEADY = Fraction(1, 20)  # of a frame's time
STILL = 10  # seconds
HDR = (16, 18)  # the codes of ITU-T H.273 for transfer by PQ and HLG

Timed = tuple[int, av.VideoFrame]  # with the time when it is shown, in ticks of its stream


class Undecodable(ValueError):
    """The bytes are no video or image that can be used. The message is the reason, without the file's name."""


def check_size(height: int, width: int) -> None:
    if not (0 < height <= SIDE_MAX and 0 < width <= SIDE_MAX and height * width <= PIXELS_MAX):
        raise Undecodable(f"{width}x{height} pixels (at most {SIDE_MAX} a side and {PIXELS_MAX} in all)")


def claimed_samples(file: BinaryIO, size: int) -> int:
    """What the tables of an MP4 say, in all: FFmpeg makes room for so many, though a table of equal ones takes a few bytes."""
    count, parts = 0, [(0, size)]
    for _ in range(BOXES_MAX):
        if not parts:
            return count
        begin, end = parts.pop()
        if begin + 32 > end:
            continue
        file.seek(begin)
        length, kind, large, *words = struct.unpack(">I4sQ4I", file.read(32))
        header, length = (16, large) if length == 1 else (8, length or end - begin)
        if length < header:
            continue
        parts.append((begin + length, end))
        if kind in BOXES:
            parts.append((begin + header, min(begin + length, end)))
        elif kind in (b"stsz", b"stz2"):
            count += words[2] if header == 16 else words[0]
        elif kind == b"trun":
            count += words[1] if header == 16 else large & 0xFFFFFFFF
    raise Undecodable(f"more than {BOXES_MAX} boxes")


class VideoReader:
    """One pass over the good frames of a video, in display order, one frame in memory at a time.

    It begins with the frame `start`, or with the one shown at `seconds`. Where the container has a table of its key frames it
    begins to decode at the last of them before; else at the first frame, as it does where anything contradicts that table.
    What cannot be decoded before the first good frame is skipped. After it, the first damage ends the video, and
    `damage` says what it was, so a truncated file yields its beginning; up to a few B frames before the damage may show
    it. Raises `Undecodable` if there is no good frame.
    """

    height: int  # as shown
    width: int
    fps: float
    damage: str | None
    unlike: str  # why its frames do not look as in a player: "HDR", "interlaced", or nothing

    def __init__(self, source: Path | bytes, *, start: int = 0, seconds: Fraction | None = None) -> None:
        self._open(source)
        try:
            self._frames = self._begin(source, start, seconds)
            found = next(self._frames, None)
            if found is None:
                where = f"frame {start}" if seconds is None else f"second {float(seconds)}"
                raise Undecodable(f"it ends before {where}" if start or seconds else "no frame can be decoded")
            self._first, (_, first) = found, found
            self.turn, self.unlike = Turn.of(first), unlike(first)
            shown_width = round(first.width * (self._stream.sample_aspect_ratio or 1))
            check_size(first.height, shown_width)
            self.height, self.width = (shown_width, first.height) if self.turn.swap else (first.height, shown_width)
        except BaseException:
            self._container.close()
            raise

    def _open(self, source: Path | bytes) -> None:
        self.damage = None
        limits = {"max_pixels": str(PIXELS_MAX)}
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file", **limits}
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            claimed = claimed_samples(file, size)
        if claimed > size:
            raise Undecodable(f"a header that claims {claimed} samples in {size} bytes")
        try:
            content = BytesIO(source) if isinstance(source, bytes) else f"file:{source}"
            self._container = av.open(content, "r", options=options, metadata_errors="replace")
        except FFmpegError as error:
            raise Undecodable(f"no readable video ({error.strerror})") from error
        try:
            if not self._container.streams.video:
                raise Undecodable("no video stream")
            self._stream = self._container.streams.video[0]
            if self._stream.codec_context is None:
                raise Undecodable("no decoder for its codec")
            check_size(self._stream.height, self._stream.width)
            self._stream.codec_context.options = limits  # holds for a size that changes midway too
            self._stream.thread_count = 1
            rate = self._stream.average_rate or self._stream.guessed_rate
            if not rate:
                raise Undecodable("no frame rate")
            self.fps, self._rate = float(rate), rate
            self._tick = Fraction(self._stream.time_base or 1 / rate)  # seconds
            self._interval = max(1, round(1 / (rate * self._tick)))  # ticks from frame to frame
            # Where time begins, in ticks. None until the first frame says it.
            self._origin = self._stream.start_time if self._container.format.name in SEEKABLE else None
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._frames = iter(())  # which hold this reader, and the decoder's memory until the garbage collector comes
        self._container.close()

    def __iter__(self) -> Iterator[av.VideoFrame]:
        yield self._first[1]
        for _, frame in self._frames:
            yield frame

    def at_rate(self, begin: Fraction, rate: Fraction) -> Iterator[av.VideoFrame]:
        """The frames shown at the times begin, begin + 1 / rate, ... in seconds, as long as one is. One may come again."""
        wanted, step = self._ticks(begin), 1 / (rate * self._tick)
        shown_time, shown = self._first
        for time, frame in self._frames:
            while wanted < time:
                yield shown
                wanted += step
            shown_time, shown = time, frame
        while wanted < shown_time + (shown.duration or self._interval):
            yield shown
            wanted += step

    def steadily(self) -> Iterator[av.VideoFrame]:
        """The frames at the steady rate `fps`: where their distances vary, one comes again, or is left out, so that a second
        stays a second."""
        given, due = 0, Fraction(0)
        shown_time, shown = self._first
        for time, frame in self._frames:
            due += self._distance(time - shown_time)
            while given < due - Fraction(1, 2):
                yield shown
                given += 1
            shown_time, shown = time, frame
        due += self._distance(shown.duration or self._interval)
        while given < due - Fraction(1, 2):
            yield shown
            given += 1

    def _distance(self, ticks: int) -> Fraction:
        """In frames. Times are rounded to ticks, or once were to milliseconds, and headers may name a rate that is a little
        off: what is about one frame is one. What stands still for long is taken for a jump of the clock, and is one too."""
        seconds, rounding = ticks * self._tick, min(max(self._tick, SLACK) * self._rate, Fraction(1, 4))
        steady = abs(seconds * self._rate - 1) <= STEADY + rounding
        return Fraction(1) if steady or seconds > STILL else seconds * self._rate

    def _ticks(self, seconds: Fraction) -> Fraction:
        """A moment later than that: times are rounded to ticks, or once were to milliseconds."""
        rounding = Fraction(1, 2) if self._interval > 1 else Fraction(0)
        return (self._origin or 0) + seconds / self._tick + max(rounding, SLACK / self._tick)

    def _begin(self, source: Path | bytes, start: int, seconds: Fraction | None) -> Iterator[Timed]:
        if not start and not seconds:
            return self._good_frames()
        if self._container.format.name in SEEKABLE:
            frames = self._seek(start, seconds)
            if frames is not None:
                return frames
            self._container.close()
            self._open(source)
        if seconds is None:
            return islice(self._good_frames(), start, None)
        return self._shown_from(self._good_frames(), seconds)

    def _seek(self, start: int, seconds: Fraction | None) -> Iterator[Timed] | None:
        """The same frames as by decoding all before; None where that is not certain."""
        target = self._time_of(start) if seconds is None else int(self._ticks(seconds))
        if target is None or self._origin is None:
            return None
        key = self._key_packet(target)
        if key is None or key.pts is None:
            return None
        begin, packets = key.pts, chain([key], self._container.demux(self._stream))
        frames = self._good_frames(packets)
        first = next(frames, None)
        # What is shown before the key frame but stored after it (an open group of pictures) may need frames before it:
        # decoders leave it out. One that does not, or cannot begin here, is not trusted.
        if first is None or first[0] != begin:
            return None
        frames = chain([first], frames)
        if seconds is not None:
            return self._shown_from(frames, seconds)
        first = next((timed for timed in frames if timed[0] >= target), None)
        return chain([first], frames) if first is not None and first[0] == target else None

    def _key_packet(self, target: int) -> av.Packet[Any] | None:
        """The last packet with a key frame shown at or before a time; the next to be read is the one that follows it."""
        wanted = target
        for _ in range(2):
            try:
                self._container.seek(wanted, stream=self._stream)
                packet = next(self._container.demux(self._stream))
            except (FFmpegError, StopIteration):
                return None
            if not packet.is_keyframe or packet.pts is None:
                return None
            if packet.pts <= target:
                return packet
            wanted = (packet.pts if packet.dts is None else packet.dts) - 1  # the table may go by the times of decoding
        return None

    def _time_of(self, number: int) -> int | None:
        """The time of a frame by its number, from the packets alone; None where these do not tell."""
        if self._stream.codec_context.name.removeprefix("lib") not in FRAME_IN_A_PACKET:
            return None
        begin: int | None = None
        times: list[int] = []
        try:
            for packet in self._container.demux(self._stream):
                if not packet.size or len(times) > number + REORDERED:
                    break
                if packet.pts is None or packet.is_corrupt:
                    return None
                if begin is None:
                    begin = packet.pts if packet.is_keyframe else None
                if begin is None or packet.pts < begin:  # cannot be decoded
                    return None
                if not packet.is_discard:
                    times.append(packet.pts)
        except FFmpegError:
            return None
        if number >= len(times) or len(set(times)) < len(times):
            return None
        return sorted(times)[number]

    def _shown_from(self, frames: Iterator[Timed], seconds: Fraction) -> Iterator[Timed]:
        """From the last frame at or before that time on, or from the first there is."""
        shown = None
        for timed in frames:
            if timed[0] > self._ticks(seconds):
                yield from (timed,) if shown is None else (shown, timed)
                yield from frames
                return
            shown = timed
        if shown is not None and self._ticks(seconds) < shown[0] + (shown[1].duration or self._interval):
            yield shown

    def _good_frames(self, packets: Iterator[av.Packet[Any]] | None = None) -> Iterator[Timed]:
        """packets: those from a key frame on, in place of all."""
        claimed = 0.0 if packets else self._claimed_frames()
        packets = packets or self._container.demux(self._stream)
        whole_packets, last = 0, None
        while self.damage is None:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                if packet.is_corrupt:
                    raise Undecodable("a packet is cut short")
                frames = packet.decode()
                if packet.size or packet.dts is not None:
                    whole_packets += 1
                elif whole_packets < claimed:
                    # The last, empty packet flushes the decoder. In a cut-off file, some of what it gives belongs after
                    # frames that were cut off.
                    raise Undecodable("the file ends before its header says")
            except (FFmpegError, Undecodable) as error:
                if last is not None:
                    self.damage = error.strerror if isinstance(error, FFmpegError) else str(error)
                continue
            for frame in frames:
                if frame.is_corrupt and last is not None:
                    self.damage = "a damaged frame"
                    return
                if not frame.is_corrupt:
                    last = self._time(frame, last)
                    yield last, frame

    def _time(self, frame: av.VideoFrame, last: int | None) -> int:
        """Counts on where a frame has no time, or one that is not later than the last."""
        time = frame.pts
        if time is None or (last is not None and time <= last):
            time = (self._origin or 0) if last is None else last + self._interval
        if self._origin is None:
            self._origin = time
        return time

    def _claimed_frames(self) -> float:
        """At least so many packets are there if the file is whole; 0 where its header does not say."""
        if self._stream.frames:
            return self._stream.frames
        # With a second stream, the sound may be what lasts that long.
        if self._container.duration is None or len(self._container.streams) > 1:
            return 0
        return 0.95 * self._container.duration / av.time_base * self.fps


def unlike(frame: av.VideoFrame) -> str:
    """What RGB of 8 bits would wash out, or show as a comb."""
    if frame.color_trc in HDR:
        return "HDR"
    return "interlaced" if frame.interlaced_frame else ""


@dataclass(frozen=True)
class Turn:
    """One of the eight ways in which a stored frame is shown: rows and columns swapped first, then mirrored."""

    swap: bool
    flip_rows: bool
    flip_columns: bool

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Turn:
        """From the display matrix (ISO/IEC 14496-12, 8.2.2): x shown = a·x + c·y, y shown = b·x + d·y, fixed point."""
        data: Any = frame.side_data.get("DISPLAYMATRIX")
        if data is None:
            return cls(False, False, False)
        a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, b < 0, c < 0)
        return cls(False, d < 0, a < 0)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """[H, W, 3] as stored -> [H, W, 3] as shown."""
        if self.swap:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
