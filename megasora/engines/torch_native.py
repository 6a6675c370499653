"""The default engine: a plain model spread over one DeviceMesh, its optimizer and its EMA.

An engine owns everything that a training step changes. The trainer sees `forward_backward`, `update`, `tensors` and little
else, so that another engine can stand in its place.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from megasora.engines.fused import FusedAdamW, adamw_state
from megasora.engines.muon import Muon, sharded_like
from megasora.engines.optim import OptimConfig, build_optimizers, last_square
from megasora.models.attention_operator import as_operator
from megasora.models.base import Model
from megasora.models.packing import PackedRow
from megasora.parallel.compiled import compile_blocks
from megasora.parallel.context import ContextAttention
from megasora.parallel.context_operator import ContextOperator
from megasora.parallel.fp8 import FP8, fp8_context, fp8_tensors, to_fp8
from megasora.parallel.layout import ParallelConfig
from megasora.parallel.mesh import Processes
from megasora.parallel.pipeline import Pipeline, Stages, on_all_stages
from megasora.parallel.remat import offload, recompute
from megasora.parallel.tensor import Style, gathered, is_split, split_model
from megasora.parallel.zero import OptimizerShards, all_reduce_together, local, shard_model

Answering = Callable[..., Tensor]  # a model, or its last stage: (row) -> the answer


class Part(Protocol):
    """What the engine needs of a micro-batch: it can be cut along its tokens."""

    @property
    def row(self) -> PackedRow: ...

    @property
    def width(self) -> int:
        """How many of the context-parallel ranks share it; 0: all."""
        ...

    def part(self, index: int, parts: int, shared: int) -> Any: ...


Row = TypeVar("Row", bound=Part)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """`bf16` computes in bfloat16 over fp32 master weights, reducing gradients in fp32; timesteps and norms stay fp32."""

    precision: Literal["fp32", "bf16"] = "fp32"
    fp8: FP8 = "none"  # by which recipe the products of blocks are in fp8, with precision=bf16
    fp8_gather: bool = False  # ZeRO-2 and 3 gather weights as fp8

    def __post_init__(self) -> None:
        if self.fp8 != "none" and self.precision != "bf16":
            raise ValueError(f"fp8={self.fp8}: goes with precision.precision=bf16")
        if self.fp8_gather and self.fp8 != "tensor":
            raise ValueError(f"fp8_gather=true: weights are gathered as fp8 with precision.fp8=tensor, not {self.fp8}")


class Engine(Protocol):
    """What the trainer needs of an engine."""

    model: Model[Any]

    def forward_backward(self, rows: Sequence[Any], loss: Callable[[Answering, Any], Tensor]) -> Tensor:
        """Accumulates the gradients of the sum of `loss(model, row)` over rows and data-parallel ranks; returns that sum."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """By parameter, after `forward_backward` and before anything else, in the form of `tensors`."""
        ...

    def clip(self) -> Tensor:
        """The global norm of the gradients. The update that follows has them scaled down to `optim.clip` if it is larger."""
        ...

    def update(self, lr: float) -> None:
        """Steps the optimizer and the EMA, and clears the gradients."""
        ...

    def sizes(self) -> dict[str, float]:
        """`weight_norm`, the global norm of the weights, and `update_ratio`, that of what the last update added by it: what the
        engine can tell without memory of its own. All ranks call it."""
        ...

    def discard(self) -> None:
        """Clears the gradients and changes nothing."""
        ...

    def materialise_optimizer(self) -> None:
        """Gives the optimizer its state before the first step, so that a load can fill it."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, by name: model/, ema/ and optim/. Views of the live state."""
        ...

    def loaded(self) -> None:
        """To be called after the tensors of `tensors` have been filled from elsewhere."""
        ...

    def save_own(self, root: Path, step: int, facts: dict[str, Any], check: Callable[[], None]) -> Path | None:
        """Saves a step in the form of the engine's library too, where that has one and the config asks for it. `check` raises if
        this job must not write. All ranks call it."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has the EMA's weights."""
        ...

    def predict(self, row: PackedRow, *options: Any) -> Tensor:
        """The model's answer for a whole row, fp32, on every rank of a replica, which all ask for it."""
        ...


