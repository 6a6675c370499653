"""Training of the video VAE: reconstruction, a little KL, and where asked for a perceptual and an adversarial loss (Rombach et
al. 2022, appendix G), on images and clips in turn."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megasora.models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from megasora.models.lpips import LPIPS
from megasora.models.vae import VideoVAE

HELD_OUT = -(10**9)  # crops of steps from here downwards are never trained on


@dataclass(frozen=True, kw_only=True)
class TrainVAEConfig:
    """L1 + L2 + kl · KL on random crops, LPIPS and a GAN where they are on; the averaged weights are what is kept."""

    steps: int = 2000
    lr: float = 2e-3
    batch: int = 2  # clips a step; of images as many as make the same number of frames, at most 16
    frames: int = 17
    size: int = 64  # side of the crops, pixels
    image_every: int = 8  # every so many steps a batch of images; 0: never
    kl: float = 1e-5
    l2: float = 1.0
    lpips: str = ""  # a safetensors file (megasora/models/lpips.py says how to make it); empty: no perceptual loss
    lpips_weight: float = 1.0
    gan_weight: float = 0.0  # 0: no discriminator
    gan_start: int = 1000  # steps before it begins
    gan_lr: float = 1e-4  # of the discriminator
    warmup: int = 20
    clip: float = 1.0  # of the gradients' norm; 0: off
    ema: float = 0.99
    eval_every: int = 0  # PSNR and SSIM of held-out crops every so many steps; 0: at the end only
    eval_input: str = ""  # shards to measure on; empty: other crops of the training shards
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch", 1),
            ("frames", 1),
            ("size", 11),
            ("gan_start", 0),
            ("warmup", 0),
            ("eval_every", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}")
        for name in ("kl", "l2", "lpips_weight", "gan_weight", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: 0 or more")
        for name in ("lr", "gan_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: a positive number is expected")


Clips = Callable[[int, int, int], Tensor]  # (step, batch, frames) -> [B, 3, T, H, W] in [-1, 1]


def train_vae(
    vae: VideoVAE,
    clips: Clips,
    config: TrainVAEConfig,
    log: Callable[[int, dict[str, float]], None],
    held_out: Clips | None = None,
) -> dict[str, float]:
    """Trains in place, leaves the averaged weights and the latents' statistics in `vae`; returns the last metrics, among them
    psnr_image, psnr_video (dB), ssim_image and ssim_video of crops of `held_out` (default: crops of `clips` not trained on).

    The same seed gives the same bits. Raises FloatingPointError when the loss is not finite, ConfigError for train_vae.lpips.
    """
    device = vae.latent_mean.device
    generator = torch.Generator().manual_seed(config.seed)
    perceptual = LPIPS.load(Path(config.lpips)).to(device) if config.lpips else None
    judge = Judge(config, device) if config.gan_weight else None
    vae.fit_linear([clips(-1 - i, config.batch, config.frames).to(device) for i in range(8)])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in vae.parameters()]
    metrics: dict[str, float] = {}
    for step in range(config.steps):
        image = config.image_every and step % config.image_every == config.image_every - 1
        frames, batch = (1, image_batch(config)) if image else (config.frames, config.batch)
        video = clips(step, batch, frames).to(device)
        decay = (1 + math.cos(math.pi * step / config.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * (0.02 + 0.98 * decay)
        mean, logvar = vae.posterior(video)
        latent = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(device)
        restored = vae.reconstruct(latent)
        error = restored - video
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        reconstruction = error.abs().mean() + config.l2 * error.square().mean()
        if perceptual is not None:
            distance = perceptual(restored, video)
            reconstruction = reconstruction + config.lpips_weight * distance
            metrics["lpips"] = distance.item()
        loss = reconstruction + config.kl * kl
        if judge is not None and step >= config.gan_start:
            loss = loss + config.gan_weight * judge.term(restored, reconstruction, vae.decoder.outputs.conv.weight)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"train_vae: the loss of step {step + 1} is {loss.item()}; a lower lr may help")
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(vae.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if judge is not None and step >= config.gan_start:
            metrics["gan"] = judge.learn(video, restored.detach())
        rate = max(1 - config.ema, 9 / (10 + step))  # a short memory at first
        torch._foreach_lerp_(average, [p.detach() for p in vae.parameters()], rate)
        metrics |= {"loss": loss.item(), "kl": kl.item(), "psnr": psnr(restored.detach(), video).mean().item()}
        if config.eval_every and (step + 1) % config.eval_every == 0:
            exchange(vae.parameters(), average)
            metrics |= evaluate(vae, held_out or clips, config)
            exchange(vae.parameters(), average)
        log(step + 1, metrics)
    exchange(vae.parameters(), average)
    measure_latents(vae, clips, config)
    return metrics | evaluate(vae, held_out or clips, config)


class Judge:
    """The discriminator and its optimizer, drawn from a seed of its own: with it or without, the VAE begins alike."""

    def __init__(self, config: TrainVAEConfig, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = PatchDiscriminator().to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), config.gan_lr, betas=(0.5, 0.9), weight_decay=0.0)

    def term(self, restored: Tensor, reconstruction: Tensor, last: Tensor) -> Tensor:
        """The VAE's adversarial loss, weighted to pull at the decoder's `last` weight as hard as the reconstruction loss."""
        adversarial = generator_loss(self.network(restored))
        return adaptive_weight(reconstruction, adversarial, last) * adversarial

    def learn(self, video: Tensor, restored: Tensor) -> float:
        """One step of the discriminator; returns its loss."""
        self.optimizer.zero_grad(set_to_none=True)  # also of what the VAE's step left
        loss = discriminator_loss(self.network(video), self.network(restored))
        loss.backward()
        self.optimizer.step()
        return loss.item()


def image_batch(config: TrainVAEConfig) -> int:
    return min(16, config.batch * config.frames)


@torch.no_grad()
def exchange(parameters: Iterable[Tensor], values: list[Tensor]) -> None:
    """Swaps both, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        kept = parameter.clone()
        parameter.copy_(value)
        value.copy_(kept)


