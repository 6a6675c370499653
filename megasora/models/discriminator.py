"""A 3-D PatchGAN, which tells reconstructions from videos patch by patch (Isola et al. 2017), and the losses of VQGAN (Esser
et al. 2021), which latent diffusion trains its first stage with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """[B, 3, T, H, W] in [-1, 1] -> logits [B, 1, T', H', W'], one for each patch; an image is a video of one frame.

    The norm is over channel groups of each sample, not over the batch: images and clips alternate, and a batch may be one clip.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(3, width, (3, 4, 4), (1, 2, 2), padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv3d(width, 2 * width, (3, 4, 4), (2, 2, 2), padding=1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv3d(2 * width, 4 * width, (3, 4, 4), (2, 2, 2), padding=1),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv3d(4 * width, 1, 3, padding=1),
        )

    def forward(self, video: Tensor) -> Tensor:
        return self.layers(video)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the logits of videos and of reconstructions (Lim and Ye 2017), halved as in VQGAN."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder minimises: minus the mean logit of its reconstructions."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """The factor that makes both losses pull equally hard at the decoder's `last` weight (VQGAN, equation 7). No gradient."""
    wanted, given = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    return (wanted / (given + 1e-4)).clamp(0, 1e4)
