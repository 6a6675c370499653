"""What the boards get, read back by their own readers, and that a run does without one that fails."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megasora.errors import ConfigError
from megasora.observe.boards import TensorBoard, WeightsAndBiases, check_wandb
from megasora.observe.metrics import Journal
from tests.unit.test_metrics import line

SETTINGS = {
    "optim.lr": 1e-3,
    "model.family": "dit",
    "observe.tensorboard": True,
    "run.steps": None,
    "stages.0.tasks": {},
}
VIDEO = np.zeros((3, 16, 24, 3), np.uint8)


def read_board(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tb"))
    board.Reload()
    return board


def test_tensorboard_has_curves_buckets_videos_captions_and_the_config(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    journal = Journal(tmp_path)
    journal.open_board(lambda: TensorBoard(tmp_path, SETTINGS, "optim:\n  lr: 0.001\n"))
    for step in (1, 2, 3):
        metrics = line(0, step, loss=1 / step)
        journal.step(metrics if step < 3 else replace(metrics, bucket={"9x64x64": 4}))
        if step != 2:
            journal.scalars(metrics, {"q0.10": 0.5 * step}, {"weight_norm": 7.0})
    journal.evaluation({"loss": 0.25}, 3)
    journal.sample("samples/00", VIDEO, 8.0, "a cat", 3)
    journal.close()
    board = read_board(tmp_path)
    curves = {tag: [(p.step, p.value) for p in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert curves["loss/q0.10"] == [(1, 0.5), (3, 1.5)]
    assert curves["optim/weight_norm"] == [(1, 7.0), (3, 7.0)]
    assert curves["eval/loss"] == [(3, 0.25)]
    assert curves["data/bucket_1x64x64"] == [(1, 4.0), (3, 4.0)]  # all samples since the point before
    assert curves["data/bucket_9x64x64"] == [(3, 4.0)]
    assert board.Images("samples/00")[0].encoded_image_string.startswith(b"GIF8")
    text = board.Tags()["tensors"]
    assert {"config/text_summary", "samples/00/text_summary"} <= set(text)
    assert b"lr: 0.001" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    session = HParamsPluginData.FromString(
        board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    assert session.hparams["optim.lr"].number_value == 1e-3
    assert session.hparams["run.steps"].string_value == "None"


def read_wandb(file: Path) -> list[Any]:
    """The records of a run that has ended. A process of wandb's writes them, which may be done a moment after the run."""
    deadline = time.monotonic() + 30
    while not (found := _records(file)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def _records(file: Path) -> list[Any]:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    store, found = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def test_weights_and_biases_offline(tmp_path: Path) -> None:
    """Two starts of a run, which are one run there. It repeats a step, as after a fault."""
    pytest.importorskip("wandb", reason="pip install -c constraints.txt 'megasora[wandb]'")
    run = tmp_path / "a-run"
    run.mkdir()
    for steps in ((1, 2), (2, 3)):
        time.sleep(1)  # wandb names a directory by the second
        journal = Journal(run)
        journal.open_board(lambda: WeightsAndBiases(run, "offline", "tests", SETTINGS))
        for step in steps:
            journal.scalars(line(0, step, loss=1 / step), {"q0.10": float("nan")}, {})
        journal.sample("samples/00", VIDEO, 8.0, "a cat", steps[1])
        journal.close()
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(list(run.glob("wandb/offline-run-*/files/media/videos/samples/*.gif"))) == 2
    points, starts = [], []
    for file in files:
        for record in read_wandb(file):
            if record.HasField("run"):
                starts.append((record.run.run_id, record.run.project, record.run.display_name))
                settings = {item.key or item.nested_key[0]: item.value_json for item in record.run.config.update}
                assert settings["optim.lr"] == "0.001"
            elif record.HasField("history"):
                values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                if "loss/train" in values:
                    points.append((int(values["step"]), float(values["loss/train"])))
    assert starts == 2 * [((run / "wandb" / "id").read_text(), "tests", "a-run")]
    assert points == [(1, 1.0), (2, 0.5), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_a_run_goes_on_without_a_board_that_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb", reason="pip install -c constraints.txt 'megasora[wandb]'")
    (tmp_path / "wandb").write_text("in the way")
    journal = Journal(tmp_path)
    journal.open_board(lambda: WeightsAndBiases(tmp_path, "offline", "tests", SETTINGS))
    journal.open_board(lambda: TensorBoard(tmp_path, SETTINGS, ""))
    assert [type(board) for board in journal.boards] == [TensorBoard]
    journal.sample("samples/00", VIDEO[0], 8.0, "of no length", 1)  # cannot be written
    assert journal.boards == []
    journal.scalars(line(0, 1, loss=1.0), {}, {})
    journal.close()


def test_wandb_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()  # as a run leaves behind
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_wandb("off")
    with pytest.raises(ConfigError, match=r"observe.wandb=offline: wandb is not installed: .*'megasora\[wandb\]'"):
        check_wandb("offline")
