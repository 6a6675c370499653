"""Trains the causal video VAE on the shards: reconstruction and KL, where asked for LPIPS and a GAN, images and clips mixed.
Writes it to encode.vae.

--vae.preset=4x8x8, 4x16x16 or 8x32x32 sets the compression.

examples:
  megasora train-vae --config configs/demo.yaml --train_vae.steps=1000 --encode.vae=data/vae
"""

import argparse
import json
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.batches.order import Order
from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.index import MEDIA
from data_pipelines.shards.tars import ShardSet
from data_pipelines.video.files import decode
from data_pipelines.video.reader import Undecodable
from megasora.cli import add_config_argument
from megasora.config import load_config
from megasora.device import pick_device
from megasora.errors import ConfigError, made_by, writing
from megasora.models.vae import VideoVAE
from megasora.observe.logs import log, start_logging
from megasora.observe.progress import Progress
from megasora.schema import Config
from megasora.seeding import fold
from megasora.vae_training import train_vae


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_argument(parser, "vae", "train_vae", "encode")
    parser.add_argument("--json", action="store_true", help="print the last metrics as one JSON object")


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    start_logging(None, rank=0)
    check_crops(config)
    wanted = config.train_vae
    with made_by("prepare", "encode.input"):
        clips = RandomCrops(ShardSet.open(Path(config.encode.input)), wanted.size, wanted.seed)
    held_out = (
        RandomCrops(ShardSet.open(Path(wanted.eval_input)), wanted.size, wanted.seed) if wanted.eval_input else clips
    )
    output = f"encode.vae={config.encode.vae}"
    with writing(output):  # known before the training, not after it
        Path(config.encode.vae).mkdir(parents=True, exist_ok=True)
    if not wanted.lpips:
        log.info("train_vae.lpips is empty: the perceptual loss is off (no weights of LPIPS come with this package)")
    torch.manual_seed(fold(wanted.seed, "vae"))
    vae = VideoVAE(config.vae).to(pick_device())
    with Progress("train-vae") as progress:

        def report(step: int, metrics: dict[str, float]) -> None:
            line = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            progress(step, wanted.steps, line)
            if wanted.eval_every and step % wanted.eval_every == 0:
                log.info("step %d: %s", step, line)

        metrics = train_vae(vae, clips, wanted, report, held_out)
    with writing(output):
        vae.save(Path(config.encode.vae))
    if args.json:
        print(json.dumps(metrics))
    skipped = f", {len(clips.bad)} unreadable samples skipped" if clips.bad else ""
    found = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    log.info("%s%s -> %s", found, skipped, config.encode.vae)


def check_crops(config: Config) -> None:
    """Raises ConfigError unless the crops are whole blocks of the VAE."""
    t, s, _ = config.vae.compression
    frames, size = config.train_vae.frames, config.train_vae.size
    if (frames - 1) % t:
        near = 1 + t * max(1, round((frames - 1) / t))
        raise ConfigError(f"train_vae.frames={frames}: this VAE takes 1 + a multiple of {t}; the nearest is {near}")
    if size % s:
        raise ConfigError(
            f"train_vae.size={size}: this VAE takes multiples of {s}; the nearest is {s * max(1, round(size / s))}"
        )


class RandomCrops:
    """(step, batch, frames) -> [B, 3, T, H, W]: square crops of the shards' clips, a function of the seed and the step.

    Samples that are shorter, smaller or cannot be read are passed over; DataError when none is left.
    """

    def __init__(self, shards: ShardSet, size: int, seed: int) -> None:
        self.shards, self.size, self.seed = shards, size, seed
        self.sample_at = Order(shards.sizes, fold(seed, "clips"), window=16)
        self.bad: dict[int, str] = {}
        self.decoded = lru_cache(maxsize=64)(self._decode)

    def __call__(self, step: int, batch: int, frames: int) -> Tensor:
        rng = np.random.default_rng(fold(self.seed, "crop", step))
        first = (step * batch) % (1 << 40)
        clips: list[np.ndarray] = []
        for place in range(first, first + batch + len(self.shards)):
            if len(clips) == batch:
                break
            video = self.decoded(self.sample_at(place))
            if video is None or len(video) < frames:
                continue
            T, H, W, _ = video.shape
            t, y, x = (rng.integers(room + 1) for room in (T - frames, H - self.size, W - self.size))
            crop = video[t : t + frames, y : y + self.size, x : x + self.size]
            clips.append(crop[:, :, ::-1] if rng.integers(2) else crop)
        if not clips:
            why = next(iter(self.bad.values()), "too short or too small")
            raise DataError(
                f"{self.shards.address}: no sample of {frames} frames and {self.size} pixels a side ({why})"
            )
        clips = list(islice(cycle(clips), batch))  # again, where there are fewer samples than a batch
        return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1

    def _decode(self, index: int) -> np.ndarray | None:
        row = self.shards.row(index)
        if min(row.height, row.width) < self.size:
            return None
        try:
            members = self.shards.read(index)
            media = next(content for suffix, content in members.items() if suffix in MEDIA)
            return decode(media, frames=row.frames, height=row.height, width=row.width)
        except (BadSample, Undecodable) as error:
            self.bad[index] = str(error)
            return None
