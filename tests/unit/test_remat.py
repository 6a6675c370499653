"""What blocks keep may wait on the host: nothing else changes. That memory of a GPU is freed by it needs a GPU to be seen."""

from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy

from megasora.models.packing import pack
from megasora.models.video_dit import VideoDiT
from megasora.parallel import remat
from megasora.parallel.layout import ParallelConfig
from megasora.parallel.remat import keep_the_dear, offload, recompute
from tests.unit.test_video_dit import make_item, small_model


def gradients(model: VideoDiT) -> dict[str, Tensor]:
    row = pack([make_item((2, 4, 6), 7, 1), make_item((1, 4, 4), 3, 2)])
    model(row).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_attention_of_every_kind_is_kept_by_selective() -> None:
    import megasora.models.attention_operator  # noqa: F401 # whose operators are asked for

    ours = (
        torch.ops.megasora_kernels.flash_cpu,
        torch.ops.megasora_kernels.flash_varlen,
        torch.ops.megasora.packed_attention,
    )
    torchs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for op in (*ours, torchs):
        assert keep_the_dear(None, op.default) == CheckpointPolicy.MUST_SAVE
    assert keep_the_dear(None, torch.ops.aten.mul.Tensor) == CheckpointPolicy.PREFER_RECOMPUTE


class Counted(save_on_cpu):
    """Counts what goes to the host and what comes back, and keeps whose storage went."""

    out, back = 0, 0
    storages: ClassVar[set[int]] = set()

    def __init__(self, pin_memory: bool) -> None:
        super().__init__(pin_memory)
        pack_hook, unpack_hook = self.pack_hook, self.unpack_hook

        def leaves(x: Tensor) -> object:
            Counted.out += 1
            Counted.storages.add(x.untyped_storage()._cdata)
            return pack_hook(x)

        def returns(packed: object) -> Tensor:
            Counted.back += 1
            found: Tensor = unpack_hook(packed)
            return found

        self.pack_hook, self.unpack_hook = leaves, returns


@pytest.mark.parametrize("how", ["none", "full"])
def test_offloaded_blocks_compute_the_same_bits(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counted, "out", 0)
    monkeypatch.setattr(Counted, "back", 0)
    monkeypatch.setattr(Counted, "storages", set())
    plain, moved = small_model(), small_model()
    for model in (plain, moved):
        recompute(model.blocks.children(), how)
    offload(moved.blocks.children())
    expected = gradients(plain)
    with patch.object(remat, "save_on_cpu", Counted):
        found = gradients(moved)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    kept = len(list(moved.blocks))
    assert Counted.out >= kept * (1 if how == "full" else 20)
    assert Counted.back > 0
    assert Counted.storages.isdisjoint(p.untyped_storage()._cdata for p in moved.parameters())


def test_selective_recomputation_keeps_what_it_keeps() -> None:
    """torch holds it where no hook sees it."""
    with pytest.raises(ValueError, match="with offload use none, full or everyK"):
        ParallelConfig(offload=True, recompute="selective")
