"""What hostile files cost, and that decoding leaks nothing."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.video.files import decode, probe
from data_pipelines.video.reader import Undecodable
from data_pipelines.workers import WorkerPool
from tests.clips import noise, numbered, video_bytes

ROOT = Path(__file__).parents[2]
# Prints what each file gives, or why it is refused, under a limit of memory; then the peak in MiB beyond what importing takes.
CHILD = """
import resource, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
from data_pipelines.video.files import decode, probe
from data_pipelines.video.reader import Undecodable
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
before = peak()
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
for path in map(Path, sys.argv[2:]):
    for what in (probe, lambda path: decode(path, start=100_000, frames=1_000_000, height=256, width=256)):
        try:
            print(path.name, what(path))
        except Undecodable as error:
            print(path.name, "refused:", error)
print(peak() - before)
"""


def png(height: int, width: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def jpeg(height: int, width: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (16, 16)).save(target, "JPEG")
    content = bytearray(target.getvalue())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def claiming(frames: int, size: int = 0) -> bytes:
    """An mp4 of 40 frames whose tables claim more: all of one size, one duration, in one chunk."""
    content = bytearray(video_bytes(numbered(40)))

    def put(box: bytes, at: int, number: int) -> None:
        at += content.index(box) + 4
        content[at : at + 4] = struct.pack(">I", number)

    put(b"stsz", 4, size or struct.unpack(">I", content[content.index(b"stsz") + 16 :][:4])[0])
    for box, at in ((b"stsz", 8), (b"stts", 8), (b"stsc", 12)):
        put(box, at, frames)
    for box in (b"ctts", b"stss", b"edts"):
        if box in content:
            content[content.index(box) :][:4] = b"free"
    return bytes(content)


def test_hostile_headers_are_refused_in_little_memory(tmp_path):
    files = {
        "large.png": png(100_000, 100_000),
        "long.png": png(10, 100_000),
        "large.jpg": jpeg(65_500, 65_500),
        "million.mp4": claiming(1_000_000),
        "billions.mp4": claiming(4_000_000_000, size=1),
        "padded.mp4": claiming(1_000_000) + bytes(1_100_000),  # there may be so many
        "wide.avi": wide_avi(100_000, 100_000),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    arguments = [str(ROOT), *(str(tmp_path / name) for name in files)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    *lines, peak = done.stdout.splitlines()
    assert len(lines) == 2 * len(files)
    assert all("refused:" in line for line in lines)
    assert "claims 1000000 samples in" in done.stdout
    assert int(peak) < 200  # MiB, of which the index of a million frames that there may be takes 35


def wide_avi(height: int, width: int) -> bytes:
    content = bytearray(video_bytes(numbered(3), codec="ffv1", container="avi"))
    at = content.index(b"strf") + 8 + 4
    content[at : at + 8] = struct.pack("<ii", width, height)
    return bytes(content)


def test_fewer_frames_than_claimed_cost_no_more_than_those(tmp_path):
    """A caller that believes an index asks for as many as it says; nothing is set aside for them before the first is there."""
    with pytest.raises(Undecodable):
        decode(video_bytes(numbered(3)), start=5, frames=1 << 40, height=4096, width=4096)


def samples() -> list[bytes]:
    """Whole, cut-off and damaged ones of several containers, and an image."""
    whole = video_bytes(noise(8))
    damaged = bytearray(whole)
    damaged[len(whole) // 2 :][:400] = b"\xff" * 400
    picture = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(picture, "JPEG")
    others = [video_bytes(noise(8), container=c, codec=v) for c, v in (("matroska", "libx264"), ("avi", "mpeg4"))]
    return [whole, *others, whole[: len(whole) * 2 // 3], bytes(damaged), picture.getvalue(), b"nothing at all"]


def decode_all(sources: list[bytes], count: int) -> int:
    """Decodes `count` samples in some of all ways; the peak memory of this process so far, in KiB."""
    for number in range(count):
        source = sources[number % len(sources)]
        where = ({}, {"start": 5}, {"seconds": 0.2}, {"fps": 12.0})[number // len(sources) % 4]
        try:
            decode(source, frames=1 + number % 3, height=48, width=(48, 72)[number % 2], **where)
            if number % 11 == 0:
                probe(source)
        except Undecodable:
            pass
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize(
    "early, late", [(1500, 3000), pytest.param(2000, 10_000, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_peak_memory_of_a_worker_does_not_grow(early, late):
    with WorkerPool(1) as pool:
        before = pool.submit(decode_all, samples(), early).result()
        after = pool.submit(decode_all, samples(), late - early).result()
    assert after - before < 8000  # KiB: a leaked frame of these is 9 KiB, a leaked decoder some hundred
