"""`megasora plan` beyond one plan: the longest video, calibration, the page, what `train` asks before it begins."""

import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megasora.bench import TEXT_TOKENS
from megasora.cli import main
from megasora.config import load_config, to_dict
from megasora.errors import ConfigError
from megasora.models.vae import VideoVAE
from megasora.observe.charts import COLOURS, Bar, round_ticks, stacked_bars
from megasora.observe.hardware import DEVICES, GIB, Device, Efficiency, this_cpu
from megasora.parallel.layout import Layout, parse_layout
from megasora.planner.calibrate import FITTED, calibrate
from megasora.planner.check import check_plan
from megasora.planner.encoders import encoder_bytes
from megasora.planner.memory import memory
from megasora.planner.mixture import find_mixture
from megasora.planner.plan import check_unit, has_room, job_of
from megasora.planner.profiles import find_device
from megasora.planner.step_time import link_of, step_time
from megasora.planner.watch import watching
from megasora.training_data import synthetic_data

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "wan-1.3b.yaml")
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_longest_video_is_the_last_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, "--config", CONFIG, "--world", "8", "--longest", "--json")
    found = json.loads(out)
    most = found["longest"]
    assert (code, found["fits"]) == (0, True), err
    assert (most["frames"] - 1) % 4 == 0
    assert most["seconds"] == pytest.approx(most["frames"] / most["fps"])
    # Half of the devices hold about half: activations are nearly all of it.
    code, out, _ = plan(capsys, "--config", CONFIG, "--world", "4", "--longest", "--json")
    assert 0.4 < json.loads(out)["longest"]["frames"] / most["frames"] < 0.55


def bench_config(width: int, frames: int, size: int, batch: int, layout: str) -> Any:
    model = [f"--model.width={width}", "--model.heads=4", f"--model.ffn={4 * width}", "--model.depth=4"]
    stage = f"--stages=[{{buckets: {{resolutions: [{size}], frames: [{frames}], aspects: ['1:1']}}}}]"
    data = [f"--data.global_batch={batch}", "--data.capacity=4096", "--vae.preset=4x8x8", "--model.text_width=64"]
    return load_config(None, [*model, stage, *data, f"--parallel.layout={layout}"])


TRUTH = Efficiency(gemm=0.61, attention=0.23, memory=0.45, link=0.7, network=0.37, operation=31e-6, overlap=0.0)
BENCHED = [
    (128, 17, 64, 2, "dp1"), (256, 17, 128, 2, "dp1"), (512, 5, 128, 2, "dp1"), (256, 65, 128, 2, "dp1"),
    (512, 33, 128, 4, "dp2,zero1"), (256, 17, 128, 4, "dp1,cp2"), (512, 17, 128, 4, "dp2,zero3"), (64, 17, 256, 2, "dp1"),
    (128, 1, 64, 8, "tp2"), (512, 5, 64, 8, "dp4,tp2,zero1"), (256, 9, 128, 8, "dp4,zero3"),
]  # fmt: skip


def write_reports(directory: Path, device: Device, noise: float = 0.0) -> list[Path]:
    """As `bench` writes them, of steps that take what the device says."""
    files = []
    for number, case in enumerate(BENCHED):
        config = bench_config(*case)
        layout = parse_layout(config.parallel.layout)
        config = check_unit(config, layout)
        steps = find_mixture(config, config.stages[0], TEXT_TOKENS).steps(layout)
        job = job_of(config, layout, steps, kernels=False)
        seconds = step_time(job, steps, device).seconds * (1 + noise * (-1) ** number)
        gemm = device.peaks["fp32"] * (1 + number / 10)  # a quicker machine in each run
        seconds *= device.peaks["fp32"] / gemm
        report = {
            "layout": str(layout), "world": layout.world, "data": "synthetic", "gemm_flops": gemm,
            "parts": {"data_wait": 9.0, "microbatch": 9.0, "forward_backward": 0.8 * seconds, "clip": 0.15 * seconds,
                      "update": 0.05 * seconds},
            "config": to_dict(config), "machine": {"device": "Some CPU"},
        }  # fmt: skip
        files.append(directory / f"{number}.json")
        files[-1].write_text(json.dumps(report))
    return files


