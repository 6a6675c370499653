"""Videos longer than anything trained on, chunk by chunk and window by window: whole, and in memory that does not grow."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.video.files import probe
from megasora.cli import main
from tests.integration.conftest import Road

CHUNKS = ("--model.temporal=chunk_causal", "--model.chunk=1", "--model.window=2")
WINDOWS = ("--sample.window=9", "--sample.overlap=5")
QUICK = ("--sample.steps=2", "--sample.guidance=1.0", "--sample.fps=24")


@pytest.fixture(scope="module")
def chunked(road: Road) -> Path:
    """Three steps of a chunk-causal model: what it says does not matter here."""
    run = road.directory / "chunked"
    road.run("train", f"--run.dir={run}", "--run.steps=3", "--checkpoint.every=3", *CHUNKS)
    return run


def sample(road: Road, run: Path, seconds: int, *how: str) -> dict[str, Any]:
    output = road.directory / f"{run.name}-{seconds}"
    frames = f"--sample.frames={24 * seconds + 1}"
    done = road.run("sample", f"--run.dir={run}", frames, f"--sample.output={output}", *how, *QUICK, "--json")
    result = json.loads(done.stdout)
    about = probe(Path(result["files"][0]))
    assert (about.frames, about.fps) == (24 * seconds + 1, 24)
    return dict(result)


@pytest.mark.parametrize("seconds", [20, pytest.param(60, marks=pytest.mark.long)])
def test_a_rollout_takes_no_more_memory_for_more_seconds(road: Road, chunked: Path, seconds: int) -> None:
    short, long = (sample(road, chunked, n, *CHUNKS) for n in (5, seconds))
    assert long["peak_memory_bytes"] < 1.1 * short["peak_memory_bytes"]


@pytest.mark.parametrize("seconds", [20, pytest.param(60, marks=pytest.mark.long)])
def test_windows_take_no_more_memory_for_more_seconds(road: Road, straight: Path, seconds: int) -> None:
    short, long = (sample(road, straight, n, *WINDOWS) for n in (5, seconds))
    assert long["peak_memory_bytes"] < 1.1 * short["peak_memory_bytes"]


@pytest.mark.parametrize(
    ("how", "line"),
    [
        (("--sample.frames=41", "--sample.window=10"), "sample.window=10: nearest that the model can make is 9"),
        (("--sample.frames=41", "--sample.window=9", "--sample.overlap=4"), "sample.overlap=4: nearest that the model"),
        (("--sample.first=none.png",), "sample.first=none.png"),
        (("--sample.extend=none.mp4",), "sample.extend=none.mp4"),
        (("--sample.loop=true",), "sample.loop=true: give the picture"),
        (("--sample.labels=[1, 2]",), "sample.labels=[1, 2]: as many as sample.prompts, 1"),
    ],
)
def test_what_cannot_be_made_is_one_line(
    road: Road, straight: Path, capsys: pytest.CaptureFixture[str], how: tuple[str, ...], line: str
) -> None:
    assert main(["sample", "--config", str(road.config), f"--run.dir={straight}", *how]) == 2
    error = capsys.readouterr().err
    assert line in error
    # Which attention was taken is logged once a process, by whichever test comes first.
    assert len([said for said in error.splitlines() if not said.startswith("attention: ")]) == 1
