"""`encode` by many processes, killed, slow and long at work: the same bytes, in constant memory, nobody idle."""

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.buckets import BucketConfig
from data_pipelines.encode.run import Encoders, encode_shards
from data_pipelines.shards.tars import ShardSet, ShardWriter
from data_pipelines.video.write import encode_mp4
from megasora.encoders import check_latents, open_facts, open_online
from megasora.models.vae import VAEConfig, VideoVAE
from megasora.schema import Config, EncodeConfig, Stage
from megasora.verbs.encode import encode
from tests.clips import noise, video_bytes

SMALL = VAEConfig(width=4, multipliers=(1, 2, 2), latent_channels=4)
BUCKETS = BucketConfig(resolutions=(32, 48), frames=(1, 5, 9), aspects=("1:1", "3:2"), upscale=4.0)

# Processes are forked from a server that has imported torch already, and never computed with it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["megasora.verbs.encode"])


def write_clips(directory: Path, shards: int, per_shard: int = 3) -> None:
    with ShardWriter(directory, samples_per_shard=per_shard) as writer:
        for i in range(shards * per_shard):
            frames = (9, 1, 9, 6, 1)[i % 5]
            about: dict[str, Any] = {"kind": "video", "frames": frames, "fps": 8.0, "height": 32, "width": 48}
            if i % 4 == 0:
                about["captions"] = [[f"clip {i}", 1.0], [f"the clip that has number {i}", 2.0]]
            content = video_bytes(noise(frames, 32, 48, seed=i), 8)[: 300 if i == 5 else None]
            writer.write({"__key__": f"clip-{i:03d}", "mp4": content, "txt": f"clip {i}", "json": about})


def random_vae(config: VAEConfig, seed: int = 0) -> VideoVAE:
    """Every weight counts, unlike in a fresh one."""
    torch.manual_seed(seed)
    vae = VideoVAE(config)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return vae


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    directory = tmp_path_factory.mktemp("encode")
    write_clips(directory / "shards", shards=4, per_shard=4)
    random_vae(SMALL).save(directory / "vae")
    settings = EncodeConfig(
        input=str(directory / "shards"), output=str(directory / "latents"), vae=str(directory / "vae")
    )
    return Config(encode=settings, stages=(Stage(buckets=BUCKETS),))


@pytest.fixture(scope="module")
def whole(config: Config) -> Path:
    """The latents of a run that nobody disturbed."""
    process = start(config, Path(config.encode.output))
    process.join()
    assert process.exitcode == 0
    return Path(config.encode.output)


def start(config: Config, output: Path, **changes: Any) -> BaseProcess:
    settings = replace(config.encode, output=str(output), **changes)
    process = FORKS.Process(target=encode_alone, args=(replace(config, encode=settings),))
    process.start()
    return process


def encode_alone(config: Config) -> None:
    torch.set_num_threads(1)
    encode(config)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under it, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_killed_at_20_random_instants_the_bytes_are_the_same(config: Config, whole: Path, tmp_path: Path) -> None:
    expected, rng = contents(whole), random.Random(0)
    assert {"latents.json", "null_text.safetensors", "quarantine.jsonl", "report.json", "shard-000003.tar"} <= set(
        expected
    )
    begin = time.monotonic()
    start(config, tmp_path / "timed").join()
    seconds = time.monotonic() - begin
    interrupted = starts = through = 0
    while interrupted < 20 or starts > 0:  # the last one, too, is let through
        output = tmp_path / str(through)
        process = start(config, output)
        process.join(rng.uniform(0, 0.6 * seconds) if interrupted < 20 else None)
        interrupted += process.is_alive()
        process.kill()
        process.join()
        starts += 1
        assert starts < 60, "it does not get through"
        if process.exitcode == 0:
            assert contents(output) == expected
            through, starts = through + 1, 0
        else:
            assert process.exitcode == -signal.SIGKILL


def test_many_at_once_and_one_of_them_killed(config: Config, whole: Path, tmp_path: Path) -> None:
    processes = [start(config, tmp_path, claim_seconds=2.0) for _ in range(3)]
    time.sleep(0.3)
    processes[0].kill()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes[1:]] == [0, 0]
    assert contents(tmp_path) == contents(whole)


# Balance