def test_calibration_finds_the_efficiencies_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of the network: a node of this device is two ranks."""
    device = replace(this_cpu({"fp32": 5e10}), node=2, efficiency=TRUTH)
    files = write_reports(tmp_path, device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megasora.planner.calibrate.this_cpu", lambda peaks, share: replace(this_cpu(peaks), node=2))
        fitted, runs = calibrate(files, TEXT_TOKENS, firmness=1e-4)
    for name in FITTED:
        assert getattr(fitted.efficiency, name) == pytest.approx(getattr(TRUTH, name), rel=0.03), name
    assert all(run.predicted(fitted) == pytest.approx(run.seconds, rel=0.01) for run in runs)

    profile = tmp_path / "mine.json"
    code, out, err = plan(capsys, "--calibrate", *map(str, files[:5]), "--profile", str(profile), "--json")
    assert code == 0, err
    assert len(json.loads(out)["runs"]) == 5
    assert find_device(str(profile), "fp32").peaks["fp32"] == 5e10
    code, out, _ = plan(capsys, "--config", str(DEMO), f"--gpu={profile}", "--json")
    assert (code, json.loads(out)["gpu"]) == (0, "cpu")


def test_what_is_no_report_is_refused_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    for file in (tmp_path / "x.json", tmp_path / "none.json"):
        code, out, err = plan(capsys, "--calibrate", str(file))
        assert (code, out, err.count("\n"), str(file) in err) == (2, "", 1, True)


def test_a_gpu_that_is_not_known_is_not_fitted_as_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_reports(tmp_path, this_cpu({"fp32": 5e10}))[0]
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {"machine": {"device": "NVIDIA GH200 480GB", "gpu": True}}))
    code, out, err = plan(capsys, "--calibrate", str(file))
    assert (code, out) == (2, "")
    assert f"{file}: of NVIDIA GH200 480GB, whose peaks are not known" in err


class Tags(HTMLParser):
    """Everything opened is closed, and nothing is fetched."""

    VOID = ("meta", "rect", "line", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        assert not {"src", "href"} & dict(attrs).keys()
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.html"
    code, _, err = plan(capsys, "--config", CONFIG, "--world", "4", "--search", "--html", str(file), "--json")
    assert code == 0, err
    page = file.read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("svg") == 4
    assert not any(word in page for word in ("http://", "https://", "<script")) or page.count("http://") == page.count(
        'xmlns="http://www.w3.org/2000/svg"'
    )
    code, _, err = plan(
        capsys, "--config", CONFIG, "--world", "8", "--html", str(tmp_path / "no" / "x.html"), "--longest"
    )
    assert (code, "--html=" in err) == (2, True)


def test_a_search_goes_across_nodes_where_it_may(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 24 devices in nodes of 8: Ulysses groups of 12, which hold all heads."""
    asked = ("--config", CONFIG, "--world", "24", "--search", "--top", "9999", "--json")
    wide = []
    for allowed in ("false", "true"):
        code, out, err = plan(capsys, *asked, f"--parallel.across_nodes={allowed}")
        assert code == 0, err
        wide.append([row["layout"] for row in json.loads(out)["layouts"] if "cp12x" in row["layout"]])
    assert wide[0] == []
    assert wide[1]


