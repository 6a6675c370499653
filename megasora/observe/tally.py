"""The loss by bucket and by how noisy: sums that stay on the device until a curve wants its next point."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

QUANTILES = 5  # equal shares of the distribution that timesteps are drawn from


class Tally:
    """Sums of losses and of their weights since `take`, by group of tokens. A step adds to them and waits for nothing.

    A group is a bucket and one share of the timesteps' distribution. Ranks that hold the same tokens all count them, in the
    losses as in the weights, so that the means are right on every layout. What is not finite shows in its own groups.
    """

    def __init__(self, buckets: Sequence[str], device: torch.device) -> None:
        self.buckets = {name: number for number, name in enumerate(dict.fromkeys(buckets))}
        self.table = torch.zeros(2, len(self.buckets) * QUANTILES, device=device)

    def groups(self, bucket: str, places: Tensor) -> Tensor:
        """[T] places in the distribution, from 0 to 1, of a sample's frames -> [T] int32, the group of each."""
        share = (places * QUANTILES).int().clamp(0, QUANTILES - 1)
        return self.buckets[bucket] * QUANTILES + share

    @torch.no_grad()
    def add(self, groups: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Three times [L]: the loss of each token, and what it counts in the mean."""
        self.table[0].index_add_(0, groups, losses.detach() * weights)
        self.table[1].index_add_(0, groups, weights)

    def take(self) -> dict[str, float]:
        """Means since the last time: `q0.10` by the middle of a share, `bucket_17x80x144`; groups without a sample are left out.
        All ranks call it."""
        dist.all_reduce(self.table)
        losses, weights = self.table.double().cpu().view(2, len(self.buckets), QUANTILES)
        self.table.zero_()
        found = {
            f"q{(share + 0.5) / QUANTILES:.2f}": (losses[:, share], weights[:, share]) for share in range(QUANTILES)
        }
        found |= {f"bucket_{name}": (losses[number], weights[number]) for name, number in self.buckets.items()}
        return {name: (loss.sum() / weight.sum()).item() for name, (loss, weight) in found.items() if weight.sum() > 0}
