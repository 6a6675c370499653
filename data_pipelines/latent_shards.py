"""Latent shards: what the VAE and the text encoder made of a shard, one latent shard for each, and the manifest that ties
them to the encoders. The encoders themselves are passed in."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from data_pipelines.buckets import Bucket, BucketConfig, choose_frames, choose_size
from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import MEDIA
from data_pipelines.shards import ShardFile, ShardSet
from data_pipelines.video import Undecodable, decode

MANIFEST = "latents.json"


@dataclass(frozen=True)
class Latent:
    """A sample as training sees it: the VAE's posterior [C, T, H, W] in latent frames and pixels, text [M, E] and its pooled
    vector [V] (empty where the encoder gives none), all fp32; frames a second; its class, -1 for none."""

    mean: Tensor
    logvar: Tensor
    text: Tensor
    pooled: Tensor
    fps: float
    label: int


def read_latent(key: str, members: dict[str, bytes], frames: int | None = None) -> Latent:
    """Opens a sample of a latent shard, cut to its first `frames` pixel frames. Raises BadSample if it is not one."""
    try:
        tensors = load(members["safetensors"])
        mean, logvar, text = tensors["mean"], tensors["logvar"], tensors["text"]
        facts = json.loads(members["json"])
        if frames is not None:
            length = 1 + (frames - 1) // facts["temporal_compression"]
            mean, logvar = mean[:, :length], logvar[:, :length]
        fps, label = float(facts["fps"]), int(facts["label"])
    except (KeyError, ValueError, TypeError, safetensors.SafetensorError) as error:
        raise BadSample(key, f"no latent: {error}") from None
    pooled = tensors["pooled"] if "pooled" in tensors else text.new_zeros(0)
    return Latent(mean.float(), logvar.float(), text.float(), pooled.float(), fps, label)


@dataclass(frozen=True)
class Encoders:
    """What turns samples into latents. `manifest` says which encoders these are: latents of others are stale."""

    video: Callable[[np.ndarray], tuple[Tensor, Tensor]]  # uint8 [T, H, W, 3] -> mean and log-variance [C, T', H', W']
    text: Callable[[str], tuple[Tensor, Tensor]]  # -> [M, E] and the pooled [V], which may be empty
    temporal_compression: int
    dtype: torch.dtype  # of the latents on disk
    manifest: dict[str, Any]


def encode_shards(
    source: ShardSet,
    output: Path,
    buckets: list[BucketConfig],
    encoders: Encoders,
    progress: Callable[[int, int, str], None],
    worker: int = 0,
    workers: int = 1,
) -> dict[str, dict[str, int]]:
    """Encodes every sample once for each size that the buckets want, a latent shard for each shard; returns the report.

    Shards already written under the same manifest are kept: a killed run goes on. Samples that cannot be used are skipped and
    counted by reason. Of several workers each takes its share of the shards. Raises DataError when the output belongs to
    other encoders or nothing can be used.
    """
    claim_manifest(output, encoders.manifest)
    kept: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    mine = range(worker, len(source.tars), workers)
    total, done = sum(len(source.rows_of(number)) for number in mine), 0
    for number in mine:
        tar = output / source.tars[number].name
        report = tar.with_suffix(".json")
        if not tar.exists():
            for key in _encode_shard(source, number, tar, report, buckets, encoders):
                done += 1
                progress(done, total, key)
        else:
            done += len(source.rows_of(number))
    for shard in source.tars:  # those of other workers too, as far as they have come
        report = (output / shard.name).with_suffix(".json")
        if report.exists():
            counts = json.loads(report.read_text())
            kept.update(counts["kept"])
            dropped.update(counts["dropped"])
    if mine and not kept:
        raise DataError(f"{source.directory}: no sample could be encoded ({dict(dropped)})")
    return {"kept": dict(sorted(kept.items())), "dropped": dict(sorted(dropped.items()))}


def _encode_shard(
    source: ShardSet, number: int, tar: Path, report: Path, buckets: list[BucketConfig], encoders: Encoders
) -> Iterator[str]:
    """Writes one latent shard, and before it its counts; yields the key of each sample dealt with."""
    kept: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    with ShardFile(tar) as shard:
        for index in source.rows_of(number):
            row = source.row(index)
            try:
                members = source.read(index)
                wanted = wanted_buckets(buckets, row.frames, row.height, row.width)
                if not wanted:
                    raise BadSample(row.key, "shorter than every bucket")
                caption = members["txt"].decode()
                text, pooled = encoders.text(caption)
                label = read_label(row.key, members)
                for bucket in wanted:
                    media = next(content for suffix, content in members.items() if suffix in MEDIA)
                    frames = decode(media, frames=bucket.frames, height=bucket.height, width=bucket.width)
                    mean, logvar = encoders.video(frames)
                    tensors = {"mean": mean, "logvar": logvar, "text": text} | (
                        {"pooled": pooled} if len(pooled) else {}
                    )
                    facts = {
                        "kind": "image" if bucket.frames == 1 else "video", "frames": bucket.frames, "fps": row.fps,
                        "height": bucket.height, "width": bucket.width, "source": row.key, "caption": caption,
                        "caption_tokens": len(text), "temporal_compression": encoders.temporal_compression, "label": label,
                    }  # fmt: skip
                    shard.write(
                        {
                            "__key__": f"{row.key}-{bucket.height}x{bucket.width}",
                            "json": facts,
                            "safetensors": save(
                                {name: t.to(encoders.dtype).contiguous() for name, t in tensors.items()}
                            ),
                        }
                    )
                    kept[str(bucket)] += 1
            except BadSample as bad:
                dropped[bad.reason] += 1
            except Undecodable as error:
                dropped[str(error)] += 1
            yield row.key
        write_whole(report, json.dumps({"kept": dict(kept), "dropped": dict(dropped)}))


def read_label(key: str, members: dict[str, bytes]) -> int:
    """The class in a sample's `cls` member, webdataset's name for it; -1 where there is none. Raises BadSample."""
    if "cls" not in members:
        return -1
    try:
        return int(members["cls"])
    except ValueError:
        raise BadSample(key, "its class is no number") from None


def wanted_buckets(configs: list[BucketConfig], frames: int, height: int, width: int) -> list[Bucket]:
    """The shapes in which a sample is encoded: each size once, at the longest duration that any stage uses of it."""
    longest: dict[tuple[int, int], int] = {}
    for config in configs:
        length = choose_frames(config, frames)
        for resolution in config.resolutions if length else ():
            size = choose_size(config, resolution, height, width)
            longest[size] = max(longest.get(size, 0), length or 0)
    return [Bucket(length, *size) for size, length in sorted(longest.items())]


def claim_manifest(output: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest into a new output directory, or compares it with the one that is there (DataError: they differ)."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / MANIFEST
    if path.exists():
        check_manifest(output, manifest)
        return
    write_whole(path, json.dumps(manifest, indent=1, sort_keys=True))


def write_whole(path: Path, text: str) -> None:
    """The file appears complete, whoever else writes it at the same time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory of latents. Raises DataError naming it."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}: no latents here ({MANIFEST}: {error}); run `megasora encode` first") from None
    assert isinstance(manifest, dict)
    return manifest


def check_manifest(directory: Path, wanted: dict[str, Any]) -> None:
    """Raises DataError naming the first thing in which the latents of a directory differ from `wanted`."""
    found = read_manifest(directory)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise DataError(f"{directory}: stale latents: {name} is {found.get(name)}, wanted {wanted.get(name)}")