def test_bars_are_as_long_as_their_parts() -> None:
    drawn = stacked_bars([Bar("a", {"x": 3.0, "y": 1.0}), Bar("b", {"y": 2.0})], "s", limit=5.0)
    widths = [float(part.split('"')[0]) for part in drawn.split(' width="')[1:] if 'height="18"' in part]
    assert widths[0] == pytest.approx(3 * widths[1], rel=0.01)
    assert widths[2] == pytest.approx(2 * widths[1], rel=0.01)
    assert round_ticks(0.37) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35])
    assert round_ticks(8.0) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_rows_of_several_widths_cost_what_they_share() -> None:
    """With one width for all, a dynamic pool is the plain context-parallel group; short rows alone say nothing."""
    config = load_config(Path(CONFIG), ["--data.global_batch=64"])
    config = check_unit(config, parse_layout("dp2,cp4:dynamic,zero2"))
    device, stage = DEVICES["H100"], config.stages[-1]
    mixture = find_mixture(config, stage, None)
    times = {}
    for text in ("dp2,cp4,zero2", "dp2,cp4:dynamic,zero2"):
        layout = parse_layout(text)
        steps = mixture.steps(layout)
        job = job_of(config, layout, steps, "full")
        times[text] = step_time(job, steps, device)
        assert times[text].samples == pytest.approx(64)
        assert times[text].model_flops == pytest.approx(times["dp2,cp4,zero2"].model_flops)
    plain, dynamic = times.values()
    assert dynamic.parts["communication"] < 0.8 * plain.parts["communication"]  # short rows have none in attention
    wide = replace(steps[0].rows[0][0], width=4)
    narrow = replace(wide, length=wide.length // 4, width=1, samples=wide.samples[:1])
    assert job_at(job, wide).place().tokens == narrow.length
    assert job_at(job, narrow).place().ulysses == 1
    assert memory(job_at(job, wide)).total == pytest.approx(memory(job_at(job, replace(wide, width=0))).total)


def job_at(job: Any, row: Any) -> Any:
    return replace(job, row=row)


def test_encoders_that_run_beside_training_take_memory() -> None:
    config = load_config(None, ["--data.latents=online", "--encode.vae=none", "--vae.width=8",
                                "--stages=[{buckets: {resolutions: [64], frames: [17], aspects: ['1:1']}}]"])  # fmt: skip
    vae = VideoVAE(config.vae).eval()
    with torch.no_grad(), watching() as watch:
        for _ in vae.encode_stream(iter([torch.zeros(1, 3, 17, 64, 64)])):
            pass
    ours = encoder_bytes(config) - sum(t.numel() * t.element_size() for t in vae.state_dict().values())
    assert ours == pytest.approx(watch.peak(), rel=0.15)
    assert encoder_bytes(replace(config, data=replace(config.data, latents="cached"))) == 0
    layout = Layout()
    steps = find_mixture(config, config.stages[0], 8).steps(layout)
    with_them, without = (memory(job_of(config, layout, steps, encoders=size)).total for size in (1e9, 0.0))
    assert with_them - without == 1e9


def small() -> Any:
    return load_config(DEMO, ["--data.global_batch=4", "--data.capacity=8192"])


def test_train_refuses_what_cannot_fit() -> None:
    config = small()
    data = synthetic_data(config, 16)
    layout = parse_layout("dp1")
    device = replace(DEVICES["H100"], memory=3.05 * GIB)
    with pytest.raises(ConfigError) as error:
        check_plan(config, layout, device, data, advise=True)
    assert "parallel.layout=dp1: needs " in str(error.value)
    assert "stage " in str(error.value)
    willing = replace(config, parallel=replace(config.parallel, plan_check="warn"))
    assert any("needs" in line for line in check_plan(willing, layout, device, data, advise=True))
    assert check_plan(config, layout, DEVICES["H100"], data, advise=False) == []
    on_cpu = replace(this_cpu({}), memory=0.05 * GIB)
    with pytest.raises(ConfigError, match="of each process of this machine"):
        check_plan(config, layout, on_cpu, data, advise=True)


def test_train_is_told_of_a_better_layout() -> None:
    config = check_unit(load_config(Path(CONFIG), ["--data.global_batch=64"]), parse_layout("dp2,tp4"))
    data = synthetic_data(config, 128)
    (*_, line) = check_plan(config, parse_layout("dp2,tp4:nosp"), DEVICES["H100"], data, advise=True)
    assert "see megasora plan --search" in line
    good = replace(config, parallel=replace(config.parallel, recompute="selective"))
    assert check_plan(good, parse_layout("dp8,zero2"), DEVICES["H100"], data, advise=True) == []


def test_the_question_draws_no_random_number() -> None:
    config = small()
    data, layout = synthetic_data(config, 16), parse_layout("dp1")
    before = torch.get_rng_state()
    check_plan(config, layout, this_cpu({}), data, advise=True)
    assert torch.equal(before, torch.get_rng_state())


def test_room_is_what_a_plan_says() -> None:
    """`has_room` is the quick question of `Plan.fits`."""
    config = small()
    layout = parse_layout("dp1")
    steps = find_mixture(config, config.stages[0], 16).steps(layout)
    job = job_of(config, layout, steps)
    needed = sum(memory(job).parts.values())
    assert has_room(job, replace(DEVICES["H100"], memory=1.5 * needed, reserved=0.0))
    assert not has_room(job, replace(DEVICES["H100"], memory=needed, reserved=0.0))


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine: the page is not looked at")
def test_the_page_in_a_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture stays in .cache/screenshots. Bars have their colours and lengths, and nothing leaves the page."""
    page, picture = tmp_path / "plan.html", ROOT / ".cache" / "screenshots" / "plan.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.unlink(missing_ok=True)
    code, out, err = plan(capsys, "--config", CONFIG, "--world", "64", "--search", "--html", str(page), "--json")
    assert code == 0, err
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1100,3400",
    ]
    subprocess.run([*browser, f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={picture}", page.as_uri()],
                   check=True, timeout=90, capture_output=True)  # fmt: skip
    seen = np.asarray(Image.open(picture).convert("RGB")).astype(int)  # [height, width, 3]
    found = json.loads(out)
    attention, products = (pixels(seen, COLOURS[n]) for n in (0, 1))
    assert min(attention, products) > 5000
    # In charts of time blue and yellow are what a step has most of; in those of memory likewise.
    bars = [found["step_time_by_part"]] + [row["step_time_by_part"] for row in found["layouts"] if row["fits"]]
    rooms = [found["memory_by_part"]] + [row["memory_by_part"] for row in found["layouts"] if row["fits"]]
    times, parts = (sorted(first, key=lambda name: -first[name])[:2] for first in (bars[0], rooms[0]))
    scale = [CHART / max(sum(bar.values()) for bar in bars), CHART / found["memory_limit_bytes"]]
    planned = [
        BAR * sum(unit * sum(bar[names[n]] for bar in some)
                  for unit, some, names in ((scale[0], bars, times), (scale[1], rooms, parts)))
        for n in (0, 1)
    ]  # fmt: skip
    assert attention / products == pytest.approx(planned[0] / planned[1], rel=0.05)
    assert (seen[:, -20:] == 255).all()
    assert (seen[-20:] == 255).all()


CHART, BAR = 620.0, 18.0


def pixels(picture: Any, colour: str) -> int:
    """How many of a colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((abs(picture - wanted).max(axis=-1) <= 2).sum())


@pytest.mark.parametrize(("layout", "node", "where"), [("pp8,dp8", 8, "link"), ("pp2,tp2,dp8", 8, "network")])
def test_the_ranks_of_a_pipeline_stage_share_a_node_where_they_fit(layout: str, node: int, where: str) -> None:
    """Of which Muon broadcasts to each other."""
    assert link_of("peers", parse_layout(layout), node) == where
