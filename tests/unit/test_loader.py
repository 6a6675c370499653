"""Order, exact resume and replacement of latents, on any number of ranks."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from data_pipelines.buckets import Bucket, BucketConfig, frame_size
from data_pipelines.errors import DataError
from data_pipelines.loader import DataConfig, LatentLoader, StepBatch
from data_pipelines.shards import ShardSet, ShardWriter

BUCKETS = BucketConfig(resolutions=(64,), frames=(1, 5))
SAMPLES = 23


def write_latents(directory: Path, samples: int = SAMPLES) -> ShardSet:
    sizes = [frame_size(64, aspect, 16) for aspect in ("16:9", "1:1", "9:16")]
    with ShardWriter(directory, samples_per_shard=10) as writer:
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


def loader(shards: ShardSet, rank: int = 0, ranks: int = 1, readers: int = 2, **more: object) -> LatentLoader:
    config = DataConfig(global_batch=12, capacity=64, readers=readers)
    return LatentLoader(
        shards, BUCKETS, config, seed=9, tokens_of=tokens_of, cost_of=lambda bucket, text: tokens_of(bucket) + text,
        rank=rank, ranks=ranks, **more,
    )  # fmt: skip


def take(batches: Iterator[StepBatch], n: int) -> list[StepBatch]:
    return list(itertools.islice(batches, n))


def by_position(batches: list[StepBatch]) -> dict[int, tuple[str, float]]:
    return {
        s.position: (s.key, s.latent.mean[0, 0, 0, 0].item()) for batch in batches for row in batch.rows for s in row
    }


def test_the_same_sequence_on_any_number_of_ranks_and_readers(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    alone = take(loader(shards).batches(0), 4)
    expected = by_position(alone)
    assert sorted(expected) == list(range(48))
    assert [key for key, _ in (expected[p] for p in range(12))] == alone[0].keys
    for ranks, readers in itertools.product((1, 2, 3, 4), (1, 3)):
        found: dict[int, tuple[str, float]] = {}
        for rank in range(ranks):
            batches = take(loader(shards, rank, ranks, readers).batches(0), 4)
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


def test_nothing_that_fits_or_can_be_read(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "latents")
    with pytest.raises(DataError, match="none of its 23 latents fits"):
        LatentLoader(shards, BucketConfig(resolutions=(512,)), DataConfig(), 0, tokens_of, lambda b, t: 1.0)
    for tar in (tmp_path / "latents").glob("*.tar"):
        os.truncate(tar, 0)
    with pytest.raises(DataError, match="no readable sample of bucket"):
        take(loader(ShardSet.open(tmp_path / "latents")).batches(0), 1)


def write_torn(directory: Path) -> ShardSet:
    write_latents(directory)
    tar = min(directory.glob("*.tar"))
    os.truncate(tar, tar.stat().st_size // 3)
    return ShardSet.open(directory)


def test_the_replacement_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    shards = write_torn(tmp_path / "latents")
    alone = by_position(take(loader(shards).batches(0), 4))
    for ranks in (2, 3, 4):
        found = [by_position(take(loader(shards, rank, ranks).batches(0), 4)) for rank in range(ranks)]
        assert {p: s for part in found for p, s in part.items()} == alone


def test_a_replacement_is_of_the_same_bucket(tmp_path: Path) -> None:
    shards = write_torn(tmp_path / "latents")
    bucket_of = {shards.key(i): bucket for i, bucket in loader(shards).items}
    replaced = [r for b in take(loader(shards).batches(0), 4) for r in b.replacements]
    assert replaced
    assert all(bucket_of[r.key] == bucket_of[r.by] for r in replaced)
