"""How fast samples are read and decoded, beside other readers in the same run.

    python benchmarks/dataloader.py --json benchmarks/reports/NAME.json

Latents: samples of about 2 MB a second (global order, checksums, tensors; and all that `Loader` does), against webdataset's own
reader, litdata and MosaicML streaming (left out where they are not installed), whose bytes, shuffled, go through the same xxh3
Latents: samples of about 2 MB a second (global order, checksums, tensors; and all that `Loader` does), against webdataset's own
cache. Beside samples a second stand samples a CPU second, which depend less on what else the machine does.

Video: frames per second of one thread's CPU time, against PyAV alone: the same seek, resize and rgb24, into the same array. Once
with the same interpolation, once with PyAV's own, which halves the resolution of colours.
"""

import argparse
import importlib.metadata
import io
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import webdataset
import xxhash
from av.video.reformatter import Interpolation
from PIL import Image

from data_pipelines.batches.loader import DataConfig, Loader, cached_opener
from data_pipelines.batches.order import Order
from data_pipelines.buckets import Bucket, BucketConfig
from data_pipelines.samples.latents import About, latent_sample, read_latent
from data_pipelines.shards.index import Row
from data_pipelines.shards.tars import ShardSet, ShardWriter
from data_pipelines.shards.tensors import tensors_in
from data_pipelines.video.files import EXACT, decode
from data_pipelines.video.write import Mp4Writer
from megasora.observe.hardware import device_name

BUCKET = Bucket(65, 256, 448)
BUCKETS = BucketConfig(resolutions=(344,), frames=(65,), aspects=("16:9",))
AHEAD = 48  # samples that ours reads ahead
TOGETHER = 8  # of them as one job of a thread
CLIP = 17  # frames
STARTS = (0, 61, 143, 200)  # of clips in a video of 240 frames
Epoch = Callable[[], Iterator[object]]  # reads every sample once, in some order, and hashes it


