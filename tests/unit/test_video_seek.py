"""Where a clip begins and which frames it shows: against decoding all that comes before."""

import tempfile
from bisect import bisect_right
from fractions import Fraction
from io import BytesIO
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipelines.video.files import Scaler, decode, iter_frames
from data_pipelines.video.reader import Undecodable, VideoReader
from data_pipelines.video.write import encode_image
from tests.clips import noise, numbered, read_number, video_bytes

FRAMES = 60
VARYING = [int(time) for time in np.cumsum(np.random.default_rng(0).integers(1, 9, FRAMES))]
X264, X265 = "keyint=12:min-keyint=12:scenecut=0:bframes=3", "keyint=12:min-keyint=12:bframes=3:log-level=none"


def encode(
    container: str,
    codec: str,
    options: dict[str, str],
    *,
    times: list[int] | None = None,
    base: Fraction = Fraction(1, 24),
    muxer: dict[str, str] | None = None,
    pictures: np.ndarray | None = None,
    rate: int = 24,
) -> bytes:
    """60 frames of `numbered` at `times` in units of `base` (24 a second)."""
    with (
        tempfile.NamedTemporaryFile() as file,
        av.open(file.name, "w", format=container, options=muxer or {}) as output,
    ):
        stream = output.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = 64, 96, "yuv420p", 1
        stream.codec_context.time_base = base
        for number, picture in enumerate(numbered(FRAMES) if pictures is None else pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        output.close()
        return Path(file.name).read_bytes()


def x264(more: str = "", container: str = "mp4", **settings: object) -> bytes:
    return encode(container, "libx264", {"x264-params": X264 + more}, **settings)


SOURCES = {
    "b frames": lambda: x264(":b-pyramid=normal"),
    "open groups": lambda: x264(":open-gop=1"),
    "fragments": lambda: x264(muxer={"movflags": "frag_keyframe+empty_moov"}),
    "varying rate": lambda: x264(times=VARYING, base=Fraction(1, 120)),
    "odd time base": lambda: x264(times=[1001 * n for n in range(FRAMES)], base=Fraction(1, 24001)),
    "matroska": lambda: x264(container="matroska"),
    "matroska, open groups": lambda: x264(":open-gop=1", "matroska"),
    "matroska, varying rate": lambda: x264(container="matroska", times=VARYING, base=Fraction(1, 120)),
    "hevc, open groups": lambda: encode("mp4", "libx265", {"x265-params": X265 + ":open-gop=1"}),
    "vp9": lambda: encode("webm", "libvpx-vp9", {"g": "12", "cpu-used": "8"}),
    # To be decoded from the beginning: no key frame to begin with, numbers that packets do not tell, no table, no times.
    "refreshed bit by bit": lambda: x264(":intra-refresh=1"),
    "cut by an edit list": lambda: x264(times=[n - 5 for n in range(FRAMES)], muxer={"avoid_negative_ts": "disabled"}),
    "vp8, by number": lambda: encode("webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    "mpeg-ts": lambda: x264(container="mpegts"),
    "avi, b frames": lambda: encode("avi", "mpeg4", {"g": "12", "bf": "2"}),
    "no times": lambda: x264(container="h264"),
}


@pytest.fixture
def seeks(monkeypatch):
    """Whether each that was asked for was made."""
    made: list[bool] = []
    seek = VideoReader._seek

    def spy(self, *where):
        frames = seek(self, *where)
        made.append(frames is not None)
        return frames

    monkeypatch.setattr(VideoReader, "_seek", spy)
    return made


def pixels(frame: av.VideoFrame) -> bytes:
    return frame.to_ndarray(format="yuv420p").tobytes()


@pytest.mark.parametrize("name", SOURCES)
def test_a_clip_is_the_same_as_by_decoding_all_before(name, seeks):
    source = SOURCES[name]()
    with VideoReader(source) as reader:
        times = [reader._first[0]]
        expected = [pixels(reader._first[1])]
        for time, frame in reader._frames:
            times.append(time)
            expected.append(pixels(frame))
        seconds = [(time - times[0]) * reader._tick for time in times]
        slack = max(reader._tick / 2 if reader._interval > 1 else 0, Fraction(1, 1000))
    length = FRAMES - 5 if "edit list" in name else FRAMES
    assert len(expected) == length
    for start in (1, 2, 11, 12, 13, 22, 23, 24, 25, 35, 47, length - 2, length - 1):
        with VideoReader(source, start=start) as reader:
            assert [pixels(frame) for frame in islice(reader, 5)] == expected[start : start + 5]
        for later in (Fraction(0), Fraction(1, 80)):
            shown = bisect_right(seconds, seconds[start] + later + slack) - 1
            with VideoReader(source, seconds=seconds[start] + later) as reader:
                assert [pixels(frame) for frame in islice(reader, 3)] == expected[shown : shown + 3]
    with pytest.raises(Undecodable, match=f"ends before frame {length}"):
        VideoReader(source, start=length)
    with pytest.raises(Undecodable, match="ends before second 100"):
        VideoReader(source, seconds=Fraction(100))
    sure = list(SOURCES).index(name) < list(SOURCES).index("refreshed bit by bit")
    assert all(seeks[:39]) if sure else not seeks or not all(seeks)


def test_a_late_clip_does_not_decode_what_comes_before(monkeypatch):
    source = x264()
    decoded = []
    count = VideoReader._time
    monkeypatch.setattr(VideoReader, "_time", lambda self, *rest: decoded.append(1) or count(self, *rest))
    for where in ({"start": 50}, {"seconds": 50 / 24}, {"start": 25, "fps": 12}):
        decoded.clear()
        clip = decode(source, **where, frames=4, height=64, width=96)
        assert read_number(clip[0]) == 50
        assert len(decoded) <= 2 + 8


@pytest.mark.parametrize("name", ["b frames", "matroska", "avi, b frames", "no times", "mpeg-ts", "odd time base"])
def test_frames_by_rate_are_the_last_at_or_before_each_time(name):
    source = SOURCES[name]()
    with VideoReader(source) as reader:
        rate = Fraction(reader.fps).limit_denominator(24001)
    for fps, frames in [
        (rate, 60),
        (rate / 3, 20),
        (rate / 2, 30),
        (Fraction(7), 17),
        (2 * rate, 119),
        (Fraction(10), 24),
    ]:
        wanted = [
            int(Fraction(k) / Fraction(float(fps)).limit_denominator(1001) * rate + rate / 1000) for k in range(frames)
        ]
        clip = decode(source, frames=frames, height=64, width=96, fps=float(fps))
        assert [read_number(frame) for frame in clip] == wanted
        later = decode(source, start=5, frames=frames - 5, height=64, width=96, fps=float(fps))
        assert (later == clip[5:]).all()
    clip = decode(source, seconds=1.0, frames=3, height=64, width=96, fps=float(rate / 4))
    assert [read_number(frame) for frame in clip] == [int(rate * 1.001) + 4 * k for k in range(3)]
    clip = decode(source, seconds=1.0, frames=3, height=64, width=96)
    assert [read_number(frame) for frame in clip] == [int(rate * 1.001) + k for k in range(3)]


def test_frames_by_rate_where_the_rate_varies():
    seconds = [Fraction(time - VARYING[0], 120) for time in VARYING]
    for name in ("varying rate", "matroska, varying rate"):
        source = SOURCES[name]()
        for fps in (6, 11, 24, 30):
            for start in (0, 13):
                count = int((seconds[-1] - Fraction(start, fps)) * fps) + 1
                clip = decode(source, start=start, frames=count, height=64, width=96, fps=fps)
                for k, frame in enumerate(clip):
                    time = Fraction(start + k, fps)  # up to 2 ms after it a frame may be counted in: times are rounded
                    first, last = (bisect_right(seconds, time + later) - 1 for later in (0, Fraction(2, 1000)))
                    assert first <= read_number(frame) <= last


def steady(source: bytes) -> tuple[list[int], float]:
    with VideoReader(source) as reader:
        scale = Scaler(reader, 64, 96)
        return [read_number(scale(frame)) for frame in reader.steadily()], reader.fps


@pytest.mark.parametrize(
    ("rate", "base"),
    [(240, Fraction(1, 1000)), (120, Fraction(1, 1000)), (30, Fraction(1, 1000)), (24, Fraction(1, 60))],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_rounded_times_are_steady(container, rate, base):
    """As 8, 8 and 9 milliseconds at 120 frames a second, or two and three fields at 24."""
    times = [round(Fraction(number, rate) / base) for number in range(FRAMES)]
    assert steady(x264(container=container, times=times, base=base, rate=rate))[0] == list(range(FRAMES))


def numbers_of(source: bytes) -> list[int]:
    with VideoReader(source) as reader:
        scale = Scaler(reader, 64, 96)
        return [read_number(scale(frame)) for frame in reader]


@pytest.mark.parametrize("name", [name for name in SOURCES if "varying" not in name])
def test_steady_videos_keep_their_frames(name):
    source = SOURCES[name]()
    assert steady(source)[0] == numbers_of(source)


def test_a_named_rate_that_is_a_little_off_costs_no_frame():
    source = x264(container="matroska", times=[97 * number for number in range(FRAMES)], base=Fraction(1, 2400))
    assert steady(source) == (list(range(FRAMES)), 24.0)  # of 24.74


@pytest.mark.parametrize("name", ["varying rate", "matroska, varying rate"])
def test_a_varying_rate_is_made_steady(name):
    numbers, fps = steady(SOURCES[name]())
    seconds = [(time - VARYING[0]) / 120 for time in VARYING]
    assert len(set(numbers)) < len(numbers)  # some come again
    assert set(numbers) < set(range(FRAMES))  # some are left out
    assert numbers == sorted(numbers)
    for place, number in enumerate(numbers):  # half a frame, and what frames about one apart may add up to
        assert seconds[number] - 0.75 / fps < place / fps < seconds[min(number + 1, FRAMES - 1)] + 0.75 / fps


def test_a_jump_of_the_clock_is_not_filled():
    times = [number + 24_000 * (number >= 30) for number in range(FRAMES)]
    source = x264(container="matroska", times=times)
    assert steady(source)[0] == numbers_of(source)


def test_a_video_ends_with_its_last_frame():
    source = video_bytes(numbered(40))
    assert len(decode(source, frames=20, height=64, width=96, fps=12)) == 20
    with pytest.raises(Undecodable, match="20 of 21 from frame 0"):
        decode(source, frames=21, height=64, width=96, fps=12)
    with pytest.raises(Undecodable, match=r"1 of 2 from second 1\.65"):
        decode(source, seconds=1.65, frames=2, height=64, width=96)
    with pytest.raises(Undecodable, match="ends before"):
        decode(source, seconds=1.7, frames=1, height=64, width=96)


def test_frames_come_one_by_one():
    frames = iter_frames(video_bytes(numbered(10)), start=4, frames=1_000_000, height=64, width=96)
    assert [read_number(frame) for frame in islice(frames, 6)] == [4, 5, 6, 7, 8, 9]
    with pytest.raises(Undecodable, match="6 of 1000000 from frame 4"):
        next(frames)


def test_an_image_has_no_later_frames(tmp_path):
    encode_image(numbered(1)[0], tmp_path / "one.jpg")
    assert decode(tmp_path / "one.jpg", frames=1, height=32, width=32, fps=8).shape == (1, 32, 32, 3)
    for where in ({"start": 1}, {"seconds": 0.5}):
        with pytest.raises(Undecodable, match="one frame"):
            decode(tmp_path / "one.jpg", **where, frames=1, height=32, width=32)


def test_damage_before_a_clip_is_no_matter_and_in_it_ends_it():
    whole = x264(pictures=noise(FRAMES), muxer={"movflags": "faststart"})
    expected = decode(whole, start=30, frames=20, height=64, width=96)
    with av.open(BytesIO(whole)) as container:
        places = {packet.pts: (packet.pos, packet.size) for packet in container.demux(video=0) if packet.size}
    ordered = [places[time] for time in sorted(places)]

    def damaged(number: int) -> bytes:
        at, size = ordered[number]
        return whole[: at + size // 2] + b"\xff" * (size // 2) + whole[at + size // 2 + size // 2 :]

    assert (decode(damaged(12), start=30, frames=20, height=64, width=96) == expected).all()
    with pytest.raises(Undecodable, match="of 20 from frame 30"):
        decode(damaged(36), start=30, frames=20, height=64, width=96)
