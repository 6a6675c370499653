"""Order, exact resume and replacement of latents, on any number of ranks."""

import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from data_pipelines.batches.loader import DataConfig, Item, Loader, StepBatch, cached_opener
from data_pipelines.batches.order import Mixture
from data_pipelines.buckets import Bucket, BucketConfig, frame_size
from data_pipelines.errors import DataError
from data_pipelines.samples.items import find_items
from data_pipelines.samples.reading import as_they_are
from data_pipelines.shards.tars import ShardSet, ShardWriter

BUCKETS = BucketConfig(resolutions=(64,), frames=(1, 5))
SAMPLES = 23


def write_latents(directory: Path, samples: int = SAMPLES, per_shard: int = 10) -> ShardSet:
    sizes = [frame_size(64, aspect, 16) for aspect in ("16:9", "1:1", "9:16")]
    with ShardWriter(directory, samples_per_shard=per_shard) as writer:
        for i in range(samples):
            frames, (height, width) = (1, 5, 9)[i % 3], sizes[i % 2]
            shape = (16, 1 + (frames - 1) // 4, height // 8, width // 8)
            tensors = {
                "mean": torch.full(shape, float(i)),
                "logvar": torch.zeros(shape),
                "text": torch.zeros(1 + i % 4, 8),
            }
            facts = {
                "kind": "video" if frames > 1 else "image", "frames": frames, "fps": 8.0, "height": height,
                "width": width, "caption_tokens": 1 + i % 4, "temporal_compression": 4, "label": -1,
            }  # fmt: skip
            writer.write({"__key__": f"s{i:03d}", "json": facts, "safetensors": save(tensors)})
    return ShardSet.open(directory)


def tokens_of(bucket: Bucket) -> int:
    return (1 + (bucket.frames - 1) // 4) * (bucket.height // 16) * (bucket.width // 16)


def loader(
    *shards: ShardSet, rank: int = 0, ranks: int = 1, buckets: BucketConfig = BUCKETS, batch: int = 12,
    obey: dict[int, str] | None = None, **data: object,
) -> Loader:  # fmt: skip
    config = DataConfig(**{"global_batch": batch, "capacity": 64, "row_multiple": 16, "window": 2} | data)
    return Loader(
        dict.fromkeys(shards, 1.0), cached_opener(), buckets, config, seed=9, tokens_of=tokens_of, flops_of=flops_of,
        cost_of=flops_of, rank=rank, ranks=ranks, obey=obey,
    )  # fmt: skip


def flops_of(bucket: Bucket, text_tokens: int) -> float:
    return tokens_of(bucket) + text_tokens


def take(batches: Iterator[StepBatch], n: int) -> list[StepBatch]:
    return list(itertools.islice(batches, n))


def by_position(batches: list[StepBatch]) -> dict[int, tuple[str, float]]:
    return {
        s.position: (s.key, s.latent.mean[0, 0, 0, 0].item()) for batch in batches for row in batch.rows for s in row
    }


def test_the_same_sequence_on_any_number_of_ranks_and_readers(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    alone = take(loader(shards, batch=24).batches(0), 2)
    expected = by_position(alone)
    assert sorted(expected) == list(range(48))
    assert [key for key, _ in (expected[p] for p in range(24))] == alone[0].keys
    for ranks, readers in itertools.product((1, 2, 3, 4, 8), (1, 3)):
        found: dict[int, tuple[str, float]] = {}
        for rank in range(ranks):
            batches = take(loader(shards, batch=24, rank=rank, ranks=ranks, readers=readers).batches(0), 2)
            assert not found.keys() & by_position(batches).keys()
            found |= by_position(batches)
            assert [b.keys for b in batches] == [b.keys for b in alone]
        assert found == expected


def test_an_epoch_visits_every_fitting_sample_once(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents", samples=24)
    keys = [key for batch in take(loader(shards).batches(0), 4) for key in batch.keys]
    assert sorted(keys[:24]) == sorted(keys[24:]) == [f"s{i:03d}" for i in range(24)]
    assert keys[:24] != keys[24:]


def test_resumed_anywhere_it_is_the_same(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    straight = take(loader(shards).batches(0), 6)
    for step in range(6):
        assert by_position(take(loader(shards).batches(step), 1)) == by_position(straight[step : step + 1])


def test_latents_are_cut_to_their_bucket(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    for batch in take(loader(shards).batches(0), 3):
        for sample in itertools.chain.from_iterable(batch.rows):
            assert sample.latent.mean.shape[1] == 1 + (sample.bucket.frames - 1) // 4
            assert sample.bucket.frames in (1, 5)
        assert batch.tokens == sum(tokens_of(s.bucket) for row in batch.rows for s in row)
        assert all(length % 16 == 0 for length in batch.lengths)
        for row, length in zip(batch.rows, batch.lengths, strict=True):
            assert length - 16 < sum(tokens_of(s.bucket) for s in row) <= length


def test_a_torn_shard_costs_its_samples_and_a_replay_obeys(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    whole = by_position(take(loader(shards).batches(0), 4))
    tar = min((tmp_path / "latents").glob("*.tar"))
    content = tar.read_bytes()
    os.truncate(tar, len(content) // 3)
    torn = take(loader(ShardSet.open(tmp_path / "latents")).batches(0), 4)
    replaced = {r.position: r for batch in torn for r in batch.replacements}
    found = by_position(torn)
    assert replaced
    assert {p for p in whole if whole[p] != found[p]} == set(replaced)
    for position, replacement in replaced.items():
        assert replacement.key == whole[position][0]
        assert replacement.by == found[position][0]
        assert "truncated" in replacement.reason
    # Mended, the data is read as the log says, and nothing is logged again.
    tar.write_bytes(content)
    obey = {p: r.by for p, r in replaced.items()}
    replay = take(loader(ShardSet.open(tmp_path / "latents"), obey=obey).batches(0), 4)
    assert by_position(replay) == found
    assert not any(batch.replacements for batch in replay)


def test_what_can_be_read_costs_no_look_at_the_whole_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_latents(tmp_path / "latents")
    looked: list[Item] = []
    candidates = Loader._candidates
    monkeypatch.setattr(Loader, "_candidates", lambda self, item: looked.append(item) or candidates(self, item))
    expected = by_position(take(loader(shards).batches(0), 2))
    assert not looked
    # Of what an earlier attempt read, only what it can have read is looked through.
    read = loader(shards, obey={3: "not there"}, max_replacements=2)
    keys: list[int] = []
    key = ShardSet.key
    monkeypatch.setattr(ShardSet, "key", lambda self, row: keys.append(row) or key(self, row))
    assert read._logged(3, read.item_at(3)) == read.item_at(3).row
    assert (len(looked), len(keys)) == (1, 2)
    assert by_position(take(read.batches(0), 2)) == expected


def test_nothing_that_fits_or_can_be_read(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    with pytest.raises(DataError, match="none of its 23 samples fits"):
        loader(shards, buckets=BucketConfig(resolutions=(512,)))
    for tar in (tmp_path / "latents").glob("*.tar"):
        os.truncate(tar, 0)
    with pytest.raises(
        DataError, match=r"shard-00000\d.tar: \d+ samples of bucket \S+ in a row cannot be read, the last s0"
    ):
        take(loader(ShardSet.open(tmp_path / "latents")).batches(0), 1)


def test_storage_that_fails_is_no_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_latents(tmp_path / "latents")
    monkeypatch.setattr("data_pipelines.shards.storage.PAUSES", ())
    for tar in (tmp_path / "latents").glob("*.tar"):
        tar.unlink()
        tar.symlink_to(tar)  # the system's word is ELOOP
    with pytest.raises(OSError, match="levels of symbolic links") as caught:
        take(loader(shards).batches(0), 1)
    assert "reading sample s0" in "".join(caught.value.__notes__)


def write_torn(directory: Path) -> ShardSet:
    write_latents(directory)
    tar = min(directory.glob("*.tar"))
    os.truncate(tar, tar.stat().st_size // 3)
    return ShardSet.open(directory)


def test_the_replacement_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    shards = write_torn(tmp_path / "latents")
    alone = by_position(take(loader(shards).batches(0), 4))
    for ranks in (2, 3, 4):
        found = [by_position(take(loader(shards, rank=rank, ranks=ranks).batches(0), 4)) for rank in range(ranks)]
        assert {p: s for part in found for p, s in part.items()} == alone


def test_a_replacement_is_of_the_same_bucket(tmp_path: Path) -> None:
    shards = write_torn(tmp_path / "latents")
    bucket_of = {shards.key(item.row): item.bucket for item in map(loader(shards).item_at, range(SAMPLES))}
    replaced = [r for b in take(loader(shards).batches(0), 4) for r in b.replacements]
    assert replaced
    assert all(bucket_of[r.key] == bucket_of[r.by] for r in replaced)


def test_killed_fifty_times_it_is_the_same_sequence(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    straight = by_position(take(loader(shards, batch=6).batches(0), 90))
    draw, step, kills = random.Random(1), 0, 0
    found: dict[int, tuple[str, float]] = {}
    while step < 90:
        ranks = draw.choice((1, 2, 3, 6))
        n = min(draw.randrange(1, 3), 90 - step)
        for rank in range(ranks):
            part = by_position(take(loader(shards, batch=6, rank=rank, ranks=ranks).batches(step), n))
            assert not found.keys() & part.keys()
            found |= part
        step += n
        kills += 1
    assert kills >= 50
    assert found == straight


def test_the_same_sequence_on_any_number_of_workers(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    expected = by_position(take(loader(shards).batches(0), 3))
    for workers in (1, 3):  # 0 is how it was read
        assert by_position(take(loader(shards, workers=workers).batches(0), 3)) == expected


def crash(key: str, members: dict, bucket: Bucket) -> dict:
    if key == "s004":
        os.kill(os.getpid(), signal.SIGKILL)
    return as_they_are(key, members, bucket)


def test_what_kills_its_worker_is_a_bad_sample(tmp_path: Path) -> None:
    read = loader(write_latents(tmp_path / "latents"), workers=2)
    read.opener = replace(read.opener, decode=crash)
    batches = take(read.batches(0), 2)
    assert {(r.key, r.reason) for b in batches for r in b.replacements} == {("s004", "a worker process died (SIGKILL)")}


def test_every_epoch_visits_all_whatever_the_shards_and_ranks(tmp_path: Path) -> None:
    draw = random.Random(5)
    for trial in range(6):
        samples, per_shard, ranks = draw.randrange(6, 40), draw.randrange(1, 9), draw.choice((1, 2, 3))
        shards = write_latents(tmp_path / str(trial), samples, per_shard)
        window = draw.choice((1, 3, 16))
        seen: list[str] = []
        steps = -(-3 * samples // 6)
        for step in range(steps):
            plans = {tuple(map(repr, loader(shards, batch=6, rank=r, ranks=ranks, window=window).plan(step)[0]))
                     for r in range(ranks)}  # fmt: skip
            assert len(plans) == 1
            seen += [shards.key(item.row) for item in loader(shards, batch=6, window=window).plan(step)[0]]
        for epoch in range(3):
            assert sorted(seen[epoch * samples : (epoch + 1) * samples]) == [f"s{i:03d}" for i in range(samples)]


def test_a_mixture_reads_its_sources_by_weight(tmp_path: Path) -> None:
    one, two = write_latents(tmp_path / "one"), write_latents(tmp_path / "two", samples=5)
    mixed = loader(one, two, batch=100)
    mixed.mixture = Mixture([3, 1], 0)
    items = [item for step in range(100) for item in mixed.plan(step)[0]]
    assert sum(item.source == 0 for item in items) == 7500
    few = Counter(two.key(item.row) for item in items if item.source == 1)
    assert few == dict.fromkeys(few, 500)
    assert len(few) == 5


def test_the_variants_of_a_sample_are_one_item(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "latents", samples_per_shard=10) as writer:
        for i in range(12):
            for variant, side in enumerate((64, 128)):
                tensors = {"mean": torch.full((4, 2, side // 8, side // 8), float(i)), "text": torch.zeros(1, 8)}
                tensors["logvar"] = tensors["mean"].clone()
                facts = {"kind": "video", "frames": 5, "fps": 8.0, "height": side, "width": side, "caption_tokens": 1,
                         "temporal_compression": 4, "label": -1, "variant": variant}  # fmt: skip
                writer.write({"__key__": f"s{i:03d}-{side}", "json": facts, "safetensors": save(tensors)})
    shards = ShardSet.open(tmp_path / "latents")
    buckets = BucketConfig(resolutions=(64, 128), frames=(1, 5), aspects=("1:1",), keep_resolutions=(1.0, 0.5))
    read = loader(shards, buckets=buckets, capacity=128)
    assert read.samples == 12
    assert {str(b): n for b, n in read.expected().items()} == {
        "5x64x64": 6,
        "5x128x128": 6,
    }
    items = [item for step in range(20) for item in read.plan(step)[0]]
    for epoch in range(20):
        keys = [shards.key(item.row).split("-")[0] for item in items[epoch * 12 : (epoch + 1) * 12]]
        assert sorted(keys) == [f"s{i:03d}" for i in range(12)]
    assert {shards.key(item.row).split("-")[1] == str(item.bucket.height) for item in items} == {True}
    large = sum(item.bucket.height == 128 for item in items)
    assert 90 < large < 150  # of 240


def test_scores_out_of_bounds_are_left_out(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(10):
            facts = {"kind": "image", "frames": 1, "fps": 0.0, "height": 64, "width": 64, "caption_tokens": 1}
            writer.write(
                {
                    "__key__": f"s{i}",
                    "json": facts | ({"scores": {"motion": i / 10}} if i else {}),
                    "jpg": b"",
                    "txt": "x",
                }
            )
    items = find_items(ShardSet.open(tmp_path), BUCKETS, encoded=False, bounds={"motion": (0.3, 0.7)})
    assert (len(items), items.refused, items.unfit) == (6, 4, 0)
    assert items.rows.tolist() == [0, 3, 4, 5, 6, 7]  # what has no such score passes
