"""Guidance, given frames, sizes that cannot be, and the two ways to long videos."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.utils import _to_kwargs

from megasora.diffusion.flow import Flow, FlowConfig
from megasora.diffusion.gaussian import GaussianConfig
from megasora.diffusion.objective import build_objective
from megasora.engines.torch_native import EngineConfig
from megasora.errors import ConfigError
from megasora.models.base import Cache
from megasora.models.families import AnyModelConfig
from megasora.models.mmdit import MMDiTConfig
from megasora.models.packing import Item, PackedRow, pack
from megasora.models.text import Text
from megasora.models.video_dit import VideoDiT, VideoDiTConfig
from megasora.sampling import Generator, Prompt, latent_shape, leading
from megasora.schema import Config, SampleConfig
from megasora.verbs import sample as verb

CONFIG = VideoDiTConfig(width=48, depth=2, heads=4, ffn=96, channels=4, text_width=24)
CPU = torch.device("cpu")
SHAPE = (4, 6, 4, 4)


class SaysItsText(nn.Module):
    """The velocity of every token is the first number of its sample's text."""

    def forward(self, row: PackedRow) -> Tensor:
        first = torch.stack([row.text[a, 0] for a in row.caption.starts])
        return first[row.video.index][:, None].expand(row.tokens.shape)


def generator(model: nn.Module, config: AnyModelConfig = CONFIG, objective: str = "flow", **settings: Any) -> Generator:
    learns = build_objective(objective, FlowConfig(), GaussianConfig())
    return Generator(model, config, learns, objective, SampleConfig(**{"steps": 2, **settings}), CPU)


def text(seed: int, width: int = 24) -> Text:
    return Text(torch.randn(3, width, generator=torch.Generator().manual_seed(seed)), torch.zeros(0))


def noisy_model(config: VideoDiTConfig) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def draw(prompt: float, negative: float, **settings: Any) -> Tensor:
    texts = [Text(torch.full((n, 8), value), torch.zeros(0)) for n, value in ((2, prompt), (3, negative))]
    return generator(SaysItsText(), **settings).generate((4, 1, 4, 4), Prompt(*texts, seed=0))


def test_guidance_starts_from_the_negative_prompt() -> None:
    still = draw(0.0, 0.0, guidance=3.0)
    # Guided velocity 2 + 3 · (5 - 2) = 11, from t = 1 to 0; without guidance the text's own.
    torch.testing.assert_close(draw(5.0, 2.0, guidance=3.0) - still, torch.full_like(still, -11.0))
    torch.testing.assert_close(draw(5.0, 2.0, guidance=1.0) - still, torch.full_like(still, -5.0))


def test_guidance_acts_in_its_interval_only() -> None:
    still = draw(0.0, 0.0, guidance=3.0)
    # Two steps: at t = 1 the text's own 5, at t = 0.5 the guided 11.
    half = draw(5.0, 2.0, guidance=3.0, guidance_interval=(0.0, 0.6))
    torch.testing.assert_close(half - still, torch.full_like(still, -8.0))


def test_given_frames_stay_and_are_seen() -> None:
    made = generator(noisy_model(CONFIG), guidance=1.0)
    given = leading(torch.ones(4, 2, 4, 4), SHAPE)
    video = made.generate(SHAPE, Prompt(text(1), text(2), seed=3), given)
    assert torch.equal(video[:, :2], torch.ones(4, 2, 4, 4))
    other = made.generate(SHAPE, Prompt(text(1), text(2), seed=3), leading(torch.zeros(4, 2, 4, 4), SHAPE))
    assert not torch.allclose(video[:, 2:], other[:, 2:], atol=1e-4)


