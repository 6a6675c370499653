"""Training of the VAE: that it learns, LPIPS and the GAN, PSNR and SSIM, and the verb."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from data_pipelines.shards.tars import ShardWriter
from megasora.cli import main
from megasora.errors import ConfigError
from megasora.models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from megasora.models.lpips import LPIPS, VGG16
from megasora.models.vae import VideoVAE
from megasora.vae_training import HELD_OUT, Judge, TrainVAEConfig, psnr, ssim, train_vae
from tests import clips as drawn
from tests.unit.test_vae import SMALL, build, noise


def moving_stripes(seed: int = 0) -> Callable[[int, int, int], Tensor]:
    """(step, batch, frames) -> clips of coloured sine gratings that move; a function of the seed and the step."""

    def clips(step: int, batch: int, frames: int) -> Tensor:
        rng = np.random.default_rng([seed, step % 1_000_003])
        t, y, x = np.meshgrid(np.arange(frames), np.arange(32), np.arange(32), indexing="ij")
        videos = []
        for _ in range(batch):
            direction, speed, phase = (
                rng.uniform(-0.3, 0.3, 2),
                rng.uniform(-0.5, 0.5),
                rng.uniform(0, 6.3, (3, 1, 1, 1)),
            )
            videos.append(np.sin(direction[0] * y + direction[1] * x + speed * t + phase) * 0.8)
        return torch.from_numpy(np.stack(videos)).float()

    return clips


def ignore(step: int, metrics: dict[str, float]) -> None:
    pass


TRAIN = TrainVAEConfig(steps=80, lr=4e-3, batch=2, frames=9, size=32, image_every=4, warmup=5, ema=0.9)


@pytest.fixture(scope="module")
def trained() -> tuple[VideoVAE, dict[str, float], list[dict[str, float]]]:
    torch.manual_seed(0)
    vae = VideoVAE(SMALL)
    logged: list[dict[str, float]] = []
    metrics = train_vae(vae, moving_stripes(), TRAIN, lambda _, m: logged.append(dict(m)))
    return vae, metrics, logged


def reconstruction(vae: VideoVAE, frames: int) -> float:
    video = moving_stripes(seed=9)(0, 4, frames)  # another seed than training saw
    with torch.no_grad():
        return psnr(vae.decode(vae.encode(video)[0]), video).mean().item()


def test_training_learns(trained: tuple[VideoVAE, dict[str, float], list[dict[str, float]]]) -> None:
    vae, metrics, logged = trained
    torch.manual_seed(0)
    untrained = VideoVAE(SMALL)
    for frames in (1, 9):
        assert reconstruction(untrained, frames) < 12
        assert reconstruction(vae, frames) > 22
    assert len(logged) == TRAIN.steps
    assert metrics.keys() == {"loss", "kl", "psnr", "psnr_image", "ssim_image", "psnr_video", "ssim_video"}
    for kind, frames, batch in (("image", 1, 16), ("video", 9, 2)):  # of crops that training never draws
        found = torch.zeros(2)
        for i in range(4):
            video = moving_stripes()(HELD_OUT - i, batch, frames)
            with torch.no_grad():
                restored = vae.decode(vae.encode(video)[0]).clamp(-1, 1)
            found += torch.stack([psnr(restored, video).mean(), ssim(restored, video).mean()]) / 4
        assert found.tolist() == pytest.approx([metrics[f"psnr_{kind}"], metrics[f"ssim_{kind}"]], rel=1e-4)
        assert metrics[f"ssim_{kind}"] > 0.5
    early, late = ([m["loss"] for m in part] for part in (logged[:10], logged[-10:]))
    assert sum(late) < 0.7 * sum(early)  # beyond what the linear transform gives at once


def test_latents_after_training_are_normalised(
    trained: tuple[VideoVAE, dict[str, float], list[dict[str, float]]],
) -> None:
    vae = trained[0]
    clips = moving_stripes()
    with torch.no_grad():
        means = [vae.encode(clips(TRAIN.steps + i, TRAIN.batch, TRAIN.frames))[0] for i in range(16)]
    channels = torch.cat([mean.transpose(0, 1).flatten(1) for mean in means], dim=1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(16), rtol=0, atol=1e-4)
    assert channels.square().mean().item() == pytest.approx(1, abs=1e-4)  # one scale for all channels
    assert (vae.latent_std == vae.latent_std[0]).all()


def test_the_same_seed_gives_the_same_bits() -> None:
    def weights(seed: int, global_seed: int) -> str:
        torch.manual_seed(0)
        vae = VideoVAE(SMALL)
        torch.manual_seed(global_seed)  # training draws from its own generator
        train_vae(vae, moving_stripes(), dataclasses.replace(TRAIN, steps=3, seed=seed), ignore)
        return vae.fingerprint()

    assert weights(1, 10) == weights(1, 20)
    assert weights(1, 10) != weights(2, 10)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    def broken(step: int, batch: int, frames: int) -> Tensor:
        video = moving_stripes()(step, batch, frames)
        return video * float("nan") if step == 2 else video

    with pytest.raises(FloatingPointError, match="step 3"):
        train_vae(build(), broken, dataclasses.replace(TRAIN, steps=5), ignore)


def test_the_average_is_measured_on_the_way_and_leaves_training_alone() -> None:
    def train(**changes: int) -> tuple[str, list[dict[str, float]]]:
        torch.manual_seed(0)
        vae, logged = VideoVAE(SMALL), []
        train_vae(
            vae,
            moving_stripes(),
            dataclasses.replace(TRAIN, steps=4, batch=1, frames=5, **changes),
            lambda _, m: logged.append(dict(m)),
        )
        return vae.fingerprint(), logged

    weights, logged = train(eval_every=2)
    plain, silent = train()
    assert weights == plain
    assert ["ssim_video" in m for m in logged] == [False, True, True, True]
    assert [m["loss"] for m in logged] == [m["loss"] for m in silent]
    assert logged[1]["psnr_video"] == logged[2]["psnr_video"] != logged[3]["psnr_video"]


# PSNR and SSIM


def test_psnr_and_ssim_against_scikit_image() -> None:
    video = noise(2, 3, 3, 24, 40)
    other = (0.6 * video + 0.4 * noise(2, 3, 3, 24, 40, seed=2)).roll(1, dims=2)
    ratios, similarities = psnr(video, other), ssim(video, other)
    for b in range(2):
        for t in range(3):
            x, y = video[b, :, t].double().numpy(), other[b, :, t].double().numpy()
            expected = structural_similarity(
                x, y, data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            assert similarities[b, t].item() == pytest.approx(expected, abs=1e-6)
            assert ratios[b, t].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=2), abs=1e-4)
    assert ssim(video, video).sub(1).abs().max() < 1e-6
    torch.testing.assert_close(psnr(video, video + 0.2), torch.full((2, 3), 20.0), rtol=0, atol=1e-3)


# LPIPS


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of LPIPS with random weights, named as the published ones are."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"lin{i}.model.1.weight": torch.rand(1, w[-1], 1, 1, generator=generator) for i, w in enumerate(VGG16)}
    inputs, layer = 3, 0
    for widths in VGG16:
        for width in widths:
            scale = (2 / (9 * inputs)) ** 0.5
            tensors[f"features.{layer}.weight"] = scale * torch.randn(width, inputs, 3, 3, generator=generator)
            tensors[f"features.{layer}.bias"] = 0.1 * torch.randn(width, generator=generator)
            inputs, layer = width, layer + 2
        layer += 1  # a pooling
    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(tensors, file)
    return file


def test_lpips_by_its_formula(weights: Path) -> None:
    """Against the sum over layers of the mean over pixels of w · (difference of unit features)², layer by layer."""
    model = LPIPS.load(weights)
    a, b = noise(1, 3, 2, 32, 16), noise(1, 3, 2, 32, 16, seed=2)
    total = 0.0
    for t in range(2):
        x, y = ((v[:, :, t] - model.shift) / model.scale for v in (a, b))
        for index, layer in enumerate(model.features):
            x, y = layer(x), layer(y)
            if index in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of VGG16
                weight = model.weights[(3, 8, 15, 22, 29).index(index)].numpy()
                u, v = (f[0].numpy() / np.sqrt(np.square(f[0].numpy()).sum(0)) for f in (x, y))
                total += float((np.square(u - v) * weight[:, None, None]).sum(0).mean()) / 2
    assert model(a, b).item() == pytest.approx(total, rel=1e-5)
    assert model(a, a).item() == 0
    assert [type(model.features[i]).__name__ for i in (4, 9, 16, 23)] == ["MaxPool2d"] * 4


def test_lpips_has_a_gradient_everywhere_but_for_its_weights(weights: Path) -> None:
    model, video = LPIPS.load(weights), noise(1, 3, 1, 16, 16).requires_grad_()
    model(video, torch.zeros(1, 3, 1, 16, 16)).backward()
    assert video.grad is not None
    assert video.grad.isfinite().all()
    assert video.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    grey = model.shift.view(1, 3, 1, 1, 1).expand(1, 3, 1, 16, 16).clone().requires_grad_()  # features of zero: no nan
    for layer in model.features:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.zero_()
    model(grey, video.detach()).backward()
    assert grey.grad is not None
    assert grey.grad.isfinite().all()


def test_files_without_lpips_are_one_line(weights: Path, tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "part.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, message in (("none", "none"), ("part", "features.0.bias"), ("text", "no weights of LPIPS")):
        with pytest.raises(ConfigError, match=message) as error:
            LPIPS.load(tmp_path / f"{name}.safetensors")
        assert str(error.value).startswith(f"train_vae.lpips={tmp_path}")
        assert "\n" not in str(error.value)


def test_the_perceptual_loss_counts(weights: Path) -> None:
    def loss(**changes: object) -> dict[str, float]:
        config = dataclasses.replace(TRAIN, steps=1, batch=1, frames=1, **changes)
        return train_vae(build(), moving_stripes(), config, lambda _, m: logged.append(dict(m)))

    logged: list[dict[str, float]] = []
    loss()
    loss(lpips=str(weights), lpips_weight=0.5)
    without, with_lpips = logged
    assert with_lpips["lpips"] > 0
    assert with_lpips["loss"] == pytest.approx(without["loss"] + 0.5 * with_lpips["lpips"], rel=1e-5)


# The GAN


def test_the_discriminator_judges_patches_of_images_and_clips() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator()
    assert judge(noise(2, 3, 1, 32, 48)).shape == (2, 1, 1, 4, 6)
    assert judge(noise(2, 3, 9, 32, 32)).shape == (2, 1, 3, 4, 4)
    judge(noise(1, 3, 5, 32, 32)).square().mean().backward()
    for name, parameter in judge.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert generator_loss(fake).item() == pytest.approx(2 / 3)


def test_the_adaptive_weight_is_the_ratio_of_gradients() -> None:
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 0.25])).sum()
    weight = adaptive_weight(reconstruction, adversarial, last)
    assert weight.item() == pytest.approx(5 / (0.25 + 1e-4))
    assert not weight.requires_grad
    assert adaptive_weight(1e6 * reconstruction, adversarial, last).item() == 1e4


def test_both_losses_pull_equally_at_the_last_weight() -> None:
    vae, judge = build(), Judge(dataclasses.replace(TRAIN, gan_weight=1.0), torch.device("cpu"))
    video, last = noise(1, 3, 5, 32, 32), vae.decoder.outputs.conv.weight
    restored = vae.reconstruct(vae.posterior(video)[0])
    reconstruction = (restored - video).abs().mean()
    term = judge.term(restored, reconstruction, last)
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm().item() for loss in (reconstruction, term)]
    assert pulls[1] == pytest.approx(pulls[0], rel=0.02)


def test_the_judge_learns_and_leaves_the_vae_alone() -> None:
    judge = Judge(dataclasses.replace(TRAIN, gan_weight=1.0, gan_lr=1e-3), torch.device("cpu"))
    clips = moving_stripes()
    losses = []
    for step in range(25):
        video = clips(step, 2, 1)
        losses.append(judge.learn(video, 0.5 * video))
    assert losses[0] == pytest.approx(1, abs=0.2)  # logits about zero
    assert losses[-1] < 0.5 * losses[0]


def test_the_gan_begins_at_its_step_and_changes_nothing_before() -> None:
    def weights(**changes: float) -> str:
        torch.manual_seed(0)
        vae = VideoVAE(SMALL)
        config = dataclasses.replace(TRAIN, steps=4, batch=1, frames=5, image_every=2, **changes)
        train_vae(vae, moving_stripes(), config, lambda _, m: logged.append(dict(m)))
        return vae.fingerprint()

    logged: list[dict[str, float]] = []
    off = weights()
    assert weights(gan_weight=0.5, gan_start=4) == off
    assert not any("gan" in m for m in logged)
    logged.clear()
    judged = weights(gan_weight=0.5, gan_start=2)
    assert ["gan" in m for m in logged] == [False, False, True, True]
    assert off != judged == weights(gan_weight=0.5, gan_start=2)


def test_no_warmup_and_no_clipping() -> None:
    def weights(**changes: Any) -> str:
        torch.manual_seed(0)
        vae = VideoVAE(SMALL)
        train_vae(vae, moving_stripes(), dataclasses.replace(TRAIN, steps=2, batch=1, frames=5, **changes), ignore)
        return vae.fingerprint()

    assert weights(warmup=0, clip=0.0) == weights(warmup=1, clip=1e9) != weights(warmup=1, clip=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 8),
        ("frames", 0),
        ("gan_weight", -1.0),
        ("gan_lr", 0.0),
        ("lr", float("nan")),
        ("kl", -1e-3),
        ("warmup", -1),
        ("clip", -1.0),
    ],
)
def test_numbers_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value}: "):
        TrainVAEConfig(**{name: value})


# The verb


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("road")
    with ShardWriter(directory / "shards") as writer:
        for i in range(3):
            clip = drawn.video_bytes(drawn.noise(9, seed=i))
            about = {"kind": "video", "frames": 9, "fps": 24.0, "height": 64, "width": 96}
            writer.write({"__key__": f"clip-{i}", "mp4": clip, "txt": "blobs", "json": about})
    config = {
        "vae": {"width": 8},
        "train_vae": {"steps": 2, "batch": 1, "frames": 9, "size": 32},
        "encode": {"input": str(directory / "shards"), "vae": str(directory / "vae")},
    }
    (directory / "vae.yaml").write_text(yaml.safe_dump(config))
    return ["train-vae", "--json", "--config", str(directory / "vae.yaml")]


def test_the_verb_says_what_is_off_and_prints_what_it_measured(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(arguments[-1]).parent / "shards"
    assert main([*arguments, "--train_vae.eval_every=1"]) == 0
    out, err = capsys.readouterr()
    metrics = json.loads(out)
    assert {"psnr_image", "psnr_video", "ssim_image", "ssim_video"} <= metrics.keys()
    assert err.count("the perceptual loss is off") == 1
    assert "step 1: " in err
    assert main([*arguments, f"--train_vae.eval_input={shards}"]) == 0
    assert json.loads(capsys.readouterr().out)["psnr_video"] == metrics["psnr_video"]  # the same shards, the same crops


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train_vae.size=36", "train_vae.size=36: this VAE takes multiples of 8; the nearest is 32"),
        ("--train_vae.frames=8", "train_vae.frames=8: this VAE takes 1 + a multiple of 4; the nearest is 9"),
        ("--train_vae.lpips=nowhere", "train_vae.lpips=nowhere"),
    ],
)
def test_what_the_verb_cannot_do_exits_2_with_one_line(
    arguments: list[str], override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, override]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [message in line for line in err.splitlines()].count(True) == 1
