import pytest
import torch
from torch import Tensor, nn

from megasora.config import SampleConfig
from megasora.errors import ConfigError
from megasora.models.packing import PackedRow
from megasora.sampling import generate, latent_shape


class SaysItsText(nn.Module):
    """The velocity of every token is the first number of its sample's text."""

    def forward(self, row: PackedRow) -> Tensor:
        first = torch.stack([row.text[a, 0] for a in row.caption.offsets[:-1]])
        return first[row.video.sample][:, None].expand(row.tokens.shape)


def draw(text: float, negative: float, guidance: float) -> Tensor:
    config = SampleConfig(guidance=guidance, steps=2)
    texts = torch.full((2, 8), text), torch.full((3, 8), negative)
    return generate(SaysItsText(), (1, 2, 2), (4, 1, 4, 4), *texts, config, 0, torch.device("cpu"))


def test_guidance_starts_from_the_negative_prompt() -> None:
    still = draw(0.0, 0.0, 3.0)
    # Guided velocity 2 + 3 · (5 - 2) = 11, from t = 1 to 0; without guidance the text's own.
    torch.testing.assert_close(draw(5.0, 2.0, 3.0) - still, torch.full_like(still, -11.0))
    torch.testing.assert_close(draw(5.0, 2.0, 1.0) - still, torch.full_like(still, -5.0))


def test_the_latents_shape_and_what_cannot_be_made() -> None:
    assert latent_shape(SampleConfig(frames=17, height=80, width=144), 16, (4, 8, 8), (1, 2, 2)) == (16, 5, 10, 18)
    with pytest.raises(ConfigError, match=r"sample.frames=18: nearest that the model can make is 17"):
        latent_shape(SampleConfig(frames=18), 16, (4, 8, 8), (1, 2, 2))
    with pytest.raises(ConfigError, match=r"sample.width=8: nearest that the model can make is 16"):
        latent_shape(SampleConfig(width=8), 16, (4, 8, 8), (1, 2, 2))
