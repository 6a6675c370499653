"""Where curves are looked at: TensorBoard, and Weights & Biases where it is asked for. metrics.jsonl has it all without them."""

import importlib.util
import io
import os
import secrets
from pathlib import Path
from typing import Any, Literal, Protocol

from data_pipelines.video.write import encode_gif
from megasora.errors import ConfigError


class Board(Protocol):
    """Points of curves by name, `loss/train` and the like; whatever fails is up to the caller."""

    def scalars(self, values: dict[str, float], step: int) -> None: ...

    def sample(self, name: str, frames: Any, fps: float, caption: str, step: int) -> None:
        """A video, uint8 [T, H, W, 3]."""
        ...

    def close(self) -> None: ...


def check_wandb(mode: Literal["off", "offline", "online"]) -> None:
    """Raises ConfigError where it is asked for and not installed. A directory of that name is not it."""
    found = importlib.util.find_spec("wandb") if mode != "off" else None
    if mode != "off" and (found is None or found.origin is None):
        raise ConfigError(
            f"observe.wandb={mode}: wandb is not installed: pip install -c constraints.txt 'megasora[wandb]', or use off"
        )


class TensorBoard:
    """RUN/tb: curves, videos as animated images, captions, and the config as text and as hyper-parameters."""

    def __init__(self, run: Path, settings: dict[str, Any], text: str) -> None:
        """`settings` by dotted key, and `text`: the same as YAML."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(run / "tb", flush_secs=10)
        self.files = self.writer._get_file_writer()
        # Not `add_hparams`, which writes a directory of its own for every start.
        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in settings.items()
        }
        begin, session, self.end = hparams(plain, {"loss/train": 0.0, "eval/loss": 0.0})
        self.files.add_summary(begin)
        self.files.add_summary(session)
        self.writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()))

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def sample(self, name: str, frames: Any, fps: float, caption: str, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        _, H, W, _ = frames.shape
        image = Summary.Image(height=H, width=W, colorspace=3, encoded_image_string=encode_gif(frames, fps))
        self.files.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        self.writer.add_text(name, caption, step)

    def close(self) -> None:
        self.files.add_summary(self.end)
        self.writer.close()


class WeightsAndBiases:
    """RUN/wandb. Every start of a run is a part of one run there, by the id in RUN/wandb/id; `wandb sync RUN/wandb/offline-run-*`
    sends what was written offline. Points have `step` as their axis, so that steps that are repeated are drawn again."""

    def __init__(self, run: Path, mode: Literal["offline", "online"], project: str, settings: dict[str, Any]) -> None:
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else its errors go to a server all the same
        import wandb

        self.library = wandb
        identity = run / "wandb" / "id"
        if not identity.exists():
            identity.parent.mkdir(exist_ok=True)
            identity.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            mode=mode, dir=run, project=project, name=run.name, id=identity.read_text(), config=settings,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )  # fmt: skip
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log({"step": step, **values})

    def sample(self, name: str, frames: Any, fps: float, caption: str, step: int) -> None:
        gif = io.BytesIO(encode_gif(frames, fps))
        self.run.log({"step": step, name: self.library.Video(gif, caption=caption, format="gif")})

    def close(self) -> None:
        self.run.finish()
