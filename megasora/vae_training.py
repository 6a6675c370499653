"""Training of the video VAE: reconstruction and a little KL, images and clips in turn."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megasora.models.vae import VideoVAE


@dataclass(frozen=True, kw_only=True)
class TrainVAEConfig:
    """L1 + L2 + kl · KL on random crops; the averaged weights are what is kept."""

    steps: int = 2000
    lr: float = 2e-3
    batch: int = 2  # clips a step; of images as many as make the same number of frames, at most 16
    frames: int = 17
    size: int = 64  # side of the crops, pixels
    image_every: int = 8  # every so many steps a batch of images; 0: never
    kl: float = 1e-5
    l2: float = 1.0
    warmup: int = 20
    clip: float = 1.0
    ema: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")


Clips = Callable[[int, int, int], Tensor]  # (step, batch, frames) -> [B, 3, T, H, W] in [-1, 1]


def train_vae(
    vae: VideoVAE, clips: Clips, config: TrainVAEConfig, log: Callable[[int, dict[str, float]], None]
) -> dict[str, float]:
    """Trains in place, leaves the averaged weights and the latents' statistics in `vae`; returns the last PSNRs (dB).

    The same seed gives the same bits. Raises FloatingPointError when the loss is not finite.
    """
    generator = torch.Generator().manual_seed(config.seed)
    vae.fit_linear([clips(-1 - i, config.batch, config.frames) for i in range(8)])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in vae.parameters()]
    metrics: dict[str, float] = {}
    for step in range(config.steps):
        image = config.image_every and step % config.image_every == config.image_every - 1
        frames, batch = (1, min(16, config.batch * config.frames)) if image else (config.frames, config.batch)
        video = clips(step, batch, frames)
        decay = (1 + math.cos(math.pi * step / config.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / config.warmup) * (0.02 + 0.98 * decay)
        mean, logvar = vae.posterior(video)
        latent = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator)
        error = vae.reconstruct(latent) - video
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = error.abs().mean() + config.l2 * error.square().mean() + config.kl * kl
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"train_vae: the loss of step {step + 1} is {loss.item()}; a lower lr may help")
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate = max(1 - config.ema, 9 / (10 + step))  # a short memory at first
        torch._foreach_lerp_(average, [p.detach() for p in vae.parameters()], rate)
        key = "psnr_image" if image else "psnr_video"
        metrics |= {"loss": loss.item(), "kl": kl.item(), key: psnr(error)}
        log(step + 1, metrics)
    with torch.no_grad():
        for parameter, value in zip(vae.parameters(), average, strict=True):
            parameter.copy_(value)
    measure_latents(vae, clips, config)
    return metrics


@torch.no_grad()
def measure_latents(vae: VideoVAE, clips: Clips, config: TrainVAEConfig, batches: int = 16) -> None:
    """Sets the mean of each latent channel and the one scale of all, so that `encode` gives unit variance."""
    drawn = [vae.posterior(clips(config.steps + i, config.batch, config.frames))[0] for i in range(batches)]
    flat = torch.cat([mean.transpose(0, 1).flatten(1) for mean in drawn], dim=1)  # [C, positions]
    vae.latent_mean.copy_(flat.mean(1))
    vae.latent_std.copy_((flat - flat.mean(1, keepdim=True)).square().mean().sqrt().clamp(min=1e-4))


def psnr(error: Tensor) -> float:
    """dB, of an error on the scale [-1, 1]."""
    return 10 * math.log10(4 / max(error.square().mean().item(), 1e-12))
