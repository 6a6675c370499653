import resource
from pathlib import Path

from megasora.observe.metrics import Journal, Lines, StepMetrics, console_line, history, read_lines, read_steps
from megasora.resume import logged_replacements


def line(attempt: int, step: int, loss: float) -> StepMetrics:
    return StepMetrics(
        attempt=attempt, time=0.0, step=step, stage="main", loss=loss, grad_norm=1.0, lr=1e-4, samples=4, tokens=100,
        bucket={"1x64x64": 4}, order="0", bad_samples=0, step_time_s=0.5, data_wait_s=0.001, parts={}, tokens_per_s=200.0,
        tflops_per_device=0.1, mfu=0.5, imbalance=1.0, padding=0.0, peak_memory_bytes=2**30, world=1, layout="dp1",
    )  # fmt: skip


def test_of_one_step_the_last_attempt_counts_and_torn_lines_do_not(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    first.event("start", step=0)
    for step in (1, 2, 3):
        first.step(line(first.attempt, step, loss=step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 0, "step": 4, "lo')  # killed here
    second = Journal(tmp_path)
    second.event("start", step=2)
    assert second.attempt == 1
    for step in (3, 4):
        second.step(line(second.attempt, step, loss=10 * step))
    second.close()
    assert [(m["step"], m["attempt"], m["loss"]) for m in history(tmp_path)] == [
        (1, 0, 1),
        (2, 0, 2),
        (3, 1, 30),
        (4, 1, 40),
    ]
    assert len(list(read_lines(tmp_path / "metrics.jsonl"))) == 5


def test_steps_that_a_later_attempt_did_not_go_on_from_do_not_count(tmp_path: Path) -> None:
    """The first dies at 5 with a checkpoint of 3, the second at once, the third goes on from it to 4: 5 was in vain too."""
    for start, end in ((0, 5), (3, 3), (3, 4)):
        journal = Journal(tmp_path)
        journal.event("start", step=start)
        for step in range(start + 1, end + 1):
            journal.step(line(journal.attempt, step, loss=step))
        journal.close()
    assert [(m["step"], m["attempt"]) for m in history(tmp_path)] == [(1, 0), (2, 0), (3, 0), (4, 2)]
    assert history(tmp_path, ("step", "loss"))[-1] == {"step": 4, "loss": 4}
    assert [counts for _, counts in read_steps(tmp_path)] == [True] * 3 + [False] * 2 + [True]


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.step(line(0, 1, loss=float("nan")))
    journal.close()
    assert history(tmp_path)[0]["loss"] is None


def test_the_console_line() -> None:
    text = console_line(line(0, 120, 0.4312), last=400, seconds_left=3905.0)
    assert text.startswith("step 120/400 main loss 0.4312 grad 1.000 lr 1.0e-04 |")
    assert "200 tok/s" in text
    assert "MFU 50 %" in text
    assert "ETA 1:05:05" in text


def test_a_replay_takes_the_replacements_of_the_log(tmp_path: Path) -> None:
    for segment, by in ((0, "b"), (1, "c")):
        journal = Journal(tmp_path)
        journal.event("bad_sample", segment=segment, position=7, key="a", reason="torn", by=by)
        journal.close()
    assert logged_replacements(tmp_path) == {0: {7: "b"}, 1: {7: "c"}}


def test_lines_wait_where_the_disk_is_full(tmp_path: Path) -> None:
    """The kernel's own refusal: no file of this process may grow any more. Nothing is lost, and nothing is torn."""
    lines = Lines(tmp_path / "x.jsonl")
    lines.write({"step": 1})
    size = (tmp_path / "x.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
    try:
        for step in (2, 3):
            lines.write({"step": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in read_lines(tmp_path / "x.jsonl")] == [1]
    lines.write({"step": 4})
    lines.close()
    assert [line["step"] for line in read_lines(tmp_path / "x.jsonl")] == [1, 2, 3, 4]
