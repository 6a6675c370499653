"""Checkpoints on two processes: sharded otherwise than they were saved, and one rank's failure is everybody's."""

import errno
import os
import resource
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from megasora.checkpoint import manifest
from megasora.checkpoint.directory import CheckpointConfig, list_checkpoints
from megasora.checkpoint.load import load, resume_path, verify
from megasora.checkpoint.metadata import read_metadata, saved_tensors
from megasora.checkpoint.save import prune, save
from megasora.checkpoint.saver import Saver
from megasora.errors import CheckpointError
from tests.harness import run_distributed


def build() -> nn.Sequential:
    """Rows that do not divide by two, and one parameter with a single row: rank 1 holds nothing of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1), nn.Linear(1, 8))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Weights and Adam's state after two steps on the same data on every rank."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return named(model, optimizer)


def named(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"optim/{name}/{key}"] = value
    return tensors


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def zeroed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def refused(func: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        func()
    return str(caught.value)


def saved_sharded(root: Path) -> dict[str, Tensor]:
    """Saves at two, loads at two: as it was sharded, by columns, and replicated. Returns the whole tensors."""
    mesh = init_device_mesh("cpu", (2,))
    model = build()
    fully_shard(model, mesh=mesh)
    tensors = trained(model)
    expected = whole(tensors)
    path = save(root, 2, tensors, {"rank": dist.get_rank()})
    assert verify(path) == []
    again = zeroed(tensors)
    assert load(path, again) == {"rank": 0}
    assert same(whole(again), expected)
    columns = {
        name: distribute_tensor(
            torch.zeros_like(tensor), mesh, [Shard(tensor.ndim - 1) if tensor.ndim else Replicate()]
        )
        for name, tensor in expected.items()
    }
    load(path, columns)
    assert same(whole(columns), expected)
    plain = zeroed(expected)
    load(path, plain)
    assert same(plain, expected)
    return expected


def failures(root: Path) -> dict[str, str]:
    """What each rank is told when something fails on one of them only."""
    rank = dist.get_rank()
    good = {"model/x": distribute_tensor(torch.arange(2000.0), init_device_mesh("cpu", (2,)), [Shard(0)])}
    path = save(root, 1, good, {})
    before = sorted(entry.name for entry in root.iterdir())
    told = {}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    told["disk"] = refused(lambda: save(root, 2, good, {}))
    told["disk, same step"] = refused(lambda: save(root, 1, good, {}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told["facts"] = refused(lambda: save(root, 2, good, {"loss": float("nan") if rank == 0 else 0.0}))
    told["object"] = refused(lambda: save(root, 2, good | ({"model/y": 3} if rank else {}), {}))  # type: ignore[dict-item]
    told["shape"] = refused(lambda: save(root, 2, good | {"model/y": torch.zeros(2 + rank)}, {}))
    partial = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()])
    told["partial"] = refused(lambda: save(root, 2, {"model/y": partial}, {}))
    wrong = zeroed(good) | ({"model/z": torch.zeros(3)} if rank == 1 else {})
    told["missing"] = refused(lambda: load(path, wrong))
    told["unexpected"] = refused(lambda: load(path, {}))
    assert whole(wrong)["model/x"].count_nonzero() == 0
    assert sorted(entry.name for entry in root.iterdir()) == before
    assert verify(path) == []
    return told


def in_the_background(root: Path) -> list[str]:
    """As stages of a pipeline save: each its own names, and a shared one. One rank's full disk is told to both."""
    rank = dist.get_rank()
    made = Saver(root, CheckpointConfig(keep_last=1), None, torch.device("cpu"))
    tensors = {f"model/stage{rank}": torch.full((3000,), float(rank)), "model/shared": torch.ones(4)}
    made.start(1, tensors, {})
    for tensor in tensors.values():
        tensor.zero_()
    saved = made.finish()
    assert saved is not None
    every = {"model/stage0": torch.zeros(3000), "model/stage1": torch.zeros(3000), "model/shared": torch.zeros(4)}
    load(saved.path, every)
    assert [tensor.unique().tolist() for tensor in every.values()] == [[0.0], [1.0], [1.0]]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    made.start(2, tensors, {})
    told = [refused(made.finish)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    made.start(3, tensors, {})
    saved = made.finish()
    assert saved is not None
    assert verify(saved.path) == []
    assert [info.step for info in list_checkpoints(root)] == [3]
    return told


def damage_found_by_either(root: Path) -> list[str]:
    """Each rank checks half of the files; a flipped bit in any of them is known to both."""
    path = save(root, 1, {f"model/{dist.get_rank()}": torch.ones(300), "model/both": torch.ones(3)}, {})
    load(path, {f"model/{1 - dist.get_rank()}": torch.zeros(300), "model/both": torch.zeros(3)})  # as stages would
    shares: list[set[str]] = [set(), set()]
    files = sorted(manifest.read_manifest(path).files)
    for name in files:
        if dist.get_rank() == 0:
            data = bytearray((path / name).read_bytes())
            data[-1] ^= 4
            (path / name).write_bytes(data)
        dist.barrier()
        assert [problem.file for problem in verify(path)] == [name]
        for rank, share in enumerate(shares):
            share.update(problem.file for problem in manifest.verify(path, rank=rank, world=2))
        assert path.name in refused(lambda: resume_path(root, "auto"))
        dist.barrier()
        if dist.get_rank() == 0:
            data[-1] ^= 4
            (path / name).write_bytes(data)
        dist.barrier()
    assert sorted(len(share) for share in shares) == [len(files) // 2, (len(files) + 1) // 2]
    assert not shares[0] & shares[1]
    assert resume_path(root, "auto").path == path
    save(root, 2, {"model/both": torch.ones(3)}, {})
    assert prune(root, CheckpointConfig(keep_last=1)) == [path]
    return files


def on_two(directory: Path) -> tuple[dict[str, Any], dict[str, str], list[str], list[str]]:
    """The whole tensors come back as arrays: a tensor in a queue is a handle that dies with its process."""
    from_one = zeroed(trained(build()))
    load(directory / "one" / "step-00000002", from_one)
    assert same(from_one, trained(build()))
    arrays = {name: tensor.numpy() for name, tensor in saved_sharded(directory / "two").items()}
    behind = in_the_background(directory / "background")
    return arrays, failures(directory / "failures"), damage_found_by_either(directory / "bits"), behind


def test_two_processes(tmp_path: Path) -> None:
    reference = trained(build())
    save(tmp_path / "one", 2, reference, {})
    (arrays, told, files, behind), (arrays_1, told_1, _, behind_1) = run_distributed(on_two, 2, tmp_path)

    expected = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name, tensor in reference.items():  # what FSDP2 trained is what one process trains
        torch.testing.assert_close(expected[name], tensor.detach(), rtol=1e-5, atol=1e-6)
    assert same(expected, {name: torch.from_numpy(array) for name, array in arrays_1.items()})
    path = tmp_path / "two" / "step-00000002"
    assert verify(path) == []
    tensors = zeroed(reference)
    load(path, tensors)
    assert same(tensors, expected)
    assert {name: entry.shape for name, entry in saved_tensors(read_metadata(path)).items()} == {
        name: tuple(tensor.shape) for name, tensor in reference.items()
    }

    assert told == told_1
    assert behind == behind_1
    assert os.strerror(errno.EFBIG) in behind[0]
    too_large = os.strerror(errno.EFBIG)
    assert told["disk"].endswith(f"failures: rank 1: OSError: [Errno {errno.EFBIG}] {too_large}")
    assert told["disk, same step"].endswith(too_large)
    assert "rank 0: ValueError: Out of range float" in told["facts"]
    assert "rank 1: TypeError: model/y is a int" in told["object"]
    assert "model/y on rank 1 is not the tensor" in told["shape"]
    assert "model/y is a partial sum" in told["partial"]
    assert "model/z: not in the checkpoint" in told["missing"]
    assert "model/x: in the checkpoint but not wanted" in told["unexpected"]
    assert [info.step for info in list_checkpoints(tmp_path / "failures")] == [1]

    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "facts.json"]
    assert [info.step for info in list_checkpoints(tmp_path / "bits")] == [2]