@pytest.mark.parametrize("objective", ["flow", "gaussian"])
def test_a_sample_is_a_function_of_its_seed(objective: str) -> None:
    made = generator(noisy_model(CONFIG), objective=objective)
    first, again, other = (made.generate(SHAPE, Prompt(text(1), text(2), seed=s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


class SaysItsGuidance(nn.Module):
    """The velocity of every token is the scale that its sample hears."""

    def forward(self, row: PackedRow) -> Tensor:
        return row.guidance[row.video.index][:, None].expand(row.tokens.shape)


@pytest.mark.parametrize(("interval", "moved"), [((0.0, 1.0), 6.0), ((0.0, 0.6), 3.5)])
def test_a_model_that_hears_the_guidance_is_not_guided_again(interval: tuple[float, float], moved: float) -> None:
    """Its answer to the scale 6 is the velocity 6; two steps, of which the first, at t = 1, may lie outside the interval."""
    hears = MMDiTConfig(width=48, heads=4, ffn=96, axes=(4, 4, 4), channels=4, guidance_embed=True)
    prompt = Prompt(text(1), text(2), seed=0)
    made = [
        generator(SaysItsGuidance(), hears, guidance=scale, guidance_interval=interval).generate((4, 1, 4, 4), prompt)
        for scale in (6.0, 1.0)
    ]
    torch.testing.assert_close(made[1] - made[0], torch.full_like(made[0], moved - 1))


def test_a_size_shifts_the_timesteps_as_in_training() -> None:
    """Of a latent four times the reference, twice as far: 1.5 and the size are 3 without. Chunks go by the whole video."""
    prompt, flow = Prompt(text(1), text(2), seed=3), FlowConfig(shift_by_size=True, shift_reference=(6, 2, 2))
    for config in (CONFIG, CHUNKED):
        model, made = noisy_model(config), []
        for learns, shift in ((Flow(flow), 1.5), (Flow(FlowConfig()), 3.0)):
            one = Generator(model, config, learns, "flow", SampleConfig(steps=3, shift=shift), CPU)
            made.append(
                torch.cat(list(one.rollout(SHAPE, prompt)), 1) if config is CHUNKED else one.generate(SHAPE, prompt)
            )
        assert torch.equal(*made)


CHUNKED = replace(CONFIG, temporal="chunk_causal", chunk=2)


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_cached_rollout_is_the_uncached_one(window: int, guidance: float) -> None:
    """Each chunk anew, with all chunks before it in the row as given frames, and no cache."""
    config = replace(CHUNKED, window=window)
    made = generator(noisy_model(config), config, guidance=guidance)
    prompt = Prompt(text(1), text(2), seed=3)
    cached = torch.cat(list(made.rollout(SHAPE, prompt)), dim=1)
    done = torch.zeros(4, 0, 4, 4)
    for number in range(3):
        shape = (4, 2 * number + 2, 4, 4)
        whole = leading(done, shape)
        model = made.predict

        def with_past(
            row: PackedRow, cache: Any, number: int = number, whole: Any = whole, model: Any = model
        ) -> Tensor:
            return ask_uncached(model, row, whole.latent[:, : 2 * number])

        made.predict = with_past
        caches = [Cache(), Cache()]
        fresh = made._sample((4, 2, 4, 4), prompt, None, 1.0, (number,), 2 * number, caches)
        made.predict = model
        done = torch.cat([done, fresh], dim=1)
    assert done.std() > 0.1
    torch.testing.assert_close(cached, done, rtol=1e-5, atol=1e-5)


def test_a_wrapper_that_moves_arguments_loses_no_chunk() -> None:
    """As FSDP2 does to those of its root on a GPU."""
    made = generator(noisy_model(CHUNKED), CHUNKED, guidance=2.0)
    prompt = Prompt(text(1), text(2), seed=3)
    expected = torch.cat(list(made.rollout(SHAPE, prompt)), dim=1)
    model = made.predict

    def moved(*args: Any) -> Tensor:
        (args,), _ = _to_kwargs(args, {}, CPU, False)
        return model(*args)

    made.predict = moved
    assert torch.equal(torch.cat(list(made.rollout(SHAPE, prompt)), dim=1), expected)


def ask_uncached(model: Any, row: PackedRow, past: Tensor) -> Tensor:
    """The model's word on the last chunk, the past being clean frames of the same row."""
    from megasora.models.packing import Item, in_patches, pack, patchify

    if past.shape[1] == 0:
        return model(row)
    tokens = torch.cat([patchify(past, CONFIG.patch), row.tokens])
    (T, H, W), known = row.shapes[0], in_patches(past.shape[1:], CONFIG.patch)[0]
    times = torch.cat([torch.zeros(known), row.timestep.expand(T)])
    whole = pack([Item(tokens, (known + T, H, W), times, row.text, torch.zeros(0))])
    return model(whole)[-len(row.tokens) :]


def test_a_future_chunk_leaves_the_past_identical() -> None:
    from megasora.models.packing import Item, in_patches, pack, patchify

    model = noisy_model(CHUNKED)
    latent = torch.randn(SHAPE)
    shape = in_patches(SHAPE[1:], CONFIG.patch)
    times = torch.tensor([0.1, 0.1, 0.5, 0.5, 0.9, 0.9])

    def ask(x: Tensor, t: Tensor) -> Tensor:
        return model(pack([Item(patchify(x, CONFIG.patch), shape, t, text(1).tokens, torch.zeros(0))]))

    before = ask(latent, times)
    changed, later = latent.clone(), times.clone()
    changed[:, 4:] += 1
    later[4:] = 0.3
    after = ask(changed, later)
    past = 4 * 4  # tokens of two chunks
    assert torch.equal(before[:past], after[:past])
    assert not torch.allclose(before[past:], after[past:])


def test_windows_go_on_from_each_other() -> None:
    """A first stage that repeats: each latent frame but the first is four frames of pixels."""
    made = generator(noisy_model(CONFIG), guidance=1.0, frames=41, window=17, overlap=5)
    seen: list[Tensor] = []

    def decode(latent: Tensor) -> Tensor:
        return torch.cat([latent[:3, :1], latent[:3, 1:].repeat_interleave(4, dim=1)], dim=1)

    def encode(video: Tensor) -> Tensor:
        seen.append(video)
        frames = torch.cat([video[:, :1], video[:, 1::4]], dim=1)
        return torch.cat([frames, frames[:1]])

    prompt = Prompt(text(1), text(2), seed=3)
    parts = list(made.extend((4, 5, 4, 4), 41, prompt, None, decode, encode))
    video = torch.cat(parts, dim=1)
    assert [part.shape[1] for part in parts] == [17, 12, 12]
    assert len(seen) == 2
    assert torch.equal(seen[0], video[:, 12:17])
    assert torch.equal(seen[1][:, 1:], video[:, 25:29])
    assert torch.equal(video[:, :17], decode(made.generate((4, 5, 4, 4), prompt)))


def test_the_latents_shape_and_what_cannot_be_made() -> None:
    config = SampleConfig(frames=17, height=80, width=144)
    assert latent_shape(config, "frames", 16, (4, 8, 8), (1, 2, 2)) == (16, 5, 10, 18)
    with pytest.raises(ConfigError, match=r"sample.frames=18: nearest that the model can make is 17"):
        latent_shape(SampleConfig(frames=18), "frames", 16, (4, 8, 8), (1, 2, 2))
    with pytest.raises(ConfigError, match=r"sample.width=8: nearest that the model can make is 16"):
        latent_shape(SampleConfig(width=8), "frames", 16, (4, 8, 8), (1, 2, 2))
    with pytest.raises(ConfigError, match=r"sample.window=18: nearest that the model can make is 17"):
        latent_shape(SampleConfig(frames=40, window=18), "window", 16, (4, 8, 8), (1, 2, 2))


def test_the_verb_computes_in_the_precision_of_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One process under autocast, several with an engine of that precision; without fp8."""
    whole, asked = noisy_model(CONFIG).eval(), []

    def fill(path: Path, tensors: dict[str, Tensor], **_: Any) -> None:
        for name, parameter in whole.named_parameters():
            if tensors:
                tensors[f"ema/{name}"].copy_(parameter.detach())

    def engine(config: Config, group: Any, blank: bool) -> Any:
        asked.append(config.precision)
        return SimpleNamespace(tensors=dict, loaded=lambda: None, predict=None)

    monkeypatch.setattr(verb, "resume_path", lambda *_: SimpleNamespace(path=tmp_path))
    monkeypatch.setattr(verb, "read_facts", lambda path: {"step": 3})
    monkeypatch.setattr(verb, "load", fill)
    monkeypatch.setattr(verb, "build_engine", engine)
    row = pack([Item(torch.randn(8, 16), (2, 2, 2), torch.full((2,), 0.5), text(1).tokens, torch.zeros(0))])
    plain = Config(model=CONFIG)
    lower = replace(plain, precision=EngineConfig(precision="bf16", fp8="tensor", fp8_gather=True))
    one, two = (SimpleNamespace(world=world, device=CPU) for world in (1, 2))
    with torch.no_grad():
        assert torch.equal(verb.load_model(plain, one)[0](row), whole(row))  # type: ignore[arg-type]
        rounded = verb.load_model(lower, one)[0](row)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(rounded, whole(row))
    assert rounded.dtype == torch.bfloat16
    for config in (plain, lower):
        verb.load_model(config, two)  # type: ignore[arg-type]
    assert asked == [EngineConfig(), EngineConfig(precision="bf16")]
