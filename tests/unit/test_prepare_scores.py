"""Each measure against a closed form, FFmpeg's own filters or SciPy; each limit on a clip made for it."""

import json
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest
import torch

from data_pipelines.errors import DataError
from data_pipelines.prepare.clip_scores import (
    Scorer,
    black_share,
    motion,
    out_of_limits,
    perceptual_hash,
    sharpness,
    static_share,
)
from data_pipelines.prepare.duplicates import COLOUR_DISTANCE, find_duplicates
from data_pipelines.prepare.run import PrepareConfig, prepare
from data_pipelines.shards.tars import ShardSet
from data_pipelines.video.write import encode_mp4
from tests.clips import noise, write_clip


def marked_by_ffmpeg(grey: np.ndarray, name: str, options: str) -> list[tuple[float, float]]:
    """The spans in seconds that a filter of FFmpeg finds in uint8 [T, H, W] at one frame a second."""
    graph = av.filter.Graph()
    height, width = grey.shape[1:]
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("gray"), time_base=Fraction(1))
    detector, sink = graph.add(name, options), graph.add("buffersink")
    source.link_to(detector)
    detector.link_to(sink)
    graph.configure()
    begins, ends = [], []
    for t, picture in enumerate(grey):
        frame = av.VideoFrame.from_ndarray(picture, format="gray")
        frame.pts, frame.time_base = t, Fraction(1)
        graph.push(frame)
        found = graph.pull().metadata
        begins += [float(value) for key, value in found.items() if key.endswith("_start")]
        ends += [float(value) for key, value in found.items() if key.endswith("_end")]
    return list(zip(begins, [*ends, len(grey)], strict=False))


def test_black_is_what_blackdetect_calls_black() -> None:
    rng = np.random.default_rng(0)
    grey = np.full((9, 40, 50), 120, np.uint8)
    grey[2:6] = rng.integers(0, 26, (4, 40, 50))
    grey[3, :, 0] = 200  # 2 %
    grey[6, :, :2] = 26  # 4 % just above the level, the rest black
    grey[6, :, 2:] = 0
    assert black_share(grey) == pytest.approx(4 / 9)
    # It looks at luma from 16 on where the range is not full; gray is full.
    spans = marked_by_ffmpeg(grey, "blackdetect", "d=0:pix_th=0.1:pic_th=0.98")
    assert sum(end - start for start, end in spans) == 4


def test_static_is_what_freezedetect_calls_frozen() -> None:
    rng = np.random.default_rng(0)
    # 64 wide: FFmpeg's sums take whole vectors of the machine, and beyond a row lies what was there before.
    grey = rng.integers(0, 200, (12, 40, 64)).astype(np.uint8)
    for t in (4, 5, 6, 7):
        grey[t] = grey[3]
        grey[t, :, :12] += np.uint8(t % 2)  # a mean change of 0.19 of 255, below a thousandth
    grey[10] = grey[9]
    grey[10, :, :26] += 1  # 0.4: above
    assert static_share(grey) == pytest.approx(4 / 11)
    spans = marked_by_ffmpeg(grey, "freezedetect", "n=0.001:d=1.5")
    assert spans == [(3.0, 8.0)]
    assert static_share(grey[:1]) == 1.0


@pytest.mark.parametrize("speed", [0, 1, 2, -3])
def test_motion_is_the_speed_of_a_slope(speed: int) -> None:
    place = np.arange(48)[None, None, :] - speed * np.arange(5)[:, None, None]
    grey = (60 + 3 * place + np.zeros((1, 20, 1))).astype(np.uint8)
    assert motion(grey, 24.0) == pytest.approx(abs(speed) * 24 / 48)
    assert motion(grey // 2 * 0 + 7, 24.0) == 0.0


def test_motion_does_not_depend_on_contrast() -> None:
    wave = np.sin((np.arange(64)[None, None] - 0.5 * np.arange(8)[:, None, None]) * 2 * np.pi / 32)
    strong, weak = ((128 + a * wave + np.zeros((1, 30, 1))).round().astype(np.uint8) for a in (100, 50))
    assert motion(strong, 30.0) == pytest.approx(0.5 * 30 / 64, rel=0.03)
    assert motion(weak, 30.0) == pytest.approx(motion(strong, 30.0), rel=0.05)


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    rows, columns = np.mgrid[:21, :32]
    assert sharpness((3 * rows + 4 * columns).astype(np.uint8)) == 0.0  # a slope has no second derivative
    board = (rows[:20] + columns[:20]) % 2 * 10
    assert sharpness(board.astype(np.uint8)) == pytest.approx((4 * 10) ** 2)
    ndimage = pytest.importorskip("scipy.ndimage")
    grey = np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.uint8)
    assert sharpness(grey) == pytest.approx(ndimage.laplace(grey.astype(float))[1:-1, 1:-1].var())