class TorchNative:
    """DDP for zero0, shards of the optimizer for zero1, FSDP2 for zero2, zero3 and HSDP; stages of a pipeline, split layers, cut
    rows. `build` makes the model; its weights are drawn from `seed`, or left as they are (None) for a checkpoint to fill: to draw
    them takes a whole model in the host's memory.

    One rule for gradients: every rank's are parts of a sum. Those of split layers are summed over the ranks that see other tokens
    (dp x cp), all others over the tensor group too, and what all stages share over the pipeline.
    """

    def __init__(
        self,
        build: Callable[[], Model[Any]],
        seed: int | None,
        processes: Processes,
        parallel: ParallelConfig,
        config: EngineConfig,
        optim: OptimConfig,
        plan: list[tuple[str, Style]],
    ) -> None:
        self.processes, self.config, self.optim = processes, config, optim
        layout = processes.layout
        with torch.device("meta"):
            model = build()
        if parallel.compile:
            model.attention = as_operator(model.attention)
        if layout.cp > 1:
            kind = ContextOperator if parallel.compile else ContextAttention
            model.attention = kind(model.attention, processes.contexts)
        if layout.tp > 1:
            split_model(model, plan, processes.mesh["tp"], layout.sequence_parallel)
        to_fp8(model, config.fp8, processes.device if config.fp8_gather else None)
        stages = Stages(model, processes.pipeline) if layout.pp > 1 else None
        recompute(model.blocks.children(), parallel.recompute)
        if parallel.compile:
            compile_blocks(model.blocks.children(), fp8=config.fp8 != "none")
        if parallel.offload:
            offload(model.blocks.children())
        lower = config.precision == "bf16"
        self.fsdp = layout.zero >= 2
        if self.fsdp:
            shard_model(model, stages or model, processes.shards, keep=layout.zero == 2, lower=lower)
        model.to_empty(device=processes.device)
        if seed is not None:
            init_weights(model, build, seed)
        self.model = model
        self.pipeline = None
        if stages is not None:
            dtype = torch.bfloat16 if lower else torch.float32
            self.pipeline = Pipeline(stages, model.config.width, dtype, processes.device, self._lower)
        self.root: nn.Module = stages or model  # what FSDP2 knows as the root
        # DDP overlaps its reduction with backward, but takes neither split parameters nor several rows at once.
        ddp = layout.zero == 0 and layout.dp * layout.cp > 1 and layout.tp * layout.pp == 1
        self.wrapped = DistributedDataParallel(model, process_group=processes.replicas.get_group()) if ddp else model
        self.averages = ddp or self.fsdp  # the wrappers' gradients are means over dp x cp
        self.parameters = dict(model.named_parameters())
        self.shards = OptimizerShards(self.parameters, processes.replicas) if layout.zero == 1 else None
        self.owned = self.shards.owned if self.shards else self.parameters  # what this rank updates
        self.optimizers = build_optimizers(self.owned, optim, processes.peers if optim.name == "muon" else None)
        self.ema = {name: p.detach().clone() for name, p in self.owned.items()} if optim.ema else {}

    def forward_backward(self, rows: Sequence[Row], loss: Callable[[Answering, Row], Tensor]) -> Tensor:
        mine = [stretch_here(self.processes, row) for row in rows]
        if self.pipeline is not None:
            total = self.pipeline.step(mine, self._share_of(loss), self._backward)
        else:
            total = torch.zeros((), device=self.processes.device)
            for i, row in enumerate(mine):
                last = i == len(mine) - 1
                unsynced = isinstance(self.wrapped, DistributedDataParallel) and not last
                with self.wrapped.no_sync() if unsynced else nullcontext():  # type: ignore[operator]
                    with self._lower():
                        value = self._share_of(loss)(self.wrapped, row)
                    self._backward(value, None, last)
                total += value.detach()
        self._reduce()
        dist.all_reduce(total)
        return total

    def _backward(self, y: Tensor, gradient: Tensor | None, last: bool) -> None:
        """Of a loss, or of what a stage gave, whose gradient came back. Gradients travel with the last one of a step."""
        if self.fsdp:
            self.root.set_requires_gradient_sync(last)  # type: ignore[operator]
            self.root.set_reshard_after_backward(last or self.processes.layout.zero == 3)  # type: ignore[operator]
        if gradient is None and self.averages:
            y = y * (self.processes.layout.dp * self.processes.layout.cp)
        with record_function("backward"):
            y.backward(gradient)

    @torch.no_grad()
    def _reduce(self) -> None:
        """The sums that no wrapper does: over the tensor group, the pipeline, and without a wrapper over dp x cp."""
        layout, mesh = self.processes.layout, self.processes.mesh
        if layout.tp > 1:
            together = [local(p.grad) for p in self.parameters.values() if p.grad is not None and not is_split(p)]
            all_reduce_together(together, mesh["tp"].get_group())
        if self.pipeline is not None:
            shared = [self.parameters[name] for name in sorted(self.pipeline.stages.shared)]
            for parameter in shared:
                if parameter.grad is None:  # only other stages use it
                    parameter.grad = torch.zeros_like(parameter)
            all_reduce_together([local(p.grad) for p in shared], mesh["pp"].get_group())
        if self.shards is not None:
            self.shards.reduce()
        elif not self.averages and layout.dp * layout.cp > 1:
            every = [local(p.grad) for p in self.parameters.values() if p.grad is not None]
            all_reduce_together(every, self.processes.replicas.get_group())

    def gradients(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.owned.items()}

    @torch.no_grad()
    def clip(self) -> Tensor:
        gradients = {name: local(p.grad) for name, p in self.owned.items() if p.grad is not None}
        squares = self._squares(gradients)
        if self.processes.world > 1:
            dist.all_reduce(squares)
        norm = squares.sqrt()
        if self.optim.clip:
            share = (self.optim.clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(list(gradients.values()), share)
        return norm

    def _squares(self, tensors: dict[str, Tensor]) -> Tensor:
        """Of this rank's shares of tensors by parameter, those that count: the sum of their squares."""
        mine = [tensor for name, tensor in tensors.items() if self._counts(name)]
        if not mine:
            return torch.zeros((), device=self.processes.device)
        return torch.stack(torch._foreach_norm(mine)).float().square().sum()

    def _counts(self, name: str) -> bool:
        """Whether the global norm has this rank's gradient: of what several ranks have whole, only one's counts."""
        place, layout = self.processes.place, self.processes.layout
        first_of_tensor_group = place["tp"] == 0 or is_split(self.parameters[name])
        first_stage = place["pp"] == 0 or self.pipeline is None or name not in self.pipeline.stages.shared
        # The dimensions whose ranks hold the same gradient.
        apart = {0: ("dp_replicate", "dp_shard", "cp"), 1: ()}.get(layout.zero, ("dp_replicate",))
        first_replica = not any(place[axis] for axis in apart)
        return first_of_tensor_group and first_stage and first_replica

    def update(self, lr: float) -> None:
        with record_function("optimizer"):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        self.discard()
        if self.ema:
            with record_function("ema"):
                live = [local(p) for p in self.owned.values()]
                torch._foreach_lerp_([local(t) for t in self.ema.values()], live, 1 - self.optim.ema)
        if self.shards is not None:
            self.shards.gather()

    @torch.no_grad()
    def sizes(self) -> dict[str, float]:
        names = {parameter: name for name, parameter in self.owned.items()}
        found = torch.zeros(3, device=self.processes.device)  # squares of weights, of updates; how many had none
        found[0] = self._squares({name: local(p) for name, p in self.owned.items()})
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:  # one at a time: an update is as large as its weights
                    square = last_square(optimizer, parameter, group["lr"], group["weight_decay"], self.optim)
                    if square is None:
                        found[2] += 1
                    elif self._counts(names[parameter]):
                        found[1] += square
        dist.all_reduce(found)
        weights, updates, unknown = found.tolist()
        sizes = {"weight_norm": math.sqrt(weights)}
        return sizes if unknown or not weights else sizes | {"update_ratio": math.sqrt(updates / weights)}

    def discard(self) -> None:
        for parameter in (*self.parameters.values(), *self.owned.values()):
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        state = {f"model/{name}": parameter.detach() for name, parameter in self.owned.items()}
        state |= {f"ema/{name}": tensor for name, tensor in self.ema.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.owned.items()}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                state |= {f"optim/{names[parameter]}/{key}": value for key, value in values.items()}
        return state | fp8_tensors(self.model)

    def materialise_optimizer(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if isinstance(optimizer, torch.optim.AdamW | FusedAdamW):
                        optimizer.state[parameter] = adamw_state(parameter)
                    elif isinstance(optimizer, Muon):
                        optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if not self.ema:
            yield
            return
        live = [local(p) for p in self.owned.values()]
        kept = [t.clone() for t in live]
        torch._foreach_copy_(live, [local(t) for t in self.ema.values()])
        self.loaded()
        try:
            yield
        finally:
            torch._foreach_copy_(live, kept)
            self.loaded()

    @torch.no_grad()
    def predict(self, row: PackedRow, *options: Any) -> Tensor:
        if self.pipeline is None:
            with self._lower():
                return whole_answer(self.processes, self.model, row, *options)
        assert not options
        pipeline, group = self.pipeline, self.processes.mesh["pp"].get_group()
        return whole_answer(
            self.processes, lambda mine: on_all_stages(pipeline.answer(mine), group, self.processes.device), row
        )

    def loaded(self) -> None:
        """To be called when the tensors of `tensors` have been given other values: what was gathered of them is stale."""
        if self.shards is not None:
            self.shards.gather()
        for module in self.root.modules():
            if isinstance(module, FSDPModule):  # zero2 keeps gathered what a forward pass has gathered
                module.reshard()

    def save_own(self, root: Path, step: int, facts: dict[str, Any], check: Callable[[], None]) -> Path | None:
        return None

    def _share_of(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Ranks that hold the same tokens count a share of their loss each."""
        return lambda model, row: loss(model, row) * self.processes.share

    @contextmanager
    def _lower(self) -> Iterator[None]:
        """In what precision models compute; profiles call it forward."""
        lower = self.config.precision == "bf16"
        kind = self.processes.device.type
        autocast = torch.autocast(kind, torch.bfloat16, enabled=lower, cache_enabled=False)
        with record_function("forward"), autocast, fp8_context(self.config.fp8):
            yield


def stretch_here(processes: Processes, row: Row) -> Row:
    """This rank's stretch of a row."""
    index, parts, shared = processes.part(row.width or processes.layout.cp)
    return row.part(index, parts, shared) if parts > 1 else row


def whole_answer(processes: Processes, model: Answering, row: PackedRow, *options: Any) -> Tensor:
    """The row is cut as in training. With options of the model's (cached keys) only the tensor group cuts it."""
    index, parts, shared = processes.part(processes.layout.cp)
    if options:
        index, parts = index % shared, shared
    y = model(row.part(index, parts, shared) if parts > 1 else row, *options).float()
    for axis, count in (("tp", shared), ("cp", parts // shared)):
        if count > 1:
            y = gathered(y, processes.mesh[axis].get_group())
    return y


def init_weights(model: nn.Module, build: Callable[[], nn.Module], seed: int) -> None:
    """The same weights on every layout: drawn whole on the CPU from the seed, a parameter at a time, then sharded."""
    torch.manual_seed(seed)
    whole = build()
    whole.init_weights()  # type: ignore[operator]
    with torch.no_grad():
        weights = dict(whole.named_parameters())
        for name, target in model.named_parameters():  # of a stage, some of them
            target.copy_(sharded_like(target, weights[name].to(target.device)))
