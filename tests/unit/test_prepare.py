import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_pipelines.errors import BadSample, DataError
from data_pipelines.prepare.clips import bounded_size, content_change, to_hsv
from data_pipelines.prepare.demo_clips import COLOURS, DRAWN, SIZES, WHEEL, draw_clip, draw_clips
from data_pipelines.prepare.run import PrepareConfig, prepare
from data_pipelines.samples.latents import read_label
from data_pipelines.shards.tars import ShardSet
from data_pipelines.video.files import decode, probe
from megasora.cli import main
from tests.clips import noise, numbered, quadrants, read_number, video_bytes, write_clip

ROOT = Path(__file__).resolve().parents[2]


def quiet(done: int, count: int, name: str) -> None:
    assert 0 <= done <= count, name


def run(source: Path, output: Path, **options: object) -> tuple[dict, ShardSet]:
    report = prepare(PrepareConfig(input=str(source), output=str(output), **options), quiet)
    return report, ShardSet.open(output)


def plain(frames: int, colour: tuple[int, int, int], height: int = 64, width: int = 96) -> np.ndarray:
    return np.full((frames, height, width, 3), colour, np.uint8)


def test_a_shot_change_ends_a_piece_and_each_has_its_own_frames(tmp_path):
    shots = [plain(20, (30, 50, 40)), plain(26, (60, 90, 220)), plain(5, (250, 250, 250)), plain(18, (20, 160, 60))]
    write_clip(tmp_path / "in" / "four shots.mp4", np.concatenate(shots), "colours")
    report, shards = run(tmp_path / "in", tmp_path / "out")
    assert report["dropped"] == {"too short": 1}
    assert report["examples"] == {"too short": ["four shots.mp4 at frame 46"]}
    assert [shards.key(index) for index in range(3)] == ["four-shots-000000", "four-shots-000020", "four-shots-000051"]
    for index, shot in enumerate([shots[0], shots[1], shots[3]]):
        row = shards.row(index)
        assert (row.kind, row.frames, row.fps, row.height, row.width) == ("video", len(shot), 24.0, 64, 96)
        members = shards.read(index)
        assert members["txt"] == b"colours"
        assert probe(members["mp4"]).frames == len(shot)
        clip = decode(members["mp4"], frames=len(shot), height=64, width=96)
        assert np.abs(clip.astype(int) - shot).max() <= 6


def test_a_long_shot_is_cut_into_pieces_with_every_frame_in_its_place(tmp_path):
    write_clip(tmp_path / "in" / "long.mp4", numbered(60), "bars", fps=10)
    report, shards = run(tmp_path / "in", tmp_path / "out", clip_seconds=2.5, min_frames=10, shot_threshold=250.0)
    assert report["kept"] == 3
    assert report["seconds"] == 6.0
    assert report["dropped"] == {}
    numbers = []
    for index in range(3):
        row = shards.row(index)
        clip = decode(shards.read(index)["mp4"], frames=row.frames, height=64, width=96)
        numbers.append([read_number(frame) for frame in clip])
        assert json.loads(shards.read(index)["json"])["start"] == numbers[-1][0]
    assert [len(piece) for piece in numbers] == [25, 25, 10]
    assert list(chain(*numbers)) == list(range(60))


