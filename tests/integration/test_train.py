"""Training as a user meets it: whole commands, real processes, killed, resumed, misconfigured."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megasora.checkpoint.directory import list_checkpoints
from megasora.observe.metrics import StepMetrics, history, read_lines
from tests.integration.conftest import Road, identical
from tests.unit.test_boards import read_board, read_wandb

Wait = Callable[[Path, int, "subprocess.Popen[str]"], None]


def test_the_loss_falls_and_the_run_directory_is_complete(straight: Path) -> None:
    steps = history(straight)
    assert [m["step"] for m in steps] == list(range(1, 41))
    assert {m["stage"] for m in steps[:15]} == {"image"}
    assert {m["stage"] for m in steps[15:]} == {"video"}
    first, last = (sum(m["loss"] for m in part) / 5 for part in (steps[:5], steps[-5:]))
    assert last < 0.85 * first
    assert set(steps[0]) == set(StepMetrics.__dataclass_fields__)
    for line in steps:
        assert sum(line["bucket"].values()) == line["samples"] == 4
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_time_s"])
        assert set(line["parts"]) == {"microbatch", "forward_backward", "clip", "update"}
        assert 0 < sum(line["parts"].values()) + line["data_wait_s"] < line["step_time_s"]
    assert (straight / "config.yaml").exists()
    assert (straight / "logs" / "rank-00000.log").exists()
    assert [c.step for c in list_checkpoints(straight / "checkpoints")] == [20, 30, 40]
    assert (straight / "checkpoints" / "latest").read_text().strip() == "step-00000040"
    assert [e["event"] for e in read_lines(straight / "events.jsonl")].count("save") == 4
    samples = straight / "samples" / "step-00000040"
    assert (samples / "contact-sheet.png").stat().st_size > 0
    assert (samples / "00.mp4").stat().st_size > 0


def test_tensorboard_has_every_group_and_a_video(straight: Path) -> None:
    board = read_board(straight)
    assert {tag.split("/")[0] for tag in board.Tags()["scalars"]} == {"loss", "optim", "perf", "memory", "data"}
    image = board.Images("samples/00")[0]
    assert image.encoded_image_string.startswith(b"GIF8")
    assert board.Scalars("loss/train")[-1].value == pytest.approx(history(straight)[-1]["loss"])
    caption = board.Tensors("samples/00/text_summary")[0].tensor_proto.string_val[0]
    assert caption == b"a red circle"
    assert b"global_batch: 4" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    # The first point is of one step: its buckets' losses make up the whole one, which the tally has not touched.
    (first, *_) = history(straight)
    of_buckets = [count * board.Scalars(f"loss/bucket_{bucket}")[0].value for bucket, count in first["bucket"].items()]
    assert sum(of_buckets) / first["samples"] == pytest.approx(first["loss"], rel=1e-5)
    quantiles = [tag for tag in board.Tags()["scalars"] if tag.startswith("loss/q")]
    assert sorted(quantiles) == ["loss/q0.10", "loss/q0.30", "loss/q0.50", "loss/q0.70", "loss/q0.90"]
    assert board.Scalars("optim/weight_norm")[-1].value > 1
    assert 0 < board.Scalars("optim/update_ratio")[-1].value < 0.1


def test_boards_change_nothing_and_weights_and_biases_has_the_curves(road: Road, straight: Path) -> None:
    pytest.importorskip("wandb", reason="pip install -c constraints.txt 'megasora[wandb]'")
    with_wandb, without = road.directory / "wandb-run", road.directory / "no-boards"
    road.run("train", f"--run.dir={with_wandb}", "--run.steps=3", "--eval.every=3", "--observe.wandb=offline")
    road.run("train", f"--run.dir={without}", "--run.steps=3", "--observe.tensorboard=false")
    assert identical(with_wandb) == identical(without) == identical(straight)[:3]
    assert not (without / "tb").exists()
    (file,) = with_wandb.glob("wandb/offline-run-*/run-*.wandb")
    points = [
        {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for record in read_wandb(file)
        if record.HasField("history")
    ]
    losses = {int(point["step"]): float(point["loss/train"]) for point in points if "loss/train" in point}
    expected = {line["step"]: line["loss"] for line in history(straight)[:3]}
    assert losses == {1: expected[1], 3: expected[3]}
    assert any("samples/00" in point for point in points)


@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_and_resumed_is_identical_bit_for_bit(
    road: Road, straight: Path, wait_for_step: Wait, nproc: int
) -> None:
    reference = straight
    if nproc == 2:
        reference = road.directory / "straight2"
        road.run("train", f"--run.dir={reference}", nproc=2)
    run = road.directory / f"killed{nproc}"
    # Samples are drawn on the way, which must change nothing.
    process = road.start("train", f"--run.dir={run}", "--eval.every=6", nproc=nproc)
    wait_for_step(run, 27, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = history(run)[-1]["step"]
    assert 27 <= reached < 40
    saved = max(info.step for info in list_checkpoints(run / "checkpoints") if info.complete)
    assert saved in (10, 20, 30)  # on a slow disk the later ones may have been under way
    road.run("train", f"--run.dir={run}", nproc=nproc)
    lines = list(read_lines(run / "metrics.jsonl"))
    again = [line["step"] for line in lines if line["attempt"] == 1]
    assert again[0] == saved + 1
    assert identical(run) == identical(reference)
    assert not {m["attempt"] for m in history(run)[:saved]} - {0}


def test_one_and_two_processes_have_the_same_losses(road: Road, straight: Path) -> None:
    for layout in ("dp2", "dp2,zero3"):
        run = road.directory / f"two-{layout}"
        road.run("train", f"--run.dir={run}", f"--parallel.layout={layout}", nproc=2)
        for alone, pair in zip(history(straight), history(run), strict=True):
            assert pair["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert (pair["order"], pair["bucket"], pair["lr"]) == (alone["order"], alone["bucket"], alone["lr"])
            assert (pair["world"], pair["layout"]) == (2, layout)


@pytest.mark.long  # the matrix of layouts has shorter ones
def test_another_layout_goes_on_with_the_same_run(road: Road, straight: Path) -> None:
    run = road.directory / "moved"
    road.run("train", f"--run.dir={run}", "--run.steps=20", "--parallel.layout=dp2,zero3", nproc=2)
    road.run("train", f"--run.dir={run}")
    for alone, moved in zip(history(straight), history(run), strict=True):
        assert moved["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert moved["order"] == alone["order"]


def test_a_signal_saves_and_exits_75(road: Road, straight: Path, wait_for_step: Wait) -> None:
    run = road.directory / "preempted"
    process = road.start("train", f"--run.dir={run}", nproc=2)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "SIGUSR1" in err
    stopped = history(run)[-1]["step"]
    assert list_checkpoints(run / "checkpoints")[-1].step == stopped
    road.run("train", f"--run.dir={run}", nproc=2)
    reference = road.directory / "straight2"
    if not reference.exists():
        road.run("train", f"--run.dir={reference}", nproc=2)
    assert identical(run) == identical(reference)


def copy_of(run: Path, name: str) -> Path:
    target = run.with_name(name)
    shutil.copytree(run, target)
    return target


def test_a_changed_config_is_refused_unless_allowed(road: Road, straight: Path) -> None:
    run = copy_of(straight, "changed")
    before = (run / "config.yaml").read_text()
    more = (f"--run.dir={run}", "--run.steps=41", "--optim.lr=2e-3")
    done = road.run("train", *more, code=2)
    assert len(done.stderr.splitlines()) == 1
    assert "optim.lr=0.002" in done.stderr
    assert "0.004" in done.stderr
    assert (run / "config.yaml").read_text() == before
    road.run("train", *more, "--run.allow_change=[optim.lr]")
    assert history(run)[-1]["step"] == 41


def test_changed_data_is_refused(road: Road, straight: Path) -> None:
    run = copy_of(straight, "other-data")
    latents = road.directory / "other-latents"
    shutil.copytree(road.directory / "latents", latents)
    last = max(latents.glob("*.tar"))
    last.unlink()
    last.with_suffix(".arrow").unlink()
    done = road.run("train", f"--run.dir={run}", f"--data.path={latents}", "--run.steps=41", code=3)
    assert len(done.stderr.splitlines()) == 1
    assert "not the data" in done.stderr
    assert f"1 missing ({last.name}) of" in done.stderr
    assert "--data.segments=open" in done.stderr


def test_a_damaged_checkpoint_is_passed_over_or_exits_4(road: Road, straight: Path) -> None:
    run = copy_of(straight, "damaged")
    shard = next((run / "checkpoints" / "step-00000040").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = road.run("train", f"--run.dir={run}", f"--run.resume={shard.parent}", "--run.steps=41", code=4)
    assert shard.name in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = road.run("train", f"--run.dir={run}", "--run.steps=41")
    assert "passing over" in done.stderr
    assert [m["step"] for m in read_lines(run / "metrics.jsonl") if m["attempt"] == 1] == list(range(31, 42))
    assert identical(run)[:40] == identical(straight)


def test_unreadable_latents_are_replaced_logged_and_counted(road: Road) -> None:
    latents, run = road.directory / "torn-latents", road.directory / "torn"
    shutil.copytree(road.directory / "latents", latents)
    tar = min(latents.glob("*.tar"))
    os.truncate(tar, tar.stat().st_size // 2)
    arguments = (f"--run.dir={run}", f"--data.path={latents}")
    road.run("train", *arguments, "--run.steps=20", "--run.seed=5")
    bad = [e for e in read_lines(run / "events.jsonl") if e["event"] == "bad_sample"]
    assert bad
    assert all("truncated" in e["reason"] for e in bad)
    assert history(run)[-1]["bad_samples"] == len(bad)
    quarantined = list(read_lines(run / "quarantine.jsonl"))
    assert [(q["key"], q["reason"]) for q in quarantined] == [(e["key"], e["reason"]) for e in bad]
    assert {q["shard"] for q in quarantined} == {tar.name}
    again = road.directory / "torn2"
    road.run("train", f"--run.dir={again}", f"--data.path={latents}", "--run.steps=20", "--run.seed=5", nproc=2)
    for one, two in zip(history(run), history(again), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert history(again)[-1]["bad_samples"] == len(bad)


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("--model.channels=8", 2, "model.channels=8: the latents have 16"),
        ("--data.capacity=100", 2, "nearest is 128"),
        ("--model.attention=flash2", 2, "megasora[gpu]"),
        ("--parallel.layout=dp2", 2, "valid here: dp1"),
        ("--data.path=nowhere", 3, "nowhere"),
        ("--run.resume=nowhere", 4, "run.resume=nowhere: no checkpoint here"),
        ("--run.init_from=nowhere", 4, "run.init_from=nowhere: no checkpoint here"),
        ("--model.patch=[1,3,2]", 2, "model.patch=[1, 3, 2]: does not divide"),
        ("--stages.1.buckets.frames=[2]", 2, "does not divide by the VAE's 4x8x8"),
    ],
)
def test_what_cannot_run_is_one_line_and_creates_nothing(road: Road, override: str, code: int, message: str) -> None:
    run = road.directory / "never"
    done = road.run("train", f"--run.dir={run}", override, code=code)
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not run.exists()


@pytest.mark.parametrize("key", ["encode.vae", "encode.text"])
def test_what_samples_are_made_with_is_looked_for_before_the_first_step(road: Road, key: str) -> None:
    run = road.directory / "never"
    samples = ["--eval.every=5", '--eval.prompts=["a ball"]', f"--{key}=nowhere"]
    done = road.run("train", f"--run.dir={run}", *samples, code=2)
    assert f"{key}=nowhere: no encoder here, and eval.every=5 makes samples with it" in done.stderr
    assert not run.exists()


def test_two_processes_print_one_line(road: Road) -> None:
    run = road.directory / "never2"
    for override, code in (("--optim.lrr=1", 2), ("--data.global_batch=3", 2), ("--data.path=nowhere", 3)):
        done = road.run("train", f"--run.dir={run}", override, nproc=2, code=code)
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert not run.exists()


def test_run_resume_none_never_overwrites(road: Road, straight: Path) -> None:
    done = road.run("train", f"--run.dir={straight}", "--run.resume=none", code=2)
    assert "run.resume=none" in done.stderr
    far = f"--checkpoint.durable={straight / 'checkpoints'}"  # another run's copies
    done = road.run("train", f"--run.dir={road.directory / 'never3'}", "--run.resume=none", far, code=2)
    assert "give another checkpoint.durable" in done.stderr
    done = road.run("train", f"--run.dir={straight}", "--run.seed=9", code=2)  # other noise, another order
    assert "run.seed=9: the checkpoint" in done.stderr


def test_init_from_takes_the_weights_only(road: Road, straight: Path) -> None:
    run = road.directory / "init"
    source = straight / "checkpoints" / "step-00000040"
    road.run("train", f"--run.dir={run}", "--run.steps=1", f"--run.init_from={source}")
    assert history(run)[0]["step"] == 1
    assert history(run)[0]["loss"] < 0.95 * history(straight)[0]["loss"]


def test_muon_trains(road: Road) -> None:
    run = road.directory / "muon"
    road.run("train", f"--run.dir={run}", "--optim.name=muon", "--run.steps=12")
    losses = [m["loss"] for m in history(run)]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_steps_are_profiled_on_every_rank(road: Road, straight: Path) -> None:
    run = road.directory / "profiled"
    road.run("train", f"--run.dir={run}", "--run.steps=5", "--profile.steps=3-4", nproc=2)
    assert [m["loss"] for m in history(run)] == pytest.approx([m["loss"] for m in history(straight)[:5]], rel=1e-4)
    for rank in (0, 1):
        table = (run / f"profile/rank-0000{rank}.txt").read_text()
        assert "aten::" in table
        assert re.search(r"all_reduce +\d+ calls", table)
        assert "no snapshot of the memory" in table
        trace = json.loads((run / f"profile/rank-0000{rank}.pt.trace.json").read_text())
        names = [event.get("name") for event in trace["traceEvents"]]
        assert sum(name == "aten::_foreach_norm" for name in names) == 2  # two steps
    road.run("train", f"--run.dir={run}", "--profile.steps=50", code=2)


def test_bench_states_what_is_in_fp8(road: Road) -> None:
    quick = ("--data=synthetic", "--json", "--bench.warmup=0", "--bench.steps=1", "--precision.precision=bf16")
    result = json.loads(road.run("bench", *quick, "--precision.fp8=block").stdout)
    assert 0.2 < result["fp8_share"] < 0.9
    assert result["mfu_fp8"] > 0
    result = json.loads(road.run("bench", *quick).stdout)
    assert (result["fp8_share"], result["mfu_fp8"]) == (0, pytest.approx(result["mfu"]))


def test_ckpt_lists_and_verifies(road: Road, straight: Path) -> None:
    listed = subprocess.run(
        [*road.command("ckpt")[:3], "ckpt", "ls", str(straight), "--json"], capture_output=True, text=True, check=True
    )
    assert [c["step"] for c in json.loads(listed.stdout)["checkpoints"]] == [20, 30, 40]


def test_sample_writes_videos_and_a_sheet(road: Road, straight: Path) -> None:
    done = road.run("sample", f"--run.dir={straight}", "--json", f"--sample.output={road.directory / 'out'}")
    files = json.loads(done.stdout)["files"]
    assert [Path(f).name for f in files] == ["00.mp4", "contact-sheet.png"]
    before = {file: file.read_bytes() for file in (straight / "samples").rglob("*") if file.is_file()}
    again = road.run("sample", f"--run.dir={straight}", "--json")
    (_, sheet) = (Path(file) for file in json.loads(again.stdout)["files"])
    assert sheet.parent.name.startswith("step-00000040-")
    assert before == {file: file.read_bytes() for file in before}  # the run's own stay
    missing = road.run("sample", f"--run.dir={straight}", "--sample.checkpoint=/no/step", code=4)
    assert "/no/step: not a good checkpoint: manifest.json: no such directory" in missing.stderr
    bad = road.run("sample", f"--run.dir={straight}", "--sample.height=50", code=2)
    assert "sample.height=50: nearest that the model can make is 48" in bad.stderr
    road.run("sample", f"--run.dir={road.directory / 'no-run'}", code=4)


def test_what_is_not_finite_is_skipped_and_recorded(road: Road) -> None:
    latents, run = road.directory / "nan-latents", road.directory / "nan"
    shutil.copytree(road.directory / "latents", latents)
    null = latents / "null_text.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(null).items()}, null)
    road.run("train", f"--run.dir={run}", f"--data.path={latents}", "--run.steps=12")  # a tenth of captions is dropped
    skipped = [e for e in read_lines(run / "events.jsonl") if e["event"] == "skipped"]
    losses = {m["step"]: m["loss"] for m in history(run)}
    assert 0 < len(skipped) < 12
    assert {e["step"] for e in skipped} == {step for step, loss in losses.items() if loss is None}
    assert all(len(e["samples"]) == 4 for e in skipped)
    assert any(losses[step] is not None for step in range(skipped[0]["step"], 13))  # the weights were spared
    every = ("--stages.0.drop_captions=1", "--stages.0.steps=30")
    done = road.run("train", f"--run.dir={run}2", f"--data.path={latents}", *every, code=3)
    assert "20 steps without an update" in done.stderr.splitlines()[-1]


def test_what_cannot_fit_is_refused_before_anything_is_built(road: Road) -> None:
    """A model of 20 G parameters."""
    run = road.directory / "too-large"
    large = ["--model.width=8192", "--model.heads=64", "--model.ffn=32768", "--model.depth=18"]
    done = road.run("train", f"--run.dir={run}", *large, nproc=2, code=2)
    assert "parallel.layout=dp2,zero2: needs " in done.stderr
    assert "of each process of this machine; nearest is parallel.recompute=full" in done.stderr
    assert not run.exists()
