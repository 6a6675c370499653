import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from data_pipelines.video.files import decode, probe
from data_pipelines.video.reader import Undecodable, VideoReader
from data_pipelines.video.write import contact_sheet, encode_gif, encode_image, encode_mp4
from tests.clips import corner_colours, noise, numbered, quadrants, read_number, video_bytes


def jpeg(picture: np.ndarray, **options: object) -> bytes:
    target = io.BytesIO()
    Image.fromarray(picture).save(target, "JPEG", quality=95, **options)
    return target.getvalue()


@pytest.mark.parametrize(
    "container, codec", [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4"), ("webm", "vp9")]
)
def test_the_frames_asked_for_are_the_frames_given(container, codec):
    source = video_bytes(numbered(40), container=container, codec=codec)
    info = probe(source)
    assert (info.kind, info.frames, info.height, info.width) == ("video", 40, 64, 96)
    assert info.fps == pytest.approx(24)
    clip = decode(source, start=13, frames=9, height=64, width=96)
    assert clip.shape == (9, 64, 96, 3)
    assert clip.dtype == np.uint8
    assert [read_number(frame) for frame in clip] == list(range(13, 22))


def test_a_path_and_its_bytes_are_the_same(tmp_path):
    path = tmp_path / "odd: name%20#.mp4"
    path.write_bytes(video_bytes(numbered(5)))
    assert probe(path) == probe(path.read_bytes())
    assert (
        decode(path, frames=5, height=32, width=48) == decode(path.read_bytes(), frames=5, height=32, width=48)
    ).all()


def test_too_few_frames():
    source = video_bytes(numbered(10))
    assert len(decode(source, start=4, frames=6, height=32, width=32)) == 6
    with pytest.raises(Undecodable, match="5 of 6 from frame 5"):
        decode(source, start=5, frames=6, height=32, width=32)


@pytest.mark.parametrize(
    "rotation, mirrored, size, colours",
    [
        (0, False, (64, 96), "rgbw"),
        (90, False, (96, 64), "gwrb"),  # a quarter turn counter-clockwise: what was top left is now bottom left
        (180, False, (64, 96), "wbgr"),
        (-90, False, (96, 64), "brwg"),
        (0, True, (64, 96), "grwb"),
        (90, True, (96, 64), "wgbr"),
        (-90, True, (96, 64), "rbgw"),
    ],
)
def test_rotation_and_mirroring_are_shown(rotation, mirrored, size, colours):
    source = video_bytes(quadrants(), rotation=rotation, mirrored=mirrored)
    info = probe(source)
    assert (info.height, info.width) == size
    assert corner_colours(decode(source, frames=1, height=size[0], width=size[1])[0]) == colours


def test_pixels_are_made_square():
    clip = np.zeros((3, 64, 64, 3), np.uint8)
    clip[:, 16:48, 24:40] = 255  # 32 high, 16 wide as stored; square when a pixel is twice as wide as high
    source = video_bytes(clip, pixel_aspect=Fraction(2, 1))
    info = probe(source)
    assert (info.height, info.width) == (64, 128)
    shown = decode(source, frames=1, height=64, width=128)[0, ..., 1] > 127
    assert abs(int(shown.any(1).sum()) - 32) <= 1
    assert abs(int(shown.any(0).sum()) - 32) <= 1
    turned = probe(video_bytes(clip, pixel_aspect=Fraction(2, 1), rotation=90))
    assert (turned.height, turned.width) == (128, 64)


def test_resize_covers_and_crops_the_centre():
    clip = np.zeros((2, 64, 128, 3), np.uint8)
    clip[:, :, 32:96] = 255  # the centre square
    square = decode(video_bytes(clip), frames=1, height=32, width=32)[0]
    assert square[:, 1:-1].min() > 200
    tall = decode(video_bytes(quadrants(2)), frames=1, height=96, width=32)[0]
    assert tall.shape == (96, 32, 3)
    assert corner_colours(tall) == "rgbw"


def test_a_truncated_video_yields_its_beginning():
    whole = video_bytes(noise(48))
    with VideoReader(whole) as reader:
        assert sum(1 for _ in reader) == 48
        assert reader.damage is None
    for container, codec in [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4")]:
        whole = video_bytes(noise(48), container=container, codec=codec)
        expected = decode(whole, frames=48, height=64, width=96)
        with VideoReader(whole[: len(whole) * 2 // 3]) as reader:
            count = sum(1 for _ in reader)
            assert reader.damage, container
        assert 16 <= count < 48, container
        assert (decode(whole[: len(whole) * 2 // 3], frames=count, height=64, width=96) == expected[:count]).all()


@pytest.mark.parametrize("length", [16, 2000])  # what the decoder conceals, and what it gives up on
def test_a_damaged_frame_ends_the_video(length):
    whole = video_bytes(noise(48))
    expected = decode(whole, frames=48, height=64, width=96)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + length] = b"\xff" * length
    with VideoReader(bytes(damaged)) as reader:
        count = sum(1 for _ in reader)
        assert reader.damage
    assert 8 <= count < 48
    assert (decode(bytes(damaged), frames=count, height=64, width=96) == expected[:count]).all()


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"not a video at all" * 50,
        video_bytes(numbered(4))[:200],
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/hosts\n",
        jpeg(numbered(1)[0])[:300],
        b"\x89PNG\r\n\x1a\n" + bytes(40),
    ],
)
def test_undecodable(source):
    with pytest.raises(Undecodable) as caught:
        probe(source)
    assert "\n" not in str(caught.value)
    with pytest.raises(Undecodable):
        decode(source, frames=1, height=16, width=16)


def test_titles_in_other_encodings_and_unknown_codecs():
    source = video_bytes(numbered(5))
    assert probe(source.replace(b"VideoHandler", b"Vid\xe9oHandler")).frames == 5
    with pytest.raises(Undecodable, match="no decoder"):
        probe(source.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzz"))


def test_a_file_cannot_make_another_one_be_opened(tmp_path):
    (tmp_path / "secret.mp4").write_bytes(video_bytes(numbered(5)))
    (tmp_path / "secret.ts").write_bytes(video_bytes(numbered(5), container="mpegts"))
    for text in (
        "ffconcat version 1.0\nfile secret.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n",
    ):
        (tmp_path / "clip.mp4").write_text(text)
        with pytest.raises(Undecodable):
            probe(tmp_path / "clip.mp4")


def test_sound_alone_is_no_video():
    header = b"RIFF" + struct.pack("<I", 36 + 8000) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
    with pytest.raises(Undecodable):
        probe(header + b"data" + struct.pack("<I", 8000) + bytes(8000))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_absurd_sizes_are_refused_before_decoding():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for height, width in [(64, 20000), (12000, 12000), (30000, 30000)]:
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        bomb += chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        with pytest.raises(Undecodable, match=r"pixels|exceeds"):
            probe(bomb)
    source = bytearray(video_bytes(numbered(3), codec="ffv1", container="avi"))
    at = source.index(b"strf") + 8 + 4  # biWidth, biHeight of BITMAPINFOHEADER
    assert struct.unpack("<ii", source[at : at + 8]) == (96, 64)
    source[at : at + 8] = struct.pack("<ii", 30000, 16)
    with pytest.raises(Undecodable, match="pixels"):
        probe(bytes(source))


def test_images(tmp_path):
    picture = quadrants(1)[0]
    assert probe(jpeg(picture)) == probe(jpeg(picture))
    info = probe(jpeg(picture))
    assert (info.kind, info.frames, info.fps, info.height, info.width) == ("image", 1, 0.0, 64, 96)
    clip = decode(jpeg(picture), frames=1, height=32, width=48)
    assert clip.shape == (1, 32, 48, 3)
    assert corner_colours(clip[0]) == "rgbw"
    with pytest.raises(Undecodable):
        decode(jpeg(picture), frames=2, height=32, width=48)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = jpeg(picture, exif=exif)
    assert (probe(turned).height, probe(turned).width) == (96, 64)
    assert corner_colours(decode(turned, frames=1, height=96, width=64)[0]) == "brwg"
    for suffix in (".png", ".webp"):
        path = tmp_path / f"picture{suffix}"
        Image.fromarray(picture).save(path)
        assert corner_colours(decode(path, frames=1, height=64, width=96)[0]) == "rgbw"
    clear = np.dstack([picture, np.zeros(picture.shape[:2], np.uint8)])
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", frames=1, height=64, width=96).min() == 255
    encode_image(picture, tmp_path / "out.jpg")
    assert np.abs(decode(tmp_path / "out.jpg", frames=1, height=64, width=96)[0].astype(int) - picture).mean() < 4


def test_grey_pictures_of_16_bits_keep_their_greys(tmp_path):
    grey = np.arange(0, 65_536, 1024, dtype=np.uint16).repeat(96).reshape(64, 96)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    found = decode(tmp_path / "grey.png", frames=1, height=64, width=96)[0]
    assert np.array_equal(found, (grey >> 8).astype(np.uint8)[..., None].repeat(3, 2))
    Image.fromarray(grey).save(tmp_path / "clear.png", transparency=1024)
    found = decode(tmp_path / "clear.png", frames=1, height=64, width=96)[0]
    assert found[:, 0, 0].tolist() == [0, 255, *range(8, 256, 4)]


@pytest.mark.parametrize("height, matrix", [(718, "smpte170m"), (720, "bt709")])
def test_frames_that_do_not_name_their_matrix_are_taken_by_their_size(height, matrix):
    clip = np.full((2, height, 32, 3), (200, 40, 90), np.uint8)
    plain, named, other = (
        decode(video_bytes(clip, settings=settings), frames=2, height=height, width=32).astype(int)
        for settings in ({}, {"colorspace": matrix}, {"colorspace": {"smpte170m": "bt709"}.get(matrix, "smpte170m")})
    )
    assert np.array_equal(plain, named)
    assert np.abs(plain - other).mean() > 5


def test_encode_mp4_keeps_colours_and_frames_and_gives_the_same_bytes(tmp_path):
    colours = [(200, 40, 40), (40, 180, 60), (30, 60, 200), (128, 128, 128), (250, 240, 20)]
    clip = np.stack([np.full((48, 64, 3), colour, np.uint8) for colour in colours])
    target = io.BytesIO()
    encode_mp4(clip, 30000 / 1001, target)
    encode_mp4(clip, 30000 / 1001, tmp_path / "clip.mp4")
    assert (tmp_path / "clip.mp4").read_bytes() == target.getvalue()
    info = probe(target.getvalue())
    assert (info.frames, info.height, info.width) == (5, 48, 64)
    assert info.fps == pytest.approx(29.97, abs=0.001)
    assert np.abs(decode(target.getvalue(), frames=5, height=48, width=64).astype(int) - clip).max() <= 4
    moving = numbered(30)
    target = io.BytesIO()
    encode_mp4(moving, 24, target)
    assert [read_number(frame) for frame in decode(target.getvalue(), frames=30, height=64, width=96)] == list(
        range(30)
    )
    with pytest.raises(ValueError, match="even"):
        encode_mp4(clip[:, :47], 24, io.BytesIO())


def test_encode_mp4_gives_the_same_bytes_whatever_memory_held_before():
    clip, generator, found = noise(20), np.random.default_rng(0), set()
    for _ in range(40):
        junk = [generator.integers(0, 255, generator.integers(1, 100_000), np.uint8) for _ in range(10)]
        target = io.BytesIO()
        encode_mp4(clip, 24, target)
        found.add(target.getvalue())
        del junk
    assert len(found) == 1


def test_contact_sheet(tmp_path):
    videos = [numbered(30, 64, 96), quadrants(1, 320, 160)]
    contact_sheet(videos, ["thirty frames", "one tall picture " * 20], tmp_path / "sheet.png", columns=5)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.format == "PNG"
    assert sheet.size == (8 + 5 * (240 + 8), 8 + 2 * (160 + 22 + 8))
    pixels = np.asarray(sheet)
    shown = [read_number(pixels[8:168, 8 + 248 * column : 248 + 248 * column]) for column in range(5)]
    assert shown == [0, 7, 14, 22, 29]
    assert corner_colours(pixels[198:358, 8:88]) == "rgbw"
    captions = [pixels[top : top + 22].max(-1) for top in (168, 358)]
    assert all((caption > 150).sum() > 100 for caption in captions)
    assert captions[1][:, -8:].max() < 60  # the long one is cut before the margin


def test_encode_gif():
    gif = Image.open(io.BytesIO(encode_gif(numbered(12), fps=10)))
    assert (gif.format, gif.n_frames, gif.size, gif.info["duration"]) == ("GIF", 12, (96, 64), 100)
    gif.seek(7)
    assert read_number(np.asarray(gif.convert("RGB"))) == 7
