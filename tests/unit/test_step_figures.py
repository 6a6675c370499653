"""What a step of the default family costs a GPU, in figures that no GPU is needed for: a change of them has to be meant.

A step of the real engine on fake tensors, which take the road of CUDA tensors (the kernels, no lengths from the device) and have
no values: whatever waits for one, such as `.item()`, fails. They are said to lie on the CPU, for torch built without CUDA does
not differentiate others; so a copy to the host that nobody looks at is not seen. Write the figures anew with
`python -m tests.unit.test_step_figures`.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megasora.config import load_config
from megasora.models.attention_operator import as_operator
from megasora.parallel.compiled import compile_blocks
from megasora.parallel.layout import parse_layout
from megasora.parallel.zero import local
from megasora.planner.dry_run import OneStep, build_step, fake_processes, micro_batch, undrawn
from megasora.planner.job import Job, Row
from megasora.planner.watch import watching

FILE = Path(__file__).parents[1] / "data" / "step.json"
LAYOUTS = ("dp2,zero1", "dp2,zero3", "dp1,tp2,zero1")
MORE = ("dp1,cp2,zero1", "dp1,cp1x2,zero1")
SHAPES = ((4, 16, 16), (8, 16, 12), (1, 16, 24))  # of patches, for compiled blocks


def job_of(layout: str, depth: int, shape: tuple[int, int, int] = SHAPES[0]) -> Job:
    config = load_config(None, [f"--model.depth={depth}", "--model.attention=sdpa"])  # as on a GPU
    T, H, W = shape
    return Job(
        model=config.model, layout=parse_layout(layout), row=Row(((shape, 32),), T * H * W), rows=1, precision="bf16",
        optim=config.optim,
    )  # fmt: skip


@contextmanager
def step_of(job: Job) -> Iterator[OneStep]:
    with (
        fake_processes(job, 0) as group,
        patch.object(FakeTensor, "is_cuda", True, create=True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield build_step(load_config(None, []), job, group, partial(undrawn, job))


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch: operations that are no views and give more than memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        result = func(*args, **(kwargs or {}))
        silent = func.is_view or "empty" in name or func.namespace in ("prim", "_c10d_functional", "c10d")
        if not silent and any(isinstance(value, FakeTensor) for value in tree_leaves((args, result))):
            self.counts[f"{func.namespace}.{name}"] += 1
        return result


def totals(layout: str, depth: int) -> Counter[str]:
    """Of a step: what is launched, collectives by kind, bytes saved for backward without the weights."""
    found, saved = Counter[str](), dict[int, Tensor]()

    def keep(x: Tensor) -> Tensor:
        saved.setdefault(x.untyped_storage()._cdata, x)
        return x

    with step_of(job_of(layout, depth)) as step, watching() as watch:
        with saved_tensors_hooks(keep, lambda x: x), Launches() as launches:
            step.forward_backward()
        step.update()
        weights = {local(p).untyped_storage()._cdata for p in step.engine.model.parameters()}
        found["bytes_saved"] = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in weights)
    found["launches"] = sum(launches.counts.values())
    found.update(call.kind for call in watch.calls)
    return found


def of_a_block(layout: str) -> dict[str, float]:
    """What one block more adds to a step, bytes by token of the whole row."""
    more, less = totals(layout, 3), totals(layout, 2)
    found: dict[str, float] = {name: more[name] - less[name] for name in sorted(more)}
    found["bytes_saved_a_token"] = found.pop("bytes_saved") / job_of(layout, 2).row.length
    return found


def compiled() -> dict[str, Any]:
    """Graphs of the blocks over rows of several shapes."""
    torch._dynamo.reset()
    counters.clear()
    with step_of(job_of("dp2,zero1", 3)) as step:
        model = step.engine.model
        model.attention = as_operator(model.attention)
        compile_blocks(model.blocks.children(), backend="eager")
        for shape in SHAPES:
            replace(step, rows=[micro_batch(job_of("dp2,zero1", 3, shape))]).forward_backward()
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


@pytest.mark.parametrize("layout", [*LAYOUTS, *(pytest.param(layout, marks=pytest.mark.long) for layout in MORE)])
def test_a_block_costs_what_it_did(layout: str) -> None:
    assert of_a_block(layout) == json.loads(FILE.read_text())["a_block"][layout]


def test_blocks_of_all_rows_share_their_graphs() -> None:
    found = compiled()
    assert found == json.loads(FILE.read_text())["compiled"]
    assert found["graph_breaks"] == 0
    assert found["graphs"] <= 3  # two recompilations


def test_a_wait_for_the_device_is_seen() -> None:
    def waits(model: Any, row: Any) -> Tensor:
        loss = step.loss(model, row)
        assert loss.item() >= 0
        return loss

    with (
        step_of(job_of("dp2,zero1", 2)) as step,
        pytest.raises(DataDependentOutputException, match="local_scalar_dense"),
    ):
        replace(step, loss=waits).forward_backward()


if __name__ == "__main__":
    figures = {"a_block": {layout: of_a_block(layout) for layout in (*LAYOUTS, *MORE)}, "compiled": compiled()}
    FILE.write_text(json.dumps(figures, indent=1) + "\n")