def encode_at_a_pace(source: str, output: str, pause: float, results: Any) -> None:
    torch.set_num_threads(1)

    def video(pieces: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        for piece in pieces:
            time.sleep(pause)
            mean = torch.from_numpy(piece[:, :1, :1, :1]).permute(0, 4, 1, 2, 3).float()  # [B, 3, 1, 1, 1]
            yield mean, torch.zeros_like(mean)

    def text(captions: list[str]) -> list[tuple[Tensor, Tensor]]:
        return [(torch.ones(1, 2), torch.zeros(0)) for _ in captions]

    encoders = Encoders(video, text, 4, torch.float32, {"format": 3})
    begin = time.monotonic()
    report = encode_shards(
        ShardSet.open(source), Path(output), [BUCKETS], encoders, lambda *_: None, batch_pixels=1, claim_seconds=5
    )
    results.put((pause, report, time.monotonic() - begin))


def test_a_fast_worker_takes_more_shards(tmp_path: Path) -> None:
    source, output = tmp_path / "shards", tmp_path / "latents"
    write_clips(source, shards=16, per_shard=1)
    results = FORKS.Queue()
    processes = [
        FORKS.Process(target=encode_at_a_pace, args=(str(source), str(output), pause, results)) for pause in (0.1, 0.8)
    ]
    for process in processes:
        process.start()
    (_, fast, _), (_, slow, _) = sorted((results.get(timeout=60) for _ in processes), key=lambda result: result[0])
    for process in processes:
        process.join()
    assert fast["speed"]["shards"] + slow["speed"]["shards"] == 16
    assert fast["speed"]["shards"] >= 3 * slow["speed"]["shards"] > 0
    assert {name: fast[name] for name in fast if name != "speed"} == {
        name: slow[name] for name in slow if name != "speed"
    }
    assert json.loads((output / "report.json").read_text())["kept"] == fast["kept"]
    assert not list(output.glob(".*"))


# Memory


def encode_and_measure(config: Config, results: Any) -> None:
    torch.set_num_threads(1)
    encode(config)
    results.put(peak())


def peak() -> float:
    """The most memory that this process ever had, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def measure(config: Config, directory: Path, seconds: int, megapixels: float) -> float:
    """The peak of a process that encodes one clip of 128 x 128 at 12 frames a second, in MB."""
    frames = 12 * seconds + 1
    shards = directory / f"{seconds}"
    if not shards.exists():
        ramp = np.linspace(0, 200, 128, dtype=np.uint8)
        clip = np.broadcast_to(ramp[None, :, None, None], (frames, 128, 128, 3)) + (np.arange(frames) % 50)[
            :, None, None, None
        ].astype(np.uint8)
        encode_mp4(clip, 12.0, directory / "clip.mp4")
        with ShardWriter(shards) as writer:
            about = {"kind": "video", "frames": frames, "fps": 12.0, "height": 128, "width": 128}
            content = (directory / "clip.mp4").read_bytes()
            writer.write({"__key__": "clip", "mp4": content, "txt": "a clip", "json": about})
    output = directory / f"latents-{seconds}-{megapixels}"
    settings = replace(config.encode, input=str(shards), output=str(output), batch_megapixels=megapixels)
    buckets = BucketConfig(resolutions=(128,), frames=(frames,), aspects=("1:1",))
    long = replace(config, encode=settings, stages=(Stage(buckets=buckets),))
    results = FORKS.Queue()
    process = FORKS.Process(target=encode_and_measure, args=(long, results))
    process.start()
    found: float = results.get(timeout=120)
    process.join()
    return found


def test_a_long_clip_takes_no_more_memory_than_a_short_one(config: Config, tmp_path: Path) -> None:
    short, long = (measure(config, tmp_path, seconds, megapixels=1.0) for seconds in (20, 60))
    assert long < 1.03 * short
    at_once = measure(config, tmp_path, 120, megapixels=1000.0)
    assert at_once > long + 0.7 * 120 * 12 * 128 * 128 * 3 / 1e6


# What encodes while training


@pytest.mark.parametrize("vae", [SMALL, VAEConfig()])
def test_online_gives_the_bits_of_the_cache(config: Config, tmp_path: Path, vae: VAEConfig) -> None:
    from data_pipelines.buckets import Bucket
    from data_pipelines.samples.latents import read_latent

    random_vae(vae).save(tmp_path / "vae")
    settings = replace(
        config.encode, output=str(tmp_path / "latents"), vae=str(tmp_path / "vae"), latent_dtype="float32"
    )
    encode(replace(config, encode=settings))
    facts, opener = open_online(settings, torch.device("cpu"))
    assert torch.equal(facts.null.tokens, open_facts(settings.output).null.tokens)
    assert facts.manifest["vae"] == open_facts(settings.output).manifest["vae"]
    source, latents = ShardSet.open(settings.input), ShardSet.open(settings.output)
    places = {source.key(i): i for i in range(len(source))}
    for i in range(len(latents)):
        row, members = latents.row(i), latents.read(i)
        bucket = Bucket(row.frames, row.height, row.width)
        key = json.loads(members["json"])["source"]
        choice = i / len(latents)
        found = opener.finish(key, opener.decode(key, source.read(places[key]), bucket), bucket, choice)
        cached = read_latent(row.key, members, choice=choice)
        for name in ("mean", "logvar", "text", "pooled", "fps", "label"):
            one, two = getattr(found, name), getattr(cached, name)
            assert torch.equal(one, two) if isinstance(one, Tensor) else one == two, (row.key, name)


def test_training_is_told_which_latents_are_stale(config: Config, whole: Path, tmp_path: Path) -> None:
    from data_pipelines.errors import DataError

    check_latents(whole, config.encode, [BUCKETS])
    check_latents(whole, replace(config.encode, vae=str(tmp_path / "gone")), [BUCKETS])
    with pytest.raises(DataError, match="stale latents: bucket 13x"):
        check_latents(whole, config.encode, [replace(BUCKETS, frames=(1, 13))])
    random_vae(SMALL, seed=1).save(tmp_path / "vae")
    with pytest.raises(DataError, match=r"foreign latents: made with another VAE than encode.vae=.*/vae"):
        check_latents(whole, replace(config.encode, vae=str(tmp_path / "vae")), [BUCKETS])
    with pytest.raises(DataError, match=r"foreign latents: made with another VAE than encode.vae=pixels"):
        check_latents(whole, replace(config.encode, vae="pixels"), [BUCKETS])
    (tmp_path / "text").mkdir()
    for path in (whole / "text").iterdir():
        (tmp_path / "text" / path.name).write_bytes(path.read_bytes())
    check_latents(whole, replace(config.encode, text=str(tmp_path / "text")), [BUCKETS])
    (tmp_path / "text" / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"foreign latents: made with another text encoder than encode.text="):
        check_latents(whole, replace(config.encode, text=str(tmp_path / "text")), [BUCKETS])
    half = tmp_path / "half"
    half.mkdir()
    (half / "latents.json").write_bytes((whole / "latents.json").read_bytes())
    with pytest.raises(DataError, match="run `megasora encode` again"):
        open_facts(half)
