"""What an engine does after the gradients, on one process and sharded: clipping, the optimizers, the average, lower precision."""

import copy
from functools import partial
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megasora.engines.optim import OptimConfig
from megasora.engines.torch_native import EngineConfig, TorchNative
from megasora.models.packing import Item, PackedRow, in_patches, pack, patchify
from megasora.models.video_dit import VideoDiT, VideoDiTConfig
from megasora.parallel.layout import ParallelConfig, parse_layout
from megasora.parallel.mesh import AXES, Processes
from tests.harness import run_distributed

CONFIG = VideoDiTConfig(width=48, depth=2, heads=4, ffn=96, channels=4, text_width=24)
CAPACITY = 32
# (T, H, W) of four samples; every rank's two rows hold one each at dp2, one row each at dp4.
SHAPES = [(1, 4, 4), (3, 2, 6), (2, 4, 2), (1, 6, 6)]


class Batch(NamedTuple):
    row: PackedRow
    target: Tensor  # [L, P]
    weight: Tensor  # [L]
    width: int = 0


def row_of(samples: list[int]) -> Batch:
    items, targets, weights = [], [], []
    for i in samples:
        generator = torch.Generator().manual_seed(i)
        patches = patchify(torch.randn(4, *SHAPES[i], generator=generator), CONFIG.patch)
        shape = in_patches(SHAPES[i], CONFIG.patch)
        text = torch.randn(3 + i, 24, generator=generator)
        items.append(Item(patches, shape, torch.full((shape[0],), 0.2 + 0.15 * i), text, torch.zeros(0)))
        targets.append(torch.randn(patches.shape, generator=generator))
        weights.append(torch.full((len(targets[-1]),), 1 / (len(targets[-1]) * len(SHAPES))))
    row = pack(items, CAPACITY * len(samples))
    padding = row.video.total - sum(map(len, targets))
    target = nn.functional.pad(torch.cat(targets), (0, 0, 0, padding))
    return Batch(row, target, nn.functional.pad(torch.cat(weights), (0, padding)))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return ((model(batch.row).float() - batch.target).square().mean(-1) * batch.weight).sum()


class NoisyDiT(VideoDiT):
    """Its zero-initialised parameters are noise: else most gradients are zero and nothing is compared."""

    def init_weights(self) -> None:
        super().init_weights()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.02 * torch.randn_like(parameter)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


ADAMW, PLAIN = OptimConfig(clip=0.5), EngineConfig()


