"""The learned perceptual distance LPIPS (Zhang et al. 2018, version 0.1) on features of VGG16, from local weights."""

from itertools import pairwise
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megasora.errors import ConfigError

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels, a pooling between
ENDS = (0, 4, 9, 16, 23, 30)  # layers of VGG16 before each pooling: features are taken here


class LPIPS(nn.Module):
    """Two videos [B, 3, T, H, W] in [-1, 1], at least 16 pixels a side -> the mean distance of their frames, a scalar."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for widths in VGG16:
            layers += [nn.MaxPool2d(2)] if layers else []
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.weights = nn.ParameterList(torch.ones(widths[-1]) for widths in VGG16)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    @classmethod
    def load(cls, file: Path) -> "LPIPS":
        """One safetensors file, its tensors named as they are published: `features.*` of torchvision's VGG16, and
        `lin0.model.1.weight` to `lin4.model.1.weight` of the package lpips. Raises ConfigError.

        To make it: save_file({k: v for k, v in vgg16.state_dict().items() if "features" in k} | torch.load("vgg.pth"), FILE)
        """
        model = cls()
        try:
            tensors = load_file(file)
            names = [name for name in model.state_dict() if name.startswith("features.")]
            state = {name: tensors[name] for name in names}
            state |= {f"weights.{i}": tensors[f"lin{i}.model.1.weight"].flatten() for i in range(len(VGG16))}
            model.load_state_dict(state | {"shift": model.shift, "scale": model.scale})
        except KeyError as error:
            raise ConfigError(
                f"train_vae.lpips={file}: no tensor {error} in it, as VGG16 and lpips name theirs"
            ) from None
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ConfigError(f"train_vae.lpips={file}: no weights of LPIPS ({' '.join(str(error).split())})") from None
        return model

    def forward(self, video: Tensor, other: Tensor) -> Tensor:
        distances = []
        for a, b, weight in zip(self._directions(video), self._directions(other), self.weights, strict=True):
            difference = (a - b).square()  # [B·T, C, H, W]
            distances.append((difference * weight.view(-1, 1, 1)).sum(1).mean())
        return torch.stack(distances).sum()

    def _directions(self, video: Tensor) -> list[Tensor]:
        """Features of each frame after five stages, of unit length over the channels."""
        x = (rearrange(video, "B C T H W -> (B T) C H W") - self.shift) / self.scale
        found = []
        for begin, end in pairwise(ENDS):
            x = self.features[begin:end](x)  # [B·T, C, H, W]
            # 1e-20 inside the root: no gradient is infinite at zero.
            found.append(x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt())
        return found
