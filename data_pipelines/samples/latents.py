"""Latent shards as they lie on disk: what a sample holds, the manifest that ties it to the encoders that made it, and the check
that neither they nor the source have changed since."""

import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from data_pipelines.buckets import Bucket, BucketConfig, buckets_of
from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.index import KEY, Row
from data_pipelines.shards.storage import Storage
from data_pipelines.shards.tars import ShardSet
from data_pipelines.shards.tensors import tensors_in

MANIFEST = "latents.json"
REPORT = "report.json"
FORMAT = 3  # of the manifest
# What becomes of frames before the VAE; another rule is another name.
PREPROCESSING = "2: from the first frame on, the centre of the bucket's shape cut out and scaled to the bucket"


@dataclass(frozen=True)
class Latent:
    """A sample as training sees it: the VAE's posterior [C, T, H, W] in latent frames and pixels, text [M, E] and its pooled
    vector [V] (empty where the encoder gives none), as they were stored; frames a second; its class, -1 for none."""

    mean: Tensor
    logvar: Tensor
    text: Tensor
    pooled: Tensor
    fps: float
    label: int

    def pinned(self) -> "Latent":
        """The same in memory that a GPU copies from while it computes."""
        mean, logvar, text, pooled = (
            tensor.pin_memory() for tensor in (self.mean, self.logvar, self.text, self.pooled)
        )
        return Latent(mean, logvar, text, pooled, self.fps, self.label)