@torch.no_grad()
def measure_latents(vae: VideoVAE, clips: Clips, config: TrainVAEConfig, batches: int = 16) -> None:
    """Sets the mean of each latent channel and the one scale of all, so that `encode` gives unit variance."""
    device = vae.latent_mean.device
    drawn = [vae.posterior(clips(config.steps + i, config.batch, config.frames).to(device))[0] for i in range(batches)]
    flat = torch.cat([mean.transpose(0, 1).flatten(1) for mean in drawn], dim=1)  # [C, positions]
    vae.latent_mean.copy_(flat.mean(1))
    vae.latent_std.copy_((flat - flat.mean(1, keepdim=True)).square().mean().sqrt().clamp(min=1e-4))


@torch.no_grad()
def evaluate(vae: VideoVAE, clips: Clips, config: TrainVAEConfig, batches: int = 4) -> dict[str, float]:
    """PSNR (dB) and SSIM of what the VAE makes of held-out images and clips: means over their frames."""
    metrics: dict[str, float] = {}
    for kind, frames, batch in (("image", 1, image_batch(config)), ("video", config.frames, config.batch)):
        ratios, similarities = [], []
        for i in range(batches):
            video = clips(HELD_OUT - i, batch, frames).to(vae.latent_mean.device)
            restored = vae.reconstruct(vae.posterior(video)[0]).clamp(-1, 1)
            ratios.append(psnr(restored, video).mean().item())
            similarities.append(ssim(restored, video).mean().item())
        metrics |= {f"psnr_{kind}": sum(ratios) / batches, f"ssim_{kind}": sum(similarities) / batches}
    return metrics


def psnr(video: Tensor, other: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1], twice -> [B, T], dB of each frame."""
    error = (video - other).square().mean(dim=(1, 3, 4))  # [B, T]
    return 10 * torch.log10(4 / error.clamp(min=1e-12))


def ssim(video: Tensor, other: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1], at least 11 pixels a side, twice -> [B, T], the structural similarity of each frame (Wang
    et al. 2004): a Gaussian window of 11 pixels and sigma 1.5, wholly inside the frame; mean over the channels."""
    place = torch.arange(-5, 6, dtype=torch.float64, device=video.device)
    window = torch.exp(-0.5 * (place / 1.5).square())
    window = window / window.sum()
    a, b = video.double(), other.double()
    maps = torch.stack([a, b, a * a, b * b, a * b])  # [5, B, 3, T, H, W]
    smooth = F.conv2d(maps.flatten(0, 3)[:, None], window.view(1, 1, 11, 1))  # [5·B·3·T, 1, H - 10, W]
    smooth = F.conv2d(smooth, window.view(1, 1, 1, 11))  # [5·B·3·T, 1, H - 10, W - 10]
    mean_a, mean_b, square_a, square_b, product = smooth.squeeze(1).unflatten(0, maps.shape[:4])
    variance_a, variance_b, covariance = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of a range of 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    return similarity.mean(dim=(1, 3, 4)).float()
