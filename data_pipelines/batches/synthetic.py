"""Latents drawn at random for every bucket: what a benchmark reads when it has no files."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from data_pipelines.buckets import BucketConfig, buckets_of


class SyntheticLatents:
    """As many samples of each bucket; stands where a `ShardSet` of latents would. Noise of unit variance, as good as any."""

    PER_BUCKET = 8

    def __init__(
        self,
        buckets: list[BucketConfig],
        channels: int,
        compression: tuple[int, int, int],
        text: tuple[int, int],
        pooled: int = 0,
        classes: int = 0,
    ) -> None:
        self.address = "synthetic"
        self.channels, self.compression, self.text = channels, compression, text
        self.pooled, self.classes = pooled, classes
        every = sorted({bucket for config in buckets for bucket in buckets_of(config)})
        self.rows = [bucket for bucket in every for _ in range(self.PER_BUCKET)]
        columns = {
            "frames": [bucket.frames for bucket in self.rows],
            "height": [bucket.height for bucket in self.rows],
            "width": [bucket.width for bucket in self.rows],
            "caption_tokens": [text[0]] * len(self.rows),
            "variant": [0] * len(self.rows),
        }
        self._columns = {name: np.array(values) for name, values in columns.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
        yield tuple(self._columns.get(name, np.full(len(self), np.nan)) for name in names)

    def shard_of(self, index: int) -> str:
        return self.address

    def key(self, index: int) -> str:
        return f"synthetic-{index:06d}"

    def read(self, index: int) -> dict[str, Any]:
        bucket, (t, h, w) = self.rows[index], self.compression
        shape = (self.channels, 1 + (bucket.frames - 1) // t, bucket.height // h, bucket.width // w)
        generator = torch.Generator().manual_seed(index)
        tensors = {
            "mean": torch.randn(shape, generator=generator),
            "logvar": torch.full(shape, -6.0),
            "text": torch.randn(self.text, generator=generator),
        }
        if self.pooled:
            tensors["pooled"] = torch.randn(self.pooled, generator=generator)
        facts = {"temporal_compression": t, "fps": 24.0, "label": index % self.classes if self.classes else -1}
        return {"safetensors": memoryview(bytearray(save(tensors))), "json": json.dumps(facts).encode()}
