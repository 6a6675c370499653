"""What training reads: latents or raw clips, several data sets, data that changes under a run."""

import json
from pathlib import Path

import pytest

from megasora.observe.metrics import history, read_lines
from tests.integration.conftest import Road, identical


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in history(run)]


def test_clips_encoded_on_the_way_train_as_cached_latents_do(road: Road) -> None:
    exact = road.directory / "exact-latents"
    road.run("encode", f"--encode.output={exact}", "--encode.latent_dtype=float32")
    text = f"--encode.text={exact / 'text'}"
    cached, online = road.directory / "cached", road.directory / "online"
    more = ("--run.steps=6", "--stages.0.steps=3", "--checkpoint.every=3")
    road.run("train", f"--run.dir={cached}", f"--data.path={exact}", text, *more)
    raw = (f"--data.path={road.directory / 'shards'}", "--data.latents=online", text)
    road.run("train", f"--run.dir={online}", *raw, "--data.workers=1", "--eval.every=6", *more)
    assert (online / "samples" / "step-00000006" / "00.mp4").exists()
    assert losses(online) == pytest.approx(losses(cached), rel=1e-5)
    assert [m["bucket"] for m in history(online)] == [m["bucket"] for m in history(cached)]


def test_data_changed_on_purpose_opens_a_segment(road: Road) -> None:
    run = road.directory / "segments"
    steps = ("--stages.0.steps=4", "--checkpoint.every=2")
    road.run("train", f"--run.dir={run}", "--run.steps=6", *steps)
    more = (f"--run.dir={run}", *steps, "--data.global_batch=6")
    done = road.run("train", *more, "--run.steps=8", code=2)
    assert "data.global_batch=6: the checkpoint" in done.stderr
    assert "--data.segments=open" in done.stderr
    road.run("train", *more, "--run.steps=8", "--data.segments=open")
    road.run("train", *more, "--run.steps=10")  # nothing differs from the last checkpoint any more
    begun = [(e["segment"], e["step"]) for e in read_lines(run / "events.jsonl") if e["event"] == "segment"]
    assert begun == [(0, 0), (1, 4), (2, 6), (2, 8)]
    assert [m["samples"] for m in history(run)] == [4] * 6 + [6] * 4
    straight = road.directory / "segments-straight"
    road.run("train", f"--run.dir={straight}", "--run.steps=6", *steps)
    road.run("train", f"--run.dir={straight}", *more[1:], "--run.steps=10", "--data.segments=open")
    assert identical(straight) == identical(run)


def test_a_mixture_of_two_data_sets(road: Road) -> None:
    run = road.directory / "mixture"
    latents = road.directory / "latents"
    again = road.directory / "again-latents"
    road.run("encode", f"--encode.output={again}", f"--encode.text={latents / 'text'}")
    mixture = f"--data.mixture={{{latents}: 3, {again}: 1}}"
    road.run("train", f"--run.dir={run}", mixture, f"--encode.text={latents / 'text'}", "--run.steps=3")
    (begun,) = [e for e in read_lines(run / "events.jsonl") if e["event"] == "segment"]
    alone = road.run("train", f"--run.dir={road.directory / 'alone'}", "--run.steps=1")
    assert "latents in" not in alone.stderr
    (one,) = [e for e in read_lines(road.directory / "alone" / "events.jsonl") if e["event"] == "segment"]
    assert begun["samples"] == 2 * one["samples"]
    assert begun["buckets"] == {name: 2 * count for name, count in one["buckets"].items()}


def test_costs_measured_by_bench_balance_the_next_run(road: Road) -> None:
    costs = road.directory / "costs.json"
    measured = ("--data=synthetic", f"--bench.costs={costs}", "--bench.steps=1", "--bench.warmup=0")
    report = json.loads(road.run("bench", *measured, "--parallel.recompute=auto", "--json").stdout)
    assert report["config"]["parallel"]["recompute"] == "none"  # what was settled on, for those who read the report
    refused = road.run("bench", *measured, nproc=2, code=2)
    assert f"bench.costs={costs}: measured on one process, not on 2" in refused.stderr
    run = road.directory / "measured"
    road.run("train", f"--run.dir={run}", f"--data.costs={costs}", "--run.steps=2", nproc=2)
    assert all(m["imbalance"] >= 1 for m in history(run))
    costs.write_text('{"1x48x80": -1}')
    done = road.run("train", f"--run.dir={run}", f"--data.costs={costs}", "--run.steps=3", code=2)
    assert f"data.costs={costs}: positive seconds" in done.stderr