def read_latent(key: str, members: dict[str, Any], frames: int | None = None, choice: float = 0.0) -> Latent:
    """Opens a sample of a latent shard, cut to its first `frames` pixel frames; its tensors are views of what was read.

    Raises BadSample if it is not one.

    choice: a number in [0, 1) that picks one of its captions, each as often as its weight says.
    """
    try:
        tensors = tensors_in(memoryview(members["safetensors"]))
        facts = json.loads(members["json"])
        suffix = nth(pick(facts["caption_weights"], choice)) if "caption_weights" in facts else ""
        mean, logvar, text = tensors["mean"], tensors["logvar"], tensors["text" + suffix]
        if frames is not None:
            length = 1 + (frames - 1) // facts["temporal_compression"]
            mean, logvar = mean[:, :length], logvar[:, :length]
        fps, label = float(facts["fps"]), int(facts["label"])
    except (LookupError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise BadSample(key, f"no latent: {error}") from None
    pooled = tensors.get("pooled" + suffix, text.new_zeros(0))
    return Latent(mean, logvar, text, pooled, fps, label)


def pick(weights: Sequence[float], choice: float) -> int:
    """Which of them a number in [0, 1) falls on."""
    ends = list(accumulate(weights))
    return next((i for i, end in enumerate(ends) if choice * ends[-1] < end), len(ends) - 1)


def nth(number: int) -> str:
    """What the names of a sample's tensors for its caption of that number end in."""
    return f".{number}" if number else ""


@dataclass(frozen=True)
class About:
    """What a raw sample says besides its pictures: its captions with their weights, and its class."""

    captions: list[tuple[str, float]]
    label: int


def read_about(key: str, members: dict[str, bytes]) -> About:
    """Of a raw sample. Several captions stand in its json, the first of them also in its txt. Raises BadSample."""
    try:
        captions = [(members["txt"].decode(), 1.0)]
        if "json" in members:
            given = json.loads(members["json"]).get("captions")
            captions = [(str(text), float(weight)) for text, weight in given] if given else captions
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise BadSample(key, "its captions cannot be read") from None
    weights = [weight for _, weight in captions]
    if not all(text.strip() for text, _ in captions) or not all(0 < weight < math.inf for weight in weights):
        raise BadSample(key, "its captions are not texts with a weight above 0")
    return About(captions, read_label(key, members))


def read_label(key: str, members: dict[str, bytes]) -> int:
    """The class in a sample's `cls` member, webdataset's name for it; -1 where there is none. Raises BadSample."""
    if "cls" not in members:
        return -1
    try:
        return int(members["cls"])
    except ValueError:
        raise BadSample(key, "its class is no number") from None


def latent_sample(
    row: Row,
    about: About,
    variant: int,
    bucket: Bucket,
    moments: tuple[Tensor, Tensor],
    texts: list[tuple[Tensor, Tensor]],
    temporal_compression: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What `ShardFile.write` takes: mean and log-variance [C, T, H, W] of one size, and each caption's [M, E] and [V].

    `variant` numbers the sizes of one source sample, which stand next to each other.
    """
    tensors = {"mean": moments[0], "logvar": moments[1]}
    for number, (text, pooled) in enumerate(texts):
        tensors |= {"text" + nth(number): text} | ({"pooled" + nth(number): pooled} if len(pooled) else {})
    facts: dict[str, Any] = {
        "kind": "image" if bucket.frames == 1 else "video", "frames": bucket.frames, "fps": row.fps,
        "height": bucket.height, "width": bucket.width, "variant": variant, "source": row.key,
        "caption": about.captions[0][0], "caption_tokens": max(len(text) for text, _ in texts),
        "temporal_compression": temporal_compression, "label": about.label,
    }  # fmt: skip
    if len(about.captions) > 1:
        facts["caption_weights"] = [weight for _, weight in about.captions]
    if row.scores:
        facts["scores"] = row.scores
    return {
        "__key__": f"{ours(row.key)}-{bucket.height}x{bucket.width}",
        "json": facts,
        "safetensors": save({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}),
    }


def ours(key: str) -> str:
    """A key that `ShardFile.write` takes, of one that others gave: the same where it can be, unlike any other's where not."""
    if KEY.fullmatch(key):
        return key
    return f"{re.sub(r'[^0-9A-Za-z_-]+', '-', key).strip('-')[:60] or 'sample'}-{xxhash.xxh3_64_hexdigest(key.encode())[:8]}"


def describe_buckets(configs: list[BucketConfig]) -> list[dict[str, Any]]:
    """What of them decides how samples are encoded, for a manifest. How often a bucket is kept is for training to say."""
    every = [{k: v for k, v in asdict(config).items() if not k.startswith("keep_")} for config in configs]
    found: list[dict[str, Any]] = json.loads(json.dumps(every))
    return [one for i, one in enumerate(found) if one not in found[:i]]


def claim_manifest(output: Path, manifest: dict[str, Any], private: Path) -> None:
    """Writes the manifest into a new output directory, or compares it with the one that is there (DataError: they differ)."""
    path, hidden = output / MANIFEST, private / MANIFEST
    if not path.exists():
        hidden.write_text(json.dumps(manifest, indent=1, sort_keys=True))
        with suppress(FileExistsError):  # unlike a renaming, a link fails where somebody else was faster
            path.hardlink_to(hidden)
        hidden.unlink()
    compare(str(output), json.loads(path.read_text()), manifest)


def read_manifest(latents: Storage) -> dict[str, Any]:
    """The manifest of a directory of latents. Raises DataError naming it."""
    try:
        manifest = json.loads(latents.read(MANIFEST))
        if not isinstance(manifest, dict) or manifest["format"] != FORMAT:
            raise ValueError("another format, from another version")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{latents.address}: no latents here ({MANIFEST}: {error}); run `megasora encode`") from None
    return manifest


def compare(address: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises DataError naming the first thing in which the manifest of latents differs from `wanted`."""
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise DataError(f"{address}: stale latents: {name} is {found.get(name)}, wanted {wanted.get(name)}")


def check_buckets(address: str, manifest: dict[str, Any], wanted: list[BucketConfig]) -> None:
    """Raises DataError naming a bucket that training wants and that nothing was encoded for."""
    encoded: dict[tuple[int, int], int] = {}
    for bucket in (bucket for one in manifest["buckets"] for bucket in buckets_of(_bucket_config(one))):
        size = (bucket.height, bucket.width)
        encoded[size] = max(encoded.get(size, 0), bucket.frames)
    for bucket in (bucket for config in wanted for bucket in buckets_of(config)):
        if encoded.get((bucket.height, bucket.width), 0) < bucket.frames:
            raise DataError(
                f"{address}: stale latents: bucket {bucket} of the stages was not encoded; run `megasora encode` into "
                f"another directory"
            )


def _bucket_config(found: dict[str, Any]) -> BucketConfig:
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return BucketConfig(**given)


def check_source(latents: Storage) -> None:
    """Raises DataError where latents are not those of their source any more, naming the shard. A source that is not at hand
    cannot be asked, nor one behind a chain of fsspec's (`reference::...`): that names files of which the address says nothing."""
    try:
        report = json.loads(latents.read(REPORT))
        address, fingerprint = str(report["input"]), report["source"]
    except OSError:
        return
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{latents.address}/{REPORT}: damaged; run `megasora encode` again") from None
    if "::" in address:
        return
    try:
        source = ShardSet.open(address)
    except (OSError, DataError):
        return
    if source.fingerprint == fingerprint:
        return
    for tar, digest in source.digests.items():
        try:
            made_of = json.loads(latents.read(shard_report(tar)))["source"]
        except OSError:
            raise DataError(f"{latents.address}: stale latents: {source.address}/{tar} is not encoded yet") from None
        if made_of != digest:
            raise DataError(f"{latents.address}: stale latents: {source.address}/{tar} has changed since")
    raise DataError(f"{latents.address}: stale latents: {source.address} has fewer shards than it had")


def shard_report(tar: str) -> str:
    """The file beside a latent shard that says what it was made of."""
    return os.path.splitext(tar)[0] + ".json"  # noqa: PTH122 - a name, not a path