def test_a_varying_rate_is_made_steady(tmp_path):
    """Two seconds of stillness in the middle are two seconds in the clip, and captions of parts keep their times."""
    times = [number + 48 * (number >= 30) for number in range(60)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "pause.mp4").write_bytes(video_bytes(numbered(60), times=times))
    lines = [
        {"path": "pause.mp4", "caption": "before", "start": 0, "end": 3.25},
        {"path": "pause.mp4", "caption": "after", "start": 3.25},
    ]
    (tmp_path / "in" / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report, shards = run(tmp_path / "in" / "list.jsonl", tmp_path / "out", shot_threshold=250.0, min_frames=5)
    assert report["kept"] == 2
    shown = []
    for index, (caption, seconds) in enumerate([(b"before", 3.25), (b"after", 1.25)]):
        row, members = shards.row(index), shards.read(index)
        assert members["txt"] == caption
        assert row.frames / row.fps == pytest.approx(seconds, abs=1 / row.fps)
        shown += [read_number(frame) for frame in decode(members["mp4"], frames=row.frames, height=64, width=96)]
    for place, number in enumerate(shown):
        off, until = 0.6 / row.fps, [*times, 108][number + 1]
        assert times[number] / 24 - off < place / row.fps < until / 24 + off


def test_sizes_are_bounded_and_keep_their_shape(tmp_path):
    write_clip(tmp_path / "in" / "wide.mp4", quadrants(20, 128, 384), "wide")
    (tmp_path / "in" / "turned.mp4").write_bytes(video_bytes(quadrants(20, 128, 384), rotation=90))
    (tmp_path / "in" / "turned.txt").write_text("turned")
    Image.fromarray(quadrants(1, 100, 50)[0]).save(tmp_path / "in" / "picture.png")
    (tmp_path / "in" / "picture.txt").write_text("a picture")
    report, shards = run(tmp_path / "in", tmp_path / "out", height_max=64)
    assert {shards.key(i): (shards.row(i).height, shards.row(i).width, shards.row(i).kind) for i in range(3)} == {
        "picture-000000": (100, 50, "image"),
        "turned-000000": (192, 64, "video"),
        "wide-000000": (64, 192, "video"),
    }
    assert report["sizes"] == {"192x64": 1, "50x100": 1, "64x192": 1}
    picture = shards.read(0)
    assert sorted(picture) == ["jpg", "json", "txt"]
    assert (
        np.abs(decode(picture["jpg"], frames=1, height=100, width=50)[0].astype(int) - quadrants(1, 100, 50)[0]).mean()
        < 6
    )
    assert bounded_size(1080, 1920, 720) == (720, 1280)
    assert bounded_size(1920, 1081, 240) == (426, 240)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A tree with something of everything."""
    root = tmp_path / "in"
    write_clip(root / "a" / "clip.mp4", noise(20, seed=1), "one")
    write_clip(root / "b" / "clip.mp4", noise(20, seed=2), "two")
    write_clip(root / "a-clip.mkv", noise(20, seed=3), "three")
    write_clip(root / "ünïcode — 片.mp4", noise(20, seed=4), "four")
    write_clip(root / ("long" * 30 + ".mp4"), noise(20, seed=5), "five")
    write_clip(root / "from-jsonl.mp4", noise(20, seed=6))
    write_clip(root / "no-caption.mp4", noise(20, seed=7))
    write_clip(root / "blank.mp4", noise(20, seed=8), " \n")
    write_clip(root / "short.mp4", noise(4, seed=9), "too short")
    cut = write_clip(root / "cut.mp4", noise(40, seed=10), "cut off")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 3 // 4])
    (root / "rubbish.mp4").write_bytes(b"no video" * 100)
    (root / "rubbish.txt").write_text("rubbish")
    (root / "empty.jpg").write_bytes(b"")
    (root / "empty.txt").write_text("empty")
    write_clip(root / "latin.mp4", noise(20, seed=11))
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "table.csv").write_text("what is this")
    (root / ".hidden.mp4").write_bytes(b"")
    lines = [{"file": "from-jsonl.mp4", "caption": "six"}, {"file": "gone.mp4", "caption": "gone"}, {"file": 3}]
    (root / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    return root


CONFIG = {"shot_threshold": 250.0, "samples_per_shard": 4}  # noise would be a new shot every frame


def test_everything_is_kept_or_counted(mixed, tmp_path):
    report, shards = run(mixed, tmp_path / "out", **CONFIG)
    assert report["sources"] == 14
    assert report["dropped"] == {
        "caption is not UTF-8": 1,
        "caption without file": 1,
        "no caption": 3,
        "not a video or image by its name": 1,
        "too short": 1,
        "truncated or damaged": 1,
        "undecodable": 2,
        "unreadable line of captions.jsonl": 2,
    }
    assert report["examples"]["no caption"] == ["blank.mp4", "latin.mp4", "no-caption.mp4"]
    captions = {shards.key(index): shards.read(index)["txt"].decode() for index in range(len(shards))}
    assert sorted(captions.values()) == ["cut off", "five", "four", "one", "six", "three", "two"]
    assert len(captions) == report["kept"] == report["videos"] == 7
    assert captions["b-clip-000000"] == "two"
    cut = next(shards.row(index) for index in range(7) if shards.key(index).startswith("cut"))
    assert 17 <= cut.frames < 40
    found = webdataset.WebDataset([str(tmp_path / "out" / tar) for tar in shards.tars], shardshuffle=False)
    assert {each["__key__"]: each["txt"].decode() for each in found} == captions
    on_disk = json.loads((tmp_path / "out" / "report.json").read_text())
    assert on_disk == {name: value for name, value in report.items() if name not in ("already_done", "left_to_others")}


def test_examples_are_of_different_files(tmp_path):
    write_clip(tmp_path / "in" / "flicker.mp4", noise(20), "a shot a frame")
    write_clip(tmp_path / "in" / "good.mp4", plain(20, (200, 40, 90)), "good")
    write_clip(tmp_path / "in" / "short.mp4", plain(3, (40, 200, 90)), "short")
    report, _ = run(tmp_path / "in", tmp_path / "out")
    assert report["dropped"]["too short"] > 5
    assert report["examples"]["too short"] == ["flicker.mp4 at frame 0", "short.mp4 at frame 0"]


def test_who_gets_nothing_but_short_pieces_hears_of_the_threshold(tmp_path, capfd):
    write_clip(tmp_path / "in" / "flicker.mp4", noise(20), "a shot a frame")
    write_clip(tmp_path / "in" / "good.mp4", plain(20, (200, 40, 90)), "good")
    words = ["--config", str(ROOT / "configs/base.yaml"), f"--prepare.input={tmp_path / 'in'}"]
    assert main(["prepare", *words, f"--prepare.output={tmp_path / 'out'}"]) == 0
    assert "prepare.shot_threshold=27" in capfd.readouterr().err


def test_the_same_input_gives_the_same_bytes(mixed, tmp_path):
    run(mixed, tmp_path / "one", **CONFIG)
    shutil.copytree(mixed, tmp_path / "copy")
    run(tmp_path / "copy", tmp_path / "two", **CONFIG)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == [
        "prepare.json",
        "report.json",
        "report.png",
        "shard-000000.arrow",
        "shard-000000.tar",
        "shard-000001.arrow",
        "shard-000001.tar",
    ]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_second_run_does_nothing_or_refuses(tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    write_clip(source / "clip.mp4", noise(20), "one")
    config = PrepareConfig(input=str(source), output=str(output), shot_threshold=250.0)
    assert prepare(config, quiet)["already_done"] is False
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    said: list[tuple[int, int, str]] = []
    again = prepare(config, lambda *progress: said.append(progress))
    assert again["already_done"] is True
    assert again["kept"] == 1
    assert said == [(1, 1, "already prepared")]
    with pytest.raises(DataError, match=r"clip_seconds 4\.0 -> 2\.0"):
        prepare(replace(config, clip_seconds=2.0), quiet)
    (source / "clip.txt").write_text("another caption")
    with pytest.raises(DataError, match="the input's files or captions"):
        prepare(config, quiet)
    (source / "clip.txt").write_text("one")
    assert prepare(config, quiet)["already_done"] is True
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("important")
    with pytest.raises(DataError, match="not made by prepare"):
        prepare(replace(config, output=str(tmp_path / "other")), quiet)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.doc"]


def test_a_killed_run_leaves_no_output_and_the_next_one_goes_on(tmp_path):
    write_clip(tmp_path / "in" / "a.mp4", noise(20), "one")
    write_clip(tmp_path / "in" / "b.mp4", noise(20, seed=1), "two")
    config = PrepareConfig(
        input=str(tmp_path / "in"),
        output=str(tmp_path / "out"),
        samples_per_shard=1,
        shot_threshold=250.0,
        part_files=1,
    )
    script = (
        "import os; from data_pipelines.prepare.run import *\n"
        f"prepare({config!r}, lambda done, count, name: os._exit(9) if name == 'b.mp4' else None)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 9
    hidden, source = sorted(tmp_path.iterdir())
    assert (hidden.name[:5], hidden.suffix, source.name) == (".out.", ".partial", "in")
    said: list[tuple[int, int, str]] = []
    assert prepare(config, lambda *progress: said.append(progress))["kept"] == 2
    assert said == [(1, 2, "b.mp4"), (2, 2, "")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_what_another_config_left_is_neither_used_nor_kept(tmp_path):
    write_clip(tmp_path / "in" / "a.mp4", noise(20), "one")
    config = PrepareConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"), shot_threshold=250.0)
    with pytest.raises(ZeroDivisionError):
        prepare(config, lambda *_: 1 // 0)  # type: ignore[arg-type, return-value]
    before = next(path for path in tmp_path.iterdir() if path.name != "in")
    with pytest.raises(ZeroDivisionError):
        prepare(replace(config, crf=30), lambda *_: 1 // 0)  # type: ignore[arg-type, return-value]
    assert len(list(tmp_path.iterdir())) == 3
    assert before.exists()
    assert prepare(config, quiet)["kept"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_nothing_usable(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DataError, match=r"prepare\.input"):
        prepare(PrepareConfig(), quiet)
    write_clip(tmp_path / "in" / "clip.mp4", noise(20))
    with pytest.raises(DataError, match=r"no usable sample in 1 files \(no caption 1\)"):
        run(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    for wrong in ({"clip_seconds": 0.0}, {"height_max": 2}, {"min_frames": 0}, {"samples_per_shard": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PrepareConfig(**wrong)


def test_captions_of_parts_and_a_single_file_and_an_output_inside_the_input(tmp_path):
    clip = write_clip(tmp_path / "in" / "clip.mp4", noise(60), "the rest", fps=20)
    lines = [
        {"file": "clip.mp4", "start": 0, "end": 1, "caption": "the first second"},
        {"file": "clip.mp4", "start": 1, "end": 2, "caption": "the  second\nsecond"},
    ]
    (tmp_path / "in" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"clip_seconds": 1.0, "shot_threshold": 250.0}
    for source in (clip, tmp_path / "in"):
        for _ in range(2):  # the second time its own output is not taken for input
            _, shards = run(source, tmp_path / "in" / source.stem, **options)
            captions = [shards.read(index)["txt"].decode() for index in range(3)]
            assert captions == ["the first second", "the second second", "the rest"]
        shutil.rmtree(tmp_path / "in" / source.stem)


def test_content_change_is_that_of_pyscenedetect():
    """Hue in half degrees, saturation and value to 255, mean of the three absolute differences."""
    red, blue, dark = (to_hsv(plain(1, colour)[0]) for colour in [(255, 0, 0), (0, 0, 255), (128, 0, 0)])
    assert red[0, 0].tolist() == [0, 255, 255]
    assert blue[0, 0].tolist() == [170, 255, 255]  # Pillow's hue goes to 255
    assert content_change(red, blue) == pytest.approx(120 / 3, abs=0.5)
    assert content_change(red, dark) == pytest.approx(127 / 3, abs=0.5)


def test_drawn_clips_are_what_their_captions_say(tmp_path):
    draw_clips(tmp_path, frames=24)
    report, _ = run(tmp_path, tmp_path / "out")
    assert (report["videos"], report["images"], report["dropped"]) == (len(DRAWN), len(DRAWN), {})
    for shape, colour, towards, size in DRAWN:
        clip = draw_clip(shape, colour, towards, *SIZES[size], 10)
        seen = (clip == COLOURS[colour]).all(-1)
        centres = [np.argwhere(frame).mean(0) for frame in seen]
        rows, columns = centres[-1] - centres[0]
        assert {"right": columns, "left": -columns, "down": rows, "up": -rows}[towards] > 40
        filled = seen[5].sum() / (np.ptp(np.argwhere(seen[5]), 0) + 1).prod()
        assert filled == pytest.approx(1.0 if shape == "square" else np.pi / 4, abs=0.03)


def test_demo_clips_without_network(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        environment = {"PATH": "/usr/bin:/bin", "PIP_INDEX_URL": f"http://127.0.0.1:{unused.getsockname()[1]}/"}
        command = [sys.executable, "-m", "data_pipelines.prepare.demo_clips", str(tmp_path / "clips")]
        first = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
    assert "no real clips" in first.stdout
    assert WHEEL in first.stdout
    assert len(first.stdout.splitlines()) == 1
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == len(DRAWN)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert again.stdout == f"{tmp_path / 'clips'}: has clips already\n"


def test_a_class_travels_with_its_file(tmp_path):
    write_clip(tmp_path / "in" / "one.mp4", quadrants(20, 64, 96), "one")
    write_clip(tmp_path / "in" / "two.mp4", quadrants(20, 64, 96)[:, ::-1])
    (tmp_path / "in" / "captions.jsonl").write_text(json.dumps({"file": "two.mp4", "caption": "two", "label": 3}))
    _, shards = run(tmp_path / "in", tmp_path / "out")
    members = {shards.key(i): shards.read(i) for i in range(2)}
    assert members["two-000000"]["cls"] == b"3"
    assert [read_label(key, found) for key, found in sorted(members.items())] == [-1, 3]
    with pytest.raises(BadSample, match="its class is no number"):
        read_label("key", {"cls": b"cat"})
