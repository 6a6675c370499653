"""Latent shards: what goes into them and comes out, whoever makes them."""

import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from data_pipelines.buckets import Bucket, BucketConfig, frames_at
from data_pipelines.claims import Claims
from data_pipelines.encode.decode_ahead import (
    Ahead,
    Meter,
    Raw,
    bounds_of,
    decode_clip,
    decode_raw,
    plan_batches,
    stream_clip,
)
from data_pipelines.encode.report import read_tally
from data_pipelines.encode.run import Encoders, encode_one, encode_shards, wanted_buckets
from data_pipelines.errors import BadSample, DataError
from data_pipelines.samples.items import _sampled, find_items
from data_pipelines.samples.latents import (
    MANIFEST,
    check_buckets,
    check_source,
    describe_buckets,
    pick,
    read_about,
    read_latent,
    read_manifest,
)
from data_pipelines.shards.index import index_directory
from data_pipelines.shards.storage import Directory
from data_pipelines.shards.tars import ShardSet, ShardWriter
from data_pipelines.workers import WorkerDied
from tests.clips import noise, numbered, quadrants, video_bytes

BUCKETS = [BucketConfig(resolutions=(32, 48), frames=(1, 5, 9), aspects=("1:1", "3:2"), upscale=4.0)]
MANIFEST_OF_TESTS = {"format": 3, "buckets": describe_buckets(BUCKETS), "vae": "of the tests"}


