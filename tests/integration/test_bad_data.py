"""What is wrong with data is skipped, counted and named, from raw files to latents; nothing usable is exit code 3."""

import json
import os
import shutil
from pathlib import Path

import pytest

from data_pipelines.shards.tars import ShardSet, ShardWriter
from megasora.cli import main
from tests.clips import quadrants, write_clip
from tests.integration.conftest import Road


def make_raw(directory: Path) -> None:
    write_clip(directory / "good.mp4", quadrants(20))
    (directory / "good.txt").write_text("a good clip")
    write_clip(directory / "mute.mp4", quadrants(20))
    (directory / "broken.mp4").write_bytes(b"\0" * 5000)
    (directory / "broken.txt").write_text("no video at all")


def test_prepare_counts_what_it_drops(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    raw.mkdir()
    make_raw(raw)
    arguments = ["prepare", "--config", str(road.config), f"--prepare.input={raw}", f"--prepare.output={shards}"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kept"] == 1
    assert sum(report["dropped"].values()) == 2
    saved = json.loads((shards / "report.json").read_text())
    assert {key: report[key] for key in saved} == saved
    assert report["dropped"]["no caption"] == 1
    named = [name for examples in report["examples"].values() for name in examples]
    assert any("mute" in name for name in named)
    assert any("broken" in name for name in named)


def test_nothing_usable_is_exit_3(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, shards = tmp_path / "raw", tmp_path / "shards"
    raw.mkdir()
    make_raw(raw)
    (raw / "good.mp4").unlink()
    arguments = ["prepare", "--config", str(road.config), f"--prepare.input={raw}", f"--prepare.output={shards}"]
    assert main(arguments) == 3
    assert not shards.exists()
    for verb in ("train-vae", "encode"):
        assert main([verb, "--config", str(road.config), f"--encode.input={tmp_path / 'nothing'}"]) == 3
    error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("megasora: ") for line in error if "left)" not in line)
    assert str(raw) in error[0] or str(raw) in error[1]


def test_encode_counts_truncated_tars_and_undecodable_videos(road: Road, tmp_path: Path) -> None:
    shards, latents = tmp_path / "shards", tmp_path / "latents"
    shutil.copytree(road.directory / "shards", shards)
    first, last = min(shards.glob("*.tar")), max(shards.glob("*.tar"))
    assert first != last
    os.truncate(first, first.stat().st_size // 2)
    bad = tmp_path / "bad"
    about = {"kind": "video", "frames": 9, "fps": 8.0, "height": 64, "width": 96}
    with ShardWriter(bad) as writer:
        writer.write({"__key__": "garbage", "mp4": b"\0" * 999, "txt": "garbage", "json": about})
    for file in bad.glob("shard-000000.*"):
        file.rename(shards / file.name.replace("shard-000000", "shard-999999"))
    arguments = ["encode", "--config", str(road.config), f"--encode.input={shards}", f"--encode.output={latents}"]
    assert main(arguments) == 0
    report = json.loads((latents / "report.json").read_text())
    assert report["dropped"].pop(f"{first.name} is truncated") >= 1
    (reason,) = report["dropped"]
    assert report["dropped"][reason] == 1
    assert "video" in reason
    samples = len(ShardSet.open(shards))
    assert sum(report["kept"].values()) < samples
    assert len(ShardSet.open(latents)) == sum(report["kept"].values())
    # A second call has nothing to do and says the same; other encoders are refused.
    before = {file: file.stat().st_mtime_ns for file in latents.glob("*.tar")}
    assert main(arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in latents.glob("*.tar")} == before
    assert json.loads((latents / "report.json").read_text())["kept"] == report["kept"]
    assert main([*arguments, "--encode.latent_dtype=float32"]) == 3


def test_an_interrupted_encode_gives_the_same_bytes(road: Road, tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    shutil.copytree(road.directory / "latents", latents)
    whole = {file.name: file.read_bytes() for file in latents.glob("shard-*")}
    last = max(latents.glob("*.tar"))
    last.unlink()
    last.with_suffix(".arrow").unlink()
    (latents / f".{last.name}.tmp").write_bytes(b"torn")
    assert main(["encode", "--config", str(road.config), f"--encode.output={latents}"]) == 0
    assert {file.name: file.read_bytes() for file in latents.glob("shard-*")} == whole


def test_index_in_place(road: Road, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(road.directory / "shards", shards)
    before = ShardSet.open(shards).fingerprint
    for file in shards.glob("*.arrow"):
        file.unlink()
    assert main(["encode", "--config", str(road.config), f"--encode.input={shards}"]) == 3
    assert "megasora index" in capsys.readouterr().err
    assert main(["index", str(shards), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == len(ShardSet.open(shards))
    assert ShardSet.open(shards).fingerprint == before


def test_two_processes_encode_the_same_bytes(road: Road, tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    road.run("encode", f"--encode.output={latents}", nproc=2)
    alone = {f.name: f.read_bytes() for f in (road.directory / "latents").iterdir() if f.is_file()}
    assert {f.name: f.read_bytes() for f in latents.iterdir() if f.is_file()} == alone
    assert len(list(latents.glob("*.tar"))) > 1