def test_the_hash_is_the_signs_of_the_cosine_transform() -> None:
    fft = pytest.importorskip("scipy.fft")
    grey = np.random.default_rng(1).integers(0, 256, (36, 64)).astype(np.uint8)
    signs = (fft.dctn(grey.astype(float))[:8, :8].ravel()[1:] > 0).astype(int)
    assert perceptual_hash(grey) == sum(int(sign) << place for place, sign in enumerate(signs))
    assert perceptual_hash(np.full((36, 64), 90, np.uint8)) == 0
    assert (perceptual_hash(grey // 2 + 40) ^ perceptual_hash(grey)).bit_count() <= 2  # darker and paler


def greedy(signatures: np.ndarray, distance: int) -> list[int]:
    """What `find_duplicates` promises, by comparing everything with everything that is kept."""
    original: list[int] = []
    for i, mine in enumerate(signatures.tolist()):
        repeats = -1
        for j, other in enumerate(signatures[:i].tolist()):
            bits = sum((a ^ b).bit_count() for a, b in zip(mine[:4], other[:4], strict=True))
            far = any(abs((mine[4] >> s & 255) - (other[4] >> s & 255)) > COLOUR_DISTANCE for s in (0, 8, 16))
            flat = not any(mine[:4]) or not any(other[:4])
            if original[j] < 0 and (mine == other or (bits <= distance and not far and not flat)):
                repeats = j
                break
        original.append(repeats)
    return original


@pytest.mark.parametrize("distance", [0, 1, 6, 20, 64])
def test_duplicates_are_those_of_comparing_everything(distance: int) -> None:
    rng = np.random.default_rng(distance)
    rows = []
    for _ in range(40):
        base = [int(rng.integers(0, 1 << 63)) for _ in range(4)]
        colour = [int(c) for c in rng.integers(0, 256, 3)]
        for _ in range(int(rng.integers(1, 6))):
            near = list(base)
            for _ in range(int(rng.integers(0, distance + 3))):
                near[rng.integers(0, 4)] ^= 1 << int(rng.integers(0, 63))
            shade = [min(255, max(0, c + int(rng.choice([0, 0, 5, 31, 40])))) for c in colour]
            rows.append([*near, shade[0] << 16 | shade[1] << 8 | shade[2]])
    rows += [[0, 0, 0, 0, 0x102030], [0, 0, 0, 0, 0x102031], [0, 0, 0, 0, 0x102030]]
    rows += rows[:9]
    signatures = np.array([rows[i] for i in rng.permutation(len(rows))], np.uint64)
    found = find_duplicates(signatures, distance).tolist()
    kept = {i for i, original in enumerate(found) if original < 0}
    assert kept == {i for i, original in enumerate(greedy(signatures, distance)) if original < 0}
    assert len(kept) < len(signatures)
    assert all(original in kept and original < i for i, original in enumerate(found) if original >= 0)
    assert find_duplicates(signatures, -1).max() == -1


def test_many_clips_are_compared_in_seconds() -> None:
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 1 << 63, (200_000, 5), dtype=np.uint64)
    signatures[:, 4] = 0x808080
    signatures[150_000:] = signatures[:50_000]
    signatures[150_000:, 0] ^= np.uint64(0b10101)
    found = find_duplicates(signatures, 6)
    assert found[150_000:].tolist() == list(range(50_000))
    assert found[:150_000].max() == -1


def test_many_clips_that_are_all_alike_take_little_memory() -> None:
    rng = np.random.default_rng(0)
    signatures = np.full((200, 5), 0x123456789ABCDEF, np.uint64)
    for row in signatures:  # any two differ in four bits at most, and agree in 13 of 17 groups of bits
        for _ in range(2):
            row[rng.integers(0, 4)] ^= np.uint64(1 << int(rng.integers(0, 63)))
    tracemalloc.start()
    try:
        found = find_duplicates(signatures, 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.tolist() == [-1, *[0] * 199]
    assert peak < 8 << 20


def test_limits_are_looked_at_in_order() -> None:
    limits = PrepareConfig(keep={"motion": (0.1, 2.0), "side": (200, None)}).limits
    assert out_of_limits({"motion": 0.05, "side": 100.0}, limits) == "side too low"
    assert out_of_limits({"motion": 0.05, "side": 200.0}, limits) == "motion too low"
    assert out_of_limits({"motion": 2.5}, limits) == "motion too high"
    assert out_of_limits({"motion": 2.0, "black": 0.9}, limits) is None
    assert out_of_limits({"black": 0.95}, limits) == "black too high"


# --- through prepare -------------------------------------------------------------------------------------------------


def run(source: Path, output: Path, **options: object) -> tuple[dict, ShardSet]:
    config = PrepareConfig(input=str(source), output=str(output), shot_threshold=250.0, **options)
    return prepare(config, lambda *_: None), ShardSet.open(output)


def test_every_limit_drops_what_it_should_and_scores_are_in_the_index(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = tmp_path / "in"
    moving = np.stack([np.roll(noise(1, seed=3)[0], 3 * t, 1) for t in range(24)])
    black = moving * (np.arange(24) < 2)[:, None, None, None].astype(np.uint8)
    blurred = np.full_like(moving, 128)
    blurred[..., 0] = (np.arange(96) * 2 + np.arange(24)[:, None] * 3)[:, None, :] % 256 // 4 + 60
    write_clip(source / "good.mp4", moving, "good")
    write_clip(source / "aspect.mp4", rng.permutation(moving.transpose(0, 2, 1, 3)), "tall")
    write_clip(source / "black.mp4", black, "black")
    write_clip(source / "blurred.mp4", blurred, "no edges")
    write_clip(source / "fps.mp4", moving[::-1], "slow", fps=10)
    write_clip(source / "seconds.mp4", moving[:18, ::-1], "brief")
    write_clip(source / "side.mp4", moving[:, :32, :48], "small")
    write_clip(source / "static.mp4", np.repeat(noise(1, seed=4), 24, 0), "a still")
    write_clip(source / "motion.mp4", noise(24, seed=5), "wild")
    keep = {
        "aspect": (1.0, 2.0), "black": (None, 0.5), "sharpness": (40, None), "fps": (12, None), "seconds": (0.8, 2.0),
        "side": (48, None), "static": (None, 0.5), "motion": (None, 0.6),
    }  # fmt: skip
    report, shards = run(source, tmp_path / "out", keep=keep)
    wanted = {"aspect": "low", "black": "high", "fps": "low", "motion": "high", "seconds": "low", "side": "low"}
    wanted |= {"sharpness": "low", "static": "high"}
    assert report["dropped"] == {f"{name} too {way}": 1 for name, way in wanted.items()}
    assert {reason.split()[0]: names[0].split(".")[0] for reason, names in report["examples"].items()} == {
        name: "blurred" if name == "sharpness" else name for name in wanted
    }
    assert [shards.key(i) for i in range(len(shards))] == ["good-000000"]
    scores = json.loads(shards.read(0)["json"])["scores"]
    assert shards.row(0).scores == pytest.approx(scores)
    assert sorted(scores) == sorted(keep)
    assert (scores["side"], scores["aspect"], scores["fps"], scores["seconds"]) == (64, 1.5, 24, 1.0)
    assert scores["motion"] == pytest.approx(3 / 96 * 24 / 2, rel=0.2)  # half its edges are level


def test_the_same_clip_again_is_dropped_whatever_its_codec_and_size(tmp_path: Path) -> None:
    source = tmp_path / "in"
    clips = [np.stack([np.roll(noise(1, 128, 192, seed)[0], 2 * t, 1) for t in range(24)]) for seed in range(3)]
    for number, clip in enumerate(clips):
        write_clip(source / f"b{number}.mp4", clip, f"clip {number}")
    encode_mp4(clips[1][:, ::2, ::2], 24, source / "a-small-one.mp4", crf=30)
    encode_mp4((clips[2] * 0.9).astype(np.uint8), 24, source / "c.mp4", crf=32)
    for name in ("a-small-one", "c"):
        (source / f"{name}.txt").write_text("again")
    report, shards = run(source, tmp_path / "out", part_files=1)
    assert report["dropped"] == {"duplicate": 2}
    assert report["examples"]["duplicate"] == [
        "b1.mp4 at frame 0 (as a-small-one.mp4 at frame 0)", "c.mp4 at frame 0 (as b2.mp4 at frame 0)"
    ]  # fmt: skip
    assert [shards.key(i) for i in range(3)] == ["a-small-one-000000", "b0-000000", "b2-000000"]
    assert run(source, tmp_path / "all", duplicates=-1)[0]["kept"] == 5


class Brightness(torch.nn.Module):
    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.mean(dim=(1, 2, 3))


def test_a_model_of_ones_own_scores_and_drops(tmp_path: Path) -> None:
    model = tmp_path / "brightness.pt"
    torch.jit.script(Brightness()).save(str(model))
    write_clip(tmp_path / "in" / "dark.mp4", noise(20, seed=1) // 8, "dark")
    light = noise(20, seed=2) // 2 + 120
    write_clip(tmp_path / "in" / "light.mp4", light, "light")
    options = {"scorers": {"brightness": str(model)}, "keep": {"brightness": (0.3, None)}}
    report, shards = run(tmp_path / "in", tmp_path / "out", **options)
    assert report["dropped"] == {"brightness too low": 1}
    assert shards.row(0).scores["brightness"] == pytest.approx(light.mean() / 255, abs=0.02)
    (tmp_path / "copy.pt").write_bytes(model.read_bytes())
    options["scorers"] = {"brightness": str(tmp_path / "copy.pt")}
    assert run(tmp_path / "in", tmp_path / "out", **options)[0]["already_done"] is True
    model.write_bytes(b"another")
    options["scorers"] = {"brightness": str(model)}
    with pytest.raises(DataError, match="made from something else"):
        run(tmp_path / "in", tmp_path / "out", **options)
    with pytest.raises(DataError, match=r"prepare\.scorers\.brightness="):
        run(tmp_path / "in", tmp_path / "new", **options)
    with pytest.raises(DataError, match=r"prepare\.scorers\.brightness=nowhere\.pt: No such file"):
        run(tmp_path / "in", tmp_path / "new", scorers={"brightness": "nowhere.pt"})


class Nothing(torch.nn.Module):
    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.mean() * float("nan")


def test_a_model_that_gives_no_number_is_named(tmp_path: Path) -> None:
    model = tmp_path / "nothing.pt"
    torch.jit.script(Nothing()).save(str(model))
    with pytest.raises(DataError, match="gives nan"):
        Scorer("nothing", str(model))(noise(2))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"keep": {"motoin": (0, 1)}}, r"keep\.motoin: unknown score; did you mean motion"),
        ({"keep": {"motion": (2, 1)}}, r"keep\.motion: 2 is above 1"),
        ({"duplicates": 100}, "duplicates must be from -1 to 64, not 100"),
        ({"scorers": {"motion": "a.pt"}}, r"scorers\.motion"),
        ({"part": "8/8"}, "part must be from 0/8 to 7/8, not 8/8"),
        ({"part": "first"}, "part must be like 0/8, not first"),
        ({"workers": 0}, "workers"),
    ],
)
def test_wrong_configs_say_so(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        PrepareConfig(**wrong)