def toy_video(pieces: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal, 4 x 1 x 1: the mean over each block of frames, and how many frames came before it."""
    before = 0
    for piece in pieces:
        x = torch.from_numpy(piece).permute(0, 4, 1, 2, 3).float() / 255  # [B, 3, T, H, W]
        bounds = [(0, 1)] * (before == 0) + [(b, b + 4) for b in range(before == 0, x.shape[2], 4)]
        blocks = [x[:, :, begin:end] for begin, end in bounds]
        mean = torch.stack([block.mean(2) for block in blocks], dim=2)  # [B, 3, T', H, W]
        before += x.shape[2]
        yield mean, torch.full_like(mean, float(before))


def toy_text(captions: list[str]) -> list[tuple[Tensor, Tensor]]:
    """The letters, and their number."""
    return [
        (torch.tensor([[float(ord(c))] for c in caption]), torch.tensor([float(len(caption))])) for caption in captions
    ]


def toy_encoders(dtype: torch.dtype = torch.float32, video: Any = toy_video) -> Encoders:
    return Encoders(video, toy_text, temporal_compression=4, dtype=dtype, manifest=MANIFEST_OF_TESTS)


def quiet(done: int, total: int, what: str) -> None:
    pass


def write_source(directory: Path, samples: int = 10, per_shard: int = 4) -> ShardSet:
    """Clips of 9, 6 and 20 frames, images, one broken clip, one with several captions, one too small for every bucket."""
    with ShardWriter(directory, samples_per_shard=per_shard) as writer:
        for i in range(samples):
            frames = (9, 1, 6, 20)[i % 4]
            height, width = ((32, 48), (48, 48))[i % 3 == 0]
            about: dict[str, Any] = {"kind": "video", "frames": frames, "fps": 8.0, "height": height, "width": width}
            content = video_bytes(noise(frames, height, width, seed=i), 8)
            if i == 4:
                content = content[: len(content) // 3]
            if i == 5:
                about["captions"] = [["five", 1.0], ["the fifth", 3.0]]
            if i == 6:
                about |= {"height": 4, "width": 4, "scores": {"motion": 0.5}}
            if i == 7:
                about["scores"] = {"motion": 0.25}
            text = "five" if i == 5 else f"clip {i}"
            writer.write({"__key__": f"clip-{i:03d}", "mp4": content, "txt": text, "cls": str(i), "json": about})
    return ShardSet.open(directory)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_source(tmp_path_factory.mktemp("source"))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under it, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_size_of_a_sample_is_encoded_and_stands_beside_the_others(source: ShardSet, tmp_path: Path) -> None:
    report = encode_shards(source, tmp_path, BUCKETS, toy_encoders(), quiet)
    latents = ShardSet.open(tmp_path)
    found = [(latents.row(i), latents.read(i)) for i in range(len(latents))]
    names = [f"{row.key} {row.variant}" for row, _ in found]
    expected = []
    for i in range(len(source)):
        row = source.row(i)
        if row.key not in ("clip-004", "clip-006"):
            wanted = wanted_buckets(BUCKETS, row.frames, row.height, row.width)
            assert len(wanted) == 2
            expected += [f"{row.key}-{b.height}x{b.width} {variant}" for variant, b in enumerate(wanted)]
    assert names == expected
    for row, members in found:
        facts = json.loads(members["json"])
        raw = source.read(next(i for i in range(len(source)) if source.key(i) == facts["source"]))
        bucket = Bucket(row.frames, row.height, row.width)
        clip = decode_clip(raw["mp4"], bucket)
        ((mean, _),) = toy_video([clip[None]])
        latent = read_latent(row.key, members)
        assert torch.equal(latent.mean, mean[0])
        assert (latent.fps, latent.label) == (8.0, int(raw["cls"]))
        assert row.scores == ({"motion": 0.25} if facts["source"] == "clip-007" else {})
        assert row.caption_tokens == len(latent.text) or facts["source"] == "clip-005"
        cut = read_latent(row.key, members, frames=1)
        assert torch.equal(cut.mean, mean[0, :, :1])
    assert report["dropped"]["fits no bucket"] == 1
    assert sum(report["dropped"].values()) == 2
    assert sum(report["kept"].values()) == len(latents) == 16


def test_keys_of_others_become_ours(source: ShardSet, tmp_path: Path) -> None:
    """As in tars that tar itself made: a dot and a slash first, spaces, no ASCII, the same but for those."""
    keys = ["./a clip", "./a_clip", "./ä clip", "./ü clip"]
    with tarfile.open(tmp_path / "others.tar", "w") as tar:
        for key in keys:
            for suffix, content in {"mp4": source.read(0)["mp4"], "txt": key.encode()}.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(bytes(content)))
    index_directory(Directory(tmp_path), quiet)
    encode_shards(ShardSet.open(tmp_path), tmp_path / "latents", BUCKETS, toy_encoders(), quiet)
    latents = ShardSet.open(tmp_path / "latents")
    assert {json.loads(latents.read(i)["json"])["source"] for i in range(len(latents))} == set(keys)
    assert len({latents.key(i) for i in range(len(latents))}) == len(latents) == 2 * len(keys)


def test_broken_samples_are_named(source: ShardSet, tmp_path: Path) -> None:
    report = encode_shards(source, tmp_path, BUCKETS, toy_encoders(), quiet)
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    named = json.loads(line)
    assert (named["shard"], named["key"]) == ("shard-000001.tar", "clip-004")
    assert report["dropped"][named["reason"]] == 1
    assert read_tally(tmp_path, named["shard"], source.digests[named["shard"]]).bad == [["clip-004", named["reason"]]]


def test_the_report_says_how_much_it_is(source: ShardSet, tmp_path: Path) -> None:
    report = encode_shards(source, tmp_path, BUCKETS, toy_encoders(torch.bfloat16), quiet)
    latents = ShardSet.open(tmp_path)
    for bucket in report["kept"]:
        rows = [latents.row(i) for i in range(len(latents))]
        rows = [row for row in rows if bucket == str(Bucket(row.frames, row.height, row.width))]
        assert report["bytes"][bucket] == sum(row.length for row in rows)
        if bucket.startswith("1x"):
            assert bucket not in report["bytes_per_hour"]
        else:
            hours = sum(row.frames / row.fps for row in rows) / 3600
            assert report["bytes_per_hour"][bucket] == pytest.approx(report["bytes"][bucket] / hours, abs=1)
    assert report["speed"]["shards"] == 3
    assert report["speed"]["frames"] == sum(int(b.split("x")[0]) * n for b, n in report["kept"].items())
    assert 0 <= report["speed"]["waiting_for_decode"] <= 1
    assert json.loads((tmp_path / "report.json").read_text()) == {k: v for k, v in report.items() if k != "speed"}


@pytest.mark.parametrize("batch_pixels", [1, 2 * 9 * 32 * 32, 1 << 24])
def test_batches_change_no_byte(source: ShardSet, tmp_path: Path, batch_pixels: int) -> None:
    seen: list[tuple[int, ...]] = []

    def watching(pieces: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        def look() -> Iterator[np.ndarray]:
            for piece in pieces:
                seen.append(piece.shape)
                yield piece

        yield from toy_video(look())

    encode_shards(source, tmp_path / "a", BUCKETS, toy_encoders(), quiet)
    encode_shards(source, tmp_path / "b", BUCKETS, toy_encoders(video=watching), quiet, batch_pixels=batch_pixels)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    clips = [shape for shape in seen if shape[0] > 1]
    assert all(batch_pixels >= B * T * H * W for B, T, H, W, _ in clips)
    assert bool(clips) == (batch_pixels > 1)


def test_online_gives_the_bits_of_the_cache(source: ShardSet, tmp_path: Path) -> None:
    encoders = toy_encoders()
    encode_shards(source, tmp_path, BUCKETS, encoders, quiet)
    latents = ShardSet.open(tmp_path)
    for i in range(len(latents)):
        row, members = latents.row(i), latents.read(i)
        place = next(j for j in range(len(source)) if row.key.startswith(source.key(j)))
        bucket = Bucket(row.frames, row.height, row.width)
        for choice in (0.0, 0.2, 0.9):
            raw = decode_raw(source.key(place), source.read(place), bucket)
            one, two = encode_one(encoders, raw, bucket, choice), read_latent(row.key, members, choice=choice)
            for name in ("mean", "logvar", "text", "pooled"):
                assert torch.equal(getattr(one, name), getattr(two, name)), name
            assert (one.fps, one.label) == (two.fps, two.label)


def test_a_caption_is_picked_by_its_weight(source: ShardSet, tmp_path: Path) -> None:
    encode_shards(source, tmp_path, BUCKETS, toy_encoders(), quiet)
    latents = ShardSet.open(tmp_path)
    members = next(latents.read(i) for i in range(len(latents)) if latents.key(i).startswith("clip-005"))
    assert set(load(bytes(members["safetensors"]))) == {"mean", "logvar", "text", "pooled", "text.1", "pooled.1"}
    lengths = [len(read_latent("x", members, choice=c).text) for c in (0.0, 0.24, 0.26, 0.999)]
    assert lengths == [len("five")] * 2 + [len("the fifth")] * 2
    assert read_latent("x", members, choice=0.9).pooled.tolist() == [len("the fifth")]
    assert [pick([1, 0, 2], c) for c in (0.0, 0.3, 0.34, 0.999)] == [0, 0, 2, 2]


@pytest.mark.parametrize(
    "members",
    [
        {"json": b"{}"},
        {"txt": b"\xff"},
        {"txt": b" "},
        {"txt": b"a", "json": b'{"captions": [["a"]]}'},
        {"txt": b"a", "json": b'{"captions": [["a", 0]]}'},
        {"txt": b"a", "json": b'{"captions": [["a", 1], ["", 1]]}'},
        {"txt": b"a", "json": b'{"captions": 3}'},
        {"txt": b"a", "json": b"[]"},
        {"txt": b"a", "json": b"{"},
        {"txt": b"a", "cls": b"cat"},
    ],
)
def test_what_a_raw_sample_says_wrong_is_a_bad_sample(members: dict[str, bytes]) -> None:
    with pytest.raises(BadSample):
        read_about("key", members)


@pytest.mark.parametrize("frames", [1, 2, 17, 18, 33, 100])
@pytest.mark.parametrize("compression", [1, 4, 8, 32])
def test_pieces_follow_each_other_and_fit_the_vae(frames: int, compression: int) -> None:
    bounds = bounds_of(frames, compression)
    assert [begin for begin, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
    assert bounds[-1][1] == frames
    for begin, end in bounds[:-1]:
        assert (end - begin - (begin == 0)) % compression == 0
        assert end - begin <= 1 + max(16, compression)


def test_a_long_clip_in_pieces_is_the_clip() -> None:
    media = video_bytes(quadrants(40, 48, 80))
    for bucket in (Bucket(37, 32, 32), Bucket(40, 64, 64), Bucket(33, 48, 80)):
        pieces = list(stream_clip(media, bucket, bounds_of(bucket.frames, 4)))
        assert np.array_equal(np.concatenate(pieces), decode_clip(media, bucket))
        assert max(len(piece) for piece in pieces) == 17


def test_batches_hold_one_shape_and_every_clip_once() -> None:
    rng = np.random.default_rng(0)
    shapes = [Bucket(1, 64, 64), Bucket(9, 32, 48), Bucket(17, 64, 64)]
    wanted = {i: [shapes[k] for k in sorted(rng.choice(3, rng.integers(0, 4), replace=False))] for i in range(300)}
    limit = 5 * 64 * 64
    batches = plan_batches(wanted, limit)
    members = [(row, wanted[row][variant]) for batch in batches for row, variant in batch.members]
    assert sorted(members, key=str) == sorted(((i, b) for i, bs in wanted.items() for b in bs), key=str)
    for batch in batches:
        assert all(wanted[row][variant] == batch.bucket for row, variant in batch.members)
        size = batch.bucket.frames * batch.bucket.height * batch.bucket.width
        assert len(batch.members) == 1 or len(batch.members) * size <= limit
        assert batch.members[-1][0] - batch.members[0][0] < 64
    firsts = [batch.members[0][0] for batch in batches]
    assert firsts == sorted(firsts)
    assert sum(len(batch.members) == 5 for batch in batches) > 10


def test_processes_that_decode_change_no_byte(source: ShardSet, tmp_path: Path) -> None:
    encode_shards(source, tmp_path / "a", BUCKETS, toy_encoders(), quiet)
    encode_shards(source, tmp_path / "b", BUCKETS, toy_encoders(), quiet, workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class DyingPool:
    """Its workers die of the third row, and of the first job of all."""

    def __init__(self) -> None:
        self.jobs: list[int] = []

    def submit(self, function: Any, source: ShardSet, row: int, decode: Any, bucket: Bucket) -> Future[Any]:
        future: Future[Any] = Future()
        self.jobs.append(row)
        if row == 2 or len(self.jobs) == 1:
            future.set_exception(WorkerDied("a worker process died (exit code -11)"))
        else:
            future.set_result(function(source, row, decode, bucket))
        return future


def test_what_kills_two_decoders_is_a_bad_sample(source: ShardSet) -> None:
    pool: Any = DyingPool()
    batches = plan_batches({row: [Bucket(1, 32, 32)] for row in (0, 1, 2)}, 10**6)
    ((_, found),) = Ahead(source, 10**6, 4, 1, pool).batches(batches, Meter())
    assert [type(member) for member in found] == [Raw, Raw, BadSample]
    assert str(found[2]) == "clip-002: a worker process died (exit code -11)"
    assert pool.jobs == [0, 0, 1, 2, 2]


def test_the_dearest_shards_come_first(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "source", samples_per_shard=1) as writer:
        for i, frames in enumerate((1, 9, 5, 50)):
            about = {"kind": "video", "frames": frames, "fps": 8.0, "height": 32, "width": 48}
            writer.write({"__key__": f"{i}", "mp4": video_bytes(noise(frames, 32, 48), 8), "txt": "a", "json": about})
    encode_shards(ShardSet.open(tmp_path / "source"), tmp_path / "latents", BUCKETS, toy_encoders(), quiet)
    written = sorted((tmp_path / "latents").glob("*.tar"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.stem[-1] for path in written] == ["1", "3", "2", "0"]  # nine frames are the most that is encoded


def test_a_stopped_loader_leaves_no_thread(source: ShardSet) -> None:
    before = threading.active_count()
    wanted = {i: wanted_buckets(BUCKETS, 9, 32, 48) for i in (0, 3, 7)}
    coming = Ahead(source, 1, 4, 2, None).batches(plan_batches(wanted, 1), Meter())
    _, (first,) = next(coming)
    assert isinstance(first, Raw)
    assert isinstance(first.clip, Iterator)
    coming.close()
    del first, coming
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


# Stale and foreign latents


def test_other_encoders_or_buckets_are_refused(source: ShardSet, tmp_path: Path) -> None:
    encode_shards(source, tmp_path, BUCKETS, toy_encoders(), quiet)
    other = Encoders(toy_video, toy_text, 4, torch.float32, {**MANIFEST_OF_TESTS, "vae": "another"})
    with pytest.raises(DataError, match="stale latents: vae is of the tests, wanted another"):
        encode_shards(source, tmp_path, BUCKETS, other, quiet)
    manifest = read_manifest(Directory(tmp_path))
    check_buckets("here", manifest, BUCKETS)
    check_buckets("here", manifest, [BucketConfig(resolutions=(32,), frames=(5,), aspects=("1:1",))])
    for config in (
        BucketConfig(resolutions=(32,), frames=(13,), aspects=("1:1",)),
        BucketConfig(resolutions=(64,), frames=(5,), aspects=("1:1",)),
    ):
        with pytest.raises(DataError, match=r"here: stale latents: bucket .* was not encoded"):
            check_buckets("here", manifest, [config])
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(DataError, match="another format"):
        read_manifest(Directory(tmp_path))


def test_how_often_a_bucket_is_kept_does_not_matter_to_latents() -> None:
    config = BucketConfig(resolutions=(32, 48), frames=(1, 5))
    kept = BucketConfig(resolutions=(32, 48), frames=(1, 5), keep_frames=(1.0, 0.5))
    assert describe_buckets([config]) == describe_buckets([kept]) == describe_buckets([config, kept])
    assert describe_buckets([config]) != describe_buckets(
        [BucketConfig(resolutions=(32, 48), frames=(1, 5), upscale=2.0)]
    )


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    directory, output = tmp_path / "source", tmp_path / "latents"
    source = write_source(directory)
    encode_shards(source, output, BUCKETS, toy_encoders(), quiet)
    check_source(Directory(output))
    directory.rename(tmp_path / "away")
    check_source(Directory(output))  # it cannot be asked
    changed = write_source(directory, samples=9)
    with pytest.raises(DataError, match=r"stale latents: .*shard-000002.tar has changed since"):
        check_source(Directory(output))
    with pytest.raises(DataError, match=r"shard-000002.tar: stale latents: its source shard has changed"):
        encode_shards(changed, output, BUCKETS, toy_encoders(), quiet)
    for file in directory.iterdir():
        file.unlink()
    write_source(directory, samples=14)
    with pytest.raises(
        DataError, match=r"stale latents: .*shard-000002.tar has changed since|shard-000003.tar is not encoded"
    ):
        check_source(Directory(output))
    for file in directory.iterdir():
        file.unlink()
    fewer = write_source(directory, samples=8)
    with pytest.raises(DataError, match="fewer shards"):
        check_source(Directory(output))
    with pytest.raises(DataError, match=r"shard-000002.tar: stale latents: .* has no such shard"):
        encode_shards(fewer, output, BUCKETS, toy_encoders(), quiet)


def test_shards_that_came_later_are_added(tmp_path: Path) -> None:
    directory = tmp_path / "source"
    encode_shards(write_source(directory, samples=8), tmp_path / "grown", BUCKETS, toy_encoders(), quiet)
    for file in directory.iterdir():
        file.unlink()
    source = write_source(directory, samples=12)
    report = encode_shards(source, tmp_path / "grown", BUCKETS, toy_encoders(), quiet)
    assert report["speed"]["shards"] == 1
    encode_shards(source, tmp_path / "new", BUCKETS, toy_encoders(), quiet)
    assert contents(tmp_path / "grown") == contents(tmp_path / "new")


# A shard that somebody else has taken


class Stopped:
    """A worker in a thread that stops in the middle of its first shard until it may go on."""

    def __init__(self, source: ShardSet, output: Path) -> None:
        self.source, self.output = source, output
        self.stops, self.goes = threading.Event(), threading.Event()
        self.report: dict[str, Any] = {}
        self.thread = threading.Thread(target=self.work)
        self.thread.start()
        assert self.stops.wait(20)
        (claim,) = (output / ".encode").glob("*.tar.0")
        self.shard = claim.name.removesuffix(".0")
        os.utime(claim, (0, 0))

    def work(self) -> None:
        encoders = toy_encoders(video=self.video)
        self.report = encode_shards(self.source, self.output, BUCKETS, encoders, quiet, claim_seconds=1000.0)

    def video(self, pieces: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        self.stops.set()
        assert self.goes.wait(20)
        return toy_video(pieces)


def test_a_worker_that_lost_its_claim_publishes_nothing(source: ShardSet, tmp_path: Path) -> None:
    stopped = Stopped(source, tmp_path)
    claim = Claims(tmp_path / ".encode", seconds=1000.0).take(stopped.shard)
    assert claim is not None
    with claim:
        stopped.goes.set()
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("*.tar"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert {path.name for path in tmp_path.glob("*.tar")} == set(source.tars) - {stopped.shard}
    stopped.thread.join(20)  # given back, it is done after all
    assert stopped.report["speed"]["shards"] == 3


def test_a_worker_may_be_late(source: ShardSet, tmp_path: Path) -> None:
    """All is done and tidied up when it goes on."""
    stopped = Stopped(source, tmp_path / "a")
    encode_shards(source, tmp_path / "a", BUCKETS, toy_encoders(), quiet, claim_seconds=1000.0)
    stopped.goes.set()
    stopped.thread.join(20)
    assert stopped.report["speed"]["shards"] == 0
    encode_shards(source, tmp_path / "b", BUCKETS, toy_encoders(), quiet)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_faster_clips_are_sampled_at_the_rate_that_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        for i, (frames, fps) in enumerate([(25, 24.0), (13, 12.0), (9, 8.0)]):
            about = {"kind": "video", "frames": frames, "fps": fps, "height": 32, "width": 48}
            clip = numbered(frames, 32, 48)
            writer.write({"__key__": f"s{i}", "mp4": video_bytes(clip, fps=int(fps)), "txt": "x", "json": about})
    source = ShardSet.open(tmp_path / "shards")
    bucket = Bucket(9, 32, 48)
    for row, shown in ((0, 12.0), (1, 12.0), (2, 8.0)):
        raw = decode_raw(source.key(row), source.read(row), bucket, fps=12.0)
        assert raw.fps == shown
        step = 2 if row == 0 else 1
        own = decode_raw(source.key(row), source.read(row), Bucket(source.row(row).frames, 32, 48))
        assert (raw.clip == own.clip[: 9 * step : step]).all()
        pieces = list(stream_clip(source.read(row)["mp4"], bucket, [(0, 5), (5, 9)], 12.0 if row == 0 else None))
        assert (np.concatenate(pieces) == raw.clip).all()
    config = BucketConfig(resolutions=(32,), frames=(9, 13, 25), aspects=("3:2",), upscale=2.0)
    for fps, lengths in ((0.0, [25, 13, 9]), (12.0, [13, 13, 9])):
        items = find_items(source, config, encoded=False, fps=fps)
        assert [items.choose(i, (0, 0))[1].frames for i in range(3)] == lengths
    asked: list[int] = []
    monkeypatch.setattr(
        "data_pipelines.samples.items.frames_at", lambda n, *more: asked.append(n) or frames_at(n, *more)
    )
    assert _sampled(np.array([25, 13, 25, 25]), np.array([24.0, 24.0, 24.0, 12.0]), 12.0).tolist() == [13, 7, 13, 25]
    assert sorted(asked) == [13, 25, 25]  # once for each distinct pair
    assert [frames_at(n, 30000 / 1001, 15.0) for n in (1, 2, 3, 31)] == [(1, 15.0), (1, 15.0), (2, 15.0), (16, 15.0)]
    assert frames_at(10, 24.0, 30.0) == (10, 24.0)