def write_latents(directory: Path, samples: int) -> None:
    """One after the other a mean and a log-variance of 16 channels, bf16, and a text of 64 tokens: 2.0 MB."""
    shape = (16, 1 + (BUCKET.frames - 1) // 4, BUCKET.height // 8, BUCKET.width // 8)
    with ShardWriter(directory, samples_per_shard=50) as writer:
        for number in range(samples):
            torch.manual_seed(number)
            row = Row(f"clip-{number:06d}", 0, 0, "video", BUCKET.frames, 24.0, BUCKET.height, BUCKET.width, 64)
            moments, text = (torch.randn(shape), torch.randn(shape)), (torch.randn(64, 512), torch.zeros(0))
            about = About([("a clip", 1.0)], -1)
            writer.write(latent_sample(row, about, 0, BUCKET, moments, [text], 4, torch.bfloat16))


def reads(directory: Path, threads: int) -> Epoch:
    """What the loader does for every sample, in the global order: one range, its members, their checksum, tensors."""
    shards = ShardSet.open(directory)
    order = Order(shards.sizes, seed=1, window=16)

    def read(positions: range) -> list[object]:
        rows = [order(position) for position in positions if position < len(shards)]
        return [read_latent(shards.key(row), shards.read(row), BUCKET.frames) for row in rows]

    def epoch() -> Iterator[object]:
        jobs = [range(first, first + TOGETHER) for first in range(0, len(shards), TOGETHER)]
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[Future[list[object]]] = deque()
            for job in jobs:
                ahead.append(pool.submit(read, job))
                if len(ahead) * TOGETHER > AHEAD:
                    yield from ahead.popleft().result()
            for future in ahead:
                yield from future.result()

    return epoch


def whole_loader(directory: Path) -> Epoch:
    """With the balance of batches of 16. It goes on: what it has read ahead at the end counts for nothing."""
    shards, batch = ShardSet.open(directory), 16
    tokens = (1 + (BUCKET.frames - 1) // 4) * (BUCKET.height // 16) * (BUCKET.width // 16)
    config = DataConfig(global_batch=batch, capacity=-(-tokens // 128) * 128, prefetch=AHEAD // batch)
    loader = Loader(
        {shards: 1.0}, cached_opener(), BUCKETS, config, 1,
        tokens_of=lambda _: tokens, flops_of=lambda *_: 1.0, cost_of=lambda *_: 1.0,
    )  # fmt: skip
    assert loader.samples == len(shards), "a bucket that the latents do not fit"

    def epoch() -> Iterator[object]:
        with closing(loader.batches(0)) as batches:
            for _ in range(len(shards) // batch):
                yield from (sample for row in next(batches).rows for sample in row)

    return epoch


def plain_webdataset(shards: Path) -> Epoch:
    tars = sorted(str(path) for path in shards.glob("*.tar"))

    def epoch() -> Iterator[object]:
        for sample in webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False):
            yield opened(sample["safetensors"])

    return epoch


def litdata(shards: Path, directory: Path) -> Epoch:
    writer = import_module("litdata.streaming.writer").BinaryWriter(str(directory), chunk_bytes=100 << 20)
    for number, content in enumerate(contents(shards)):
        writer.add_item(number, content)
    writer.done()
    writer.merge()
    dataset = import_module("litdata").StreamingDataset(str(directory), shuffle=True, seed=1)
    return lambda: (opened(content) for content in dataset)


def mosaic(shards: Path, directory: Path) -> Epoch:
    streaming = import_module("streaming")
    with streaming.MDSWriter(out=str(directory), columns={"content": "bytes"}, size_limit=100 << 20) as writer:
        for content in contents(shards):
            writer.write({"content": content})
    dataset = streaming.StreamingDataset(local=str(directory), shuffle=True, batch_size=1)
    return lambda: (opened(sample["content"]) for sample in dataset)


PEERS = {"litdata": ("litdata", litdata), "mosaicml-streaming": ("streaming", mosaic)}


def opened(content: bytes | memoryview) -> object:
    """What every reader does with the bytes of a sample: hashes them, and opens their tensors where they lie."""
    xxhash.xxh3_64_intdigest(content)
    return tensors_in(memoryview(content))


def contents(shards: Path) -> Iterator[bytes]:
    samples = ShardSet.open(shards)
    return (bytes(samples.read(index)["safetensors"]) for index in range(len(samples)))


def latents(directory: Path, samples: int, rounds: int) -> dict[str, Any]:
    shards = directory / "shards"
    write_latents(shards, samples)
    readers = {
        "ours, 1 thread": reads(shards, 1),
        "ours, 2 threads": reads(shards, 2),
        "ours, the whole loader": whole_loader(shards),
        "webdataset": plain_webdataset(shards),
    }
    for name, (module, make) in PEERS.items():
        if find_spec(module):
            readers[name] = make(shards, directory / module)
        else:
            print(f"{name}: left out, {module} is not installed")
    rates: dict[str, list[float]] = {name: [] for name in readers}
    by_cpu: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, epoch in readers.items():
            begin, cpu = time.perf_counter(), time.process_time()
            found = sum(1 for _ in epoch())
            assert found == samples, f"{name}: {found} of {samples} samples"
            if turn:  # the first fills the page cache
                rates[name].append(samples / (time.perf_counter() - begin))
                by_cpu[name].append(samples / (time.process_time() - cpu))
    size = sum(path.stat().st_size for path in shards.glob("*.tar")) / samples
    return {"bytes_per_sample": round(size), "per second": summarize(rates), "per CPU second": summarize(by_cpu)}


def write_video(height: int, width: int, frames: int) -> bytes:
    """A moving picture with some noise, at the quality of `prepare`."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 32, width // 16 + 32, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width + 512, height + 512), Image.Resampling.BICUBIC)).astype(np.int16)
    target = io.BytesIO()
    writer = Mp4Writer(target, fps=24, height=height, width=width)
    for t in range(frames):
        frame = picture[t : t + height, 2 * t : 2 * t + width] + rng.integers(-6, 7, (height, width, 1))
        writer.add(frame.clip(0, 255).astype(np.uint8))
    writer.close()
    return target.getvalue()


def pyav_alone(source: bytes, start: int, height: int, width: int, **how: Any) -> np.ndarray:
    """What one would write by hand, for a file of which one knows that its rate is constant."""
    clip = np.empty((CLIP, height, width, 3), np.uint8)
    container: Any
    with av.open(io.BytesIO(source)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        target = round(start / (stream.average_rate * stream.time_base))
        container.seek(target, stream=stream)
        ratio = max(height / stream.height, width / stream.width)
        tall, wide = round(stream.height * ratio), round(stream.width * ratio)
        top, left, found = (tall - height) // 2, (wide - width) // 2, 0
        for frame in container.decode(stream):
            if frame.pts < target:
                continue
            picture = frame.reformat(width=wide, height=tall, format="rgb24", threads=1, **how)
            clip[found] = picture.to_ndarray()[top : top + height, left : left + width]
            found += 1
            if found == CLIP:
                break
    return clip


def ways_to_decode(source: bytes, height: int, width: int, *, scaled: bool) -> dict[str, Callable[[int], np.ndarray]]:
    clip: Any = {"frames": CLIP, "height": height, "width": width}
    kernel = Interpolation.BICUBIC if scaled else Interpolation.BILINEAR
    return {
        "ours, by number": lambda start: decode(source, start=start, **clip),
        "ours, by seconds": lambda start: decode(source, seconds=start / 24, **clip),
        "ours, by rate": lambda start: decode(source, start=start, fps=24.0, **clip),
        "PyAV": lambda start: pyav_alone(source, start, height, width, interpolation=kernel | EXACT),
        "PyAV, its own interpolation": lambda start: pyav_alone(source, start, height, width),
    }


def video(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": "frames of a clip per CPU second", "clip": CLIP, "starts": STARTS}
    for name, size, (height, width) in [
        ("720p to 256x448", (720, 1280), (256, 448)),
        ("720p to 256x256", (720, 1280), (256, 256)),
        ("256x256 as it is", (256, 256), (256, 256)),
    ]:
        ways = ways_to_decode(write_video(*size, frames=240), height, width, scaled=size != (height, width))
        repeat = 1 if size[0] == 720 else 6
        for where, starts in {
            "from the start": STARTS[:1] * len(STARTS) * repeat,
            "with seeks": STARTS * repeat,
        }.items():
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(rounds + 1):
                for way, run in ways.items():
                    begin = time.process_time()
                    for start in starts:
                        run(start)
                    if turn:
                        rates[way].append(CLIP * len(starts) / (time.process_time() - begin))
            found[f"{name}, {where}"] = summarize(rates)
    return found


def summarize(rates: dict[str, list[float]]) -> dict[str, Any]:
    return {
        name: {"median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in rates.items()
    }


def show(title: str, rates: dict[str, Any], base: str) -> None:
    print(f"\n{title}")
    for name, value in rates.items():
        if isinstance(value, dict):
            ratio = value["median"] / rates[base]["median"]
            spread = f"{value['least']:8.1f} .. {value['most']:8.1f}"
            print(f"  {name:28} {value['median']:8.1f}  ({spread})  {ratio:5.2f} of {base}")


def machine() -> dict[str, Any]:
    names = ("av", "litdata", "mosaicml-streaming", "numpy", "torch", "webdataset", "xxhash")
    installed = {found.name for found in importlib.metadata.distributions()}
    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names if name in installed},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=800, help="latents of 2 MB; a multiple of 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["latents", "video"])
    parser.add_argument("--directory", type=Path, help="for the files, which are deleted; four times the latents fit")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given buffer is not writable")  # of the peers' bytes
    result: dict[str, Any] = {"machine": machine(), "rounds": args.rounds}
    if args.only != "video":
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            result["latents"] = latents(Path(directory), args.samples, args.rounds)
        for unit in ("per second", "per CPU second"):
            show(f"Latents, samples {unit}", result["latents"][unit], "webdataset")
    if args.only != "latents":
        result["video"] = video(args.rounds)
        for name, rates in result["video"].items():
            if isinstance(rates, dict):
                show(f"{name}, frames per CPU second", rates, "PyAV")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