def train(layout: str, optim: OptimConfig = ADAMW, config: EngineConfig = PLAIN) -> dict[str, Any]:
    """Two updates on the four samples; what came of it, whole, on every rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    parsed = parse_layout(layout, world)
    shape = (1, parsed.dp_replicate, parsed.dp_shard, 1, 1)
    mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=AXES)
    group = Processes(rank, world, torch.device("cpu"), parsed, mesh)
    engine = TorchNative(partial(NoisyDiT, CONFIG), 7, group, ParallelConfig(), config, optim, [])
    share = 4 // world
    samples = range(group.data_rank * share, (group.data_rank + 1) * share)
    rows = [row_of([i]) for i in samples] if world > 1 else [row_of([0, 1]), row_of([2, 3])]
    result: dict[str, Any] = {"losses": [], "norms": []}
    for _ in range(2):
        result["losses"].append(engine.forward_backward(rows, loss).item())
        result["norms"].append(engine.clip().item())
        engine.update(1e-3)
    result["sizes"] = engine.sizes()
    result["state"] = {name: whole(tensor).clone() for name, tensor in engine.tensors().items()}
    return result


def muon(layout: str) -> dict[str, Any]:
    return train(layout, OptimConfig(name="muon", lr=1e-2, clip=1.0))


def bf16(layout: str) -> dict[str, Any]:
    return train(layout, config=EngineConfig(precision="bf16"))


def fp8() -> list[dict[str, Any]]:
    """With weights gathered in bf16, and as fp8."""
    return [
        train("dp2,zero3", config=EngineConfig(precision="bf16", fp8="tensor", fp8_gather=gather))
        for gather in (False, True)
    ]


def alone() -> tuple[dict[str, Any], dict[str, Any]]:
    return train("dp1"), muon("dp1")


def on_two() -> tuple[dict[str, Any], ...]:
    return bf16("dp2,zero3"), muon("dp2"), muon("dp2,zero3"), muon("dp2,zero1")


def test_muon_is_the_same_sharded_and_bf16_follows_fp32() -> None:
    ((plain, by_muon),) = run_distributed(alone, 1)
    for lower, *sharded in run_distributed(on_two, 2):
        assert lower["losses"] == pytest.approx(plain["losses"], rel=2e-2)
        assert lower["losses"] != plain["losses"]
        assert all(t.dtype == torch.float32 for t in lower["state"].values())
        assert lower["sizes"] == pytest.approx(plain["sizes"], rel=2e-2)
        assert plain["sizes"].keys() == {"weight_norm", "update_ratio"}
        for result in sharded:
            assert result["sizes"] == pytest.approx(by_muon["sizes"], rel=1e-5)
            assert result["sizes"].keys() == {"weight_norm", "update_ratio"}
            assert by_muon["state"].keys() == result["state"].keys()
            for name, expected in by_muon["state"].items():
                assert torch.allclose(result["state"][name], expected, rtol=1e-4, atol=1e-5), name
            moved = [n for n in by_muon["state"] if n.endswith("momentum_buffer")]
            assert len(moved) == 20  # 2 blocks x (8 attention + 2 MLP) matrices


def test_weights_gathered_as_fp8_are_those_cast_after_gathering() -> None:
    for plain, gathered in run_distributed(fp8, 2):
        assert gathered["losses"] == pytest.approx(plain["losses"], rel=1e-3)
        assert gathered["norms"] == pytest.approx(plain["norms"], rel=1e-3)
        assert gathered["losses"] != plain["losses"]  # cast from fp32, not from bf16


def by_hand() -> dict[str, Any]:
    """Three updates by the engine and by plain torch: clipping, the rate, the average, and that it can be put back."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1, 1, 1, 1), mesh_dim_names=AXES)
    group = Processes(0, 1, torch.device("cpu"), parse_layout("dp1", 1), mesh)
    optim = OptimConfig(clip=0.05, ema=0.9)
    engine = TorchNative(partial(NoisyDiT, CONFIG), 7, group, ParallelConfig(), EngineConfig(), optim, [])
    model = copy.deepcopy(engine.model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    average = [p.detach().clone() for p in model.parameters()]
    norms = []
    for i, lr in enumerate((1e-3, 3e-3, 1e-4)):
        engine.forward_backward([row_of([i]), row_of([3])], loss)
        (loss(model, row_of([i])) + loss(model, row_of([3]))).backward()
        expected = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        norms.append((engine.clip().item(), expected.item()))
        torch.testing.assert_close([p.grad for p in engine.model.parameters()], [p.grad for p in model.parameters()])
        engine.update(lr)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        average = [0.9 * a + 0.1 * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
    live = [p.detach().clone() for p in engine.model.parameters()]
    with engine.averaged():
        torch.testing.assert_close([p.detach() for p in engine.model.parameters()], average, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(live, engine.model.parameters(), strict=True))
    torch.testing.assert_close(live, [p.detach() for p in model.parameters()], rtol=1e-4, atol=1e-5)
    return {"norms": norms}


def sized(optimizer: Literal["adamw", "muon"]) -> list[tuple[dict[str, float], dict[str, float]]]:
    """What the engine says of weights that decay and of their update, and what they were and became."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1, 1, 1, 1), mesh_dim_names=AXES)
    group = Processes(0, 1, torch.device("cpu"), parse_layout("dp1", 1), mesh)
    optim = OptimConfig(name=optimizer, weight_decay=0.5, clip=0.1)
    engine = TorchNative(partial(NoisyDiT, CONFIG), 7, group, ParallelConfig(), EngineConfig(), optim, [])
    assert engine.sizes().keys() == {"weight_norm"}  # no update yet
    found = []
    for lr in (1e-2, 3e-2):
        before = nn.utils.parameters_to_vector(engine.model.parameters()).detach().double()
        engine.forward_backward([row_of([0]), row_of([1])], loss)
        engine.clip()
        engine.update(lr)
        after = nn.utils.parameters_to_vector(engine.model.parameters()).detach().double()
        ratio = ((after - before).norm() / after.norm()).item()
        found.append((engine.sizes(), {"weight_norm": after.norm().item(), "update_ratio": ratio}))
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sizes_are_those_of_the_weights_and_of_their_update(optimizer: str) -> None:
    (result,) = run_distributed(partial(sized, optimizer), 1)
    for said, true in result:
        assert said == pytest.approx(true, rel=1e-4)


def test_an_update_is_plain_torchs() -> None:
    (result,) = run_distributed(by_hand, 1)
    for ours, theirs in result["norms"]:
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert ours > 0.05  # so that something is clipped
