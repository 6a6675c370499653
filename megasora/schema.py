"""The configuration of a run as typed dataclasses: the sections that no other package owns, and the whole.

Each default is the one place where its value stands; what cannot be is refused here, in a line that begins with the key.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pydantic

from data_pipelines.batches.loader import DataConfig
from data_pipelines.buckets import BucketConfig
from data_pipelines.prepare.run import PrepareConfig
from megasora.checkpoint.directory import CheckpointConfig
from megasora.diffusion.conditioning import check_tasks
from megasora.diffusion.flow import FlowConfig
from megasora.diffusion.gaussian import GaussianConfig
from megasora.diffusion.samplers import SAMPLERS
from megasora.engines.deepspeed_config import DeepSpeedConfig
from megasora.engines.optim import OptimConfig
from megasora.engines.torch_native import EngineConfig
from megasora.models.families import CLASSIFIERS, AnyModelConfig
from megasora.models.vae import VAEConfig
from megasora.models.video_dit import VideoDiTConfig
from megasora.observe.profiler import ProfileConfig
from megasora.observe.spikes import SpikeConfig
from megasora.parallel.layout import ParallelConfig
from megasora.vae_training import TrainVAEConfig

InitRule = Literal["repeat", "inflate", "zero", "new"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run lives and how it begins."""

    dir: str = "runs/default"  # checkpoints, metrics, samples, logs
    seed: int = 0  # all randomness follows from it and from positions
    steps: int | None = None  # stop after so many (default: the stages' own); if those are fewer, the last goes on
    resume: str = "auto"  # auto: the newest good checkpoint; none: refuse a directory with checkpoints; or a PATH
    init_from: str = ""  # a checkpoint or diffusers directory whose weights are taken where none is there to resume
    init_rules: dict[str, InitRule] = field(default_factory=dict)  # pattern -> how a weight that does not fit is made
    allow_change: tuple[str, ...] = ()  # keys that may differ from the checkpoint's config, `data` for the data itself
    determinism: Literal["replay", "bitwise"] = "replay"  # bitwise: torch's deterministic kernels, too

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1")
        for name in ("dir", "resume"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}=: is empty; leave it out for the default")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the run with its own buckets, rate and timestep shift. Stages follow each other in one history."""

    name: str = "main"
    steps: int = 1000
    lr: float | None = None  # peak; default optim.lr
    shift: float = 1.0  # of the timesteps, towards noise
    drop_captions: float = 0.1  # share of samples trained without caption or class, for guidance; not a classifier's
    tasks: dict[str, float] = field(default_factory=lambda: {"text": 1.0})  # shares: text, image, extend, ...
    buckets: BucketConfig = field(default_factory=BucketConfig)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}: a positive number is expected")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift}: a positive number is expected")
        if not 0 <= self.drop_captions <= 1:
            raise ValueError(f"drop_captions={self.drop_captions}: from 0 to 1")
        check_tasks(self.tasks)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Shards -> latent shards, for the buckets of all stages, and the encoders that `sample` uses again."""

    input: str = "data/shards"
    output: str = "data/latents"
    vae: str = "data/vae"  # of `train-vae`, a diffusers directory (Wan, HunyuanVideo, CogVideoX), or the word pixels
    fps: float = 0.0  # that faster clips are sampled at; 0: every clip keeps its own rate
    tile: int = 0  # pixels a side of the tiles that our VAE goes through large pictures in; 0: whole
    tile_overlap: int = 64
    text: str = ""  # T5_DIR, or T5_DIR,CLIP_DIR for a pooled vector; empty: a small encoder is made from the captions
    text_dtype: Literal["float32", "bfloat16"] = "float32"  # of a published text encoder's weights
    latent_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    batch_megapixels: float = 16.0  # of clips of one shape encoded at once; a longer clip goes alone, piece by piece
    workers: int = 0  # processes of each rank that decode ahead; 0: threads
    claim_seconds: float = 300.0  # a shard whose worker has not been heard of for so long is taken over by another

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: at least 0")
        for name in ("batch_megapixels", "claim_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number is expected")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What `sample` makes. Given pictures (`first`, `last`) and video (`extend`) are files; the model fills in the rest.

    Longer than `window`, a video is made in stretches: by chunks where the model is chunk-causal, else in windows of which
    each begins with the last `overlap` frames of the one before. Memory then does not grow with the length.
    """

    prompts: tuple[str, ...] = ()
    negative: str = ""
    labels: tuple[int, ...] = ()  # for models conditioned on classes: one a prompt, or alone
    frames: int = 17
    height: int = 128
    width: int = 224
    fps: float = 12.0
    steps: int = 30
    sampler: str = ""  # flow: euler (default), heun; gaussian: ddpm (default), ddim, dpmpp
    guidance: float = 4.0  # classifier-free; 1 is none. A model with guidance_embed is told it, and no negative
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # timesteps in which guidance acts
    shift: float = 1.0  # of the timesteps, as a stage's; times that of the size with flow.shift_by_size
    seed: int = 0
    first: str = ""  # a picture that the video begins with
    last: str = ""  # a picture that it ends with
    loop: bool = False  # it ends as it begins: `last` is `first`
    extend: str = ""  # a video that it goes on from
    window: int = 0  # frames that the model makes at once (those it was trained on); 0: all
    overlap: int = 5  # of them, frames that two windows share
    checkpoint: str = "latest"  # latest of run.dir, or a PATH to a step directory
    weights: Literal["ema", "model"] = "ema"
    output: str = ""  # default: a directory of its own under run.dir/samples

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("steps", 1), ("window", 0), ("overlap", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        for name in ("fps", "shift"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number is expected")
        known = [name for samplers in SAMPLERS.values() for name in samplers]
        if self.sampler and self.sampler not in known:
            raise ValueError(f"sampler={self.sampler}: is not one of {', '.join(known)}")
        if not 0 <= self.guidance_interval[0] <= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval={list(self.guidance_interval)}: two timesteps, the lower first")
        if self.window and self.overlap >= self.window:
            raise ValueError(f"overlap={self.overlap}: less than window={self.window}")
        if self.loop and not self.first:
            raise ValueError("loop=true: give the picture that it begins and ends with as sample.first")
        if self.loop and self.last:
            raise ValueError(f"last={self.last}: a loop ends with sample.first")
        if self.extend and self.first:
            raise ValueError(f"first={self.first}: a video that goes on from sample.extend begins with that")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What training shows and measures of the averaged weights, every so many steps (0: never)."""

    every: int = 0  # fixed prompts with fixed noise, by the settings of `sample`
    prompts: tuple[str, ...] = ()  # default: sample.prompts
    loss_every: int = 0  # the loss of fixed samples at fixed quantiles of the timesteps
    path: str = ""  # latents held out for that; default: data.path
    samples: int = 16
    quantiles: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    clip: str = ""  # a local CLIP directory: how well the videos fit their prompts
    fvd: str = ""  # a local TorchScript file of I3D features: the distance to `fvd_reference`
    fvd_reference: str = ""  # a directory of real videos

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("loss_every", 0), ("samples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        if not self.quantiles or not all(0 < q < 1 for q in self.quantiles):
            raise ValueError(f"quantiles={list(self.quantiles)}: numbers between 0 and 1")
        if bool(self.fvd) != bool(self.fvd_reference):
            raise ValueError(f"fvd={self.fvd}: give it together with eval.fvd_reference")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """`bench`: measured steps of one stage after warm-up."""

    stage: str = ""  # which, by name; default: the first
    warmup: int = 3  # steps at least; it goes on until times show no trend, for 12 more at most. 0: none
    steps: int = 16
    rounds: int = 8  # of these steps, each after a measurement of the matrix product that it is compared by
    checkpoint: str = ""  # a directory for one save, whose stall is measured; it is removed again
    against: str = ""
    tolerance: float = 0.05  # slower than `against` by more than this share, and beyond the noise, is a failure
    output: str = ""
    costs: str = ""  # a file for the seconds that a sample of each bucket takes, as data.costs reads it; on one process

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("steps", 1), ("rounds", 1), ("tolerance", 0)):
            if not getattr(self, name) >= least:  # nan is not, either
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")


@dataclass(frozen=True, kw_only=True)
class ObserveConfig:
    """The console and the boards, every so many steps; metrics.jsonl has every step."""

    every: int = 10
    tensorboard: bool = True  # in run.dir/tb
    wandb: Literal["off", "offline", "online"] = "off"  # offline: into run.dir/wandb, which `wandb sync` sends
    wandb_project: str = "megasora"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every}: at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything. Each section is read by the part of the code it is named after."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    engine: Literal["torch_native", "deepspeed"] = "torch_native"
    run: RunConfig = field(default_factory=RunConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    train_vae: TrainVAEConfig = field(default_factory=TrainVAEConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: Annotated[AnyModelConfig, pydantic.Field(discriminator="family")] = field(default_factory=VideoDiTConfig)
    objective: Literal["flow", "gaussian", "classify"] = "flow"
    flow: FlowConfig = field(default_factory=FlowConfig)
    gaussian: GaussianConfig = field(default_factory=GaussianConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stages: tuple[Stage, ...] = (Stage(),)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: EngineConfig = field(default_factory=EngineConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: a run needs at least one")
        last = self.run.steps or sum(stage.steps for stage in self.stages)
        if self.profile.span[0] > last:
            raise ValueError(f"profile.steps={self.profile.steps}: the run has {last} steps")
        if self.checkpoint.keep_best and not self.eval.loss_every:
            raise ValueError(f"checkpoint.keep_best={self.checkpoint.keep_best}: goes by the loss of eval.loss_every")
        classifier = self.model.family in CLASSIFIERS
        if (self.objective == "classify") != classifier:
            wanted = "classify" if classifier else "flow or gaussian"
            raise ValueError(f"objective={self.objective}: model.family={self.model.family} learns by {wanted}")
        learned = self.objective == "gaussian" and self.gaussian.variance == "learned_range"
        if self.model.learn_sigma != learned and not classifier:
            raise ValueError(
                f"model.learn_sigma={str(self.model.learn_sigma).lower()}: goes together with objective=gaussian and "
                f"gaussian.variance=learned_range"
            )
        if self.sample.sampler and not classifier and self.sample.sampler not in SAMPLERS[self.objective]:
            known = ", ".join(SAMPLERS[self.objective])
            raise ValueError(f"sample.sampler={self.sample.sampler}: objective={self.objective} has {known}")
