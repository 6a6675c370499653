"""The default engine: a plain model, replicated (DDP) or sharded (FSDP2) over one DeviceMesh, its optimizer and its EMA.

An engine owns everything that a training step changes. The trainer sees `forward_backward`, `update`, `tensors` and little
else, so that another engine can stand in its place.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from megasora.engines.muon import sharded_like
from megasora.engines.optim import OptimConfig, build_optimizers
from megasora.parallel.context import ContextAttention
from megasora.parallel.mesh import Processes
from megasora.parallel.tensor import Style, is_split, split_model


class Part(Protocol):
    """What the engine needs of a micro-batch: it can be cut along its tokens."""

    def part(self, index: int, parts: int, shared: int) -> Any: ...


Row = TypeVar("Row", bound=Part)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """`bf16` computes in bfloat16 over fp32 master weights, reducing gradients in fp32; timesteps and norms stay fp32."""

    precision: Literal["fp32", "bf16"] = "fp32"


class Engine(Protocol):
    """What the trainer needs of an engine."""

    model: nn.Module

    def forward_backward(self, rows: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> Tensor:
        """Accumulates the gradients of the sum of `loss(model, row)` over rows and data-parallel ranks; returns that sum."""
        ...

    def clip(self) -> Tensor:
        """The global norm of the gradients, which are scaled down to `optim.clip` if it is larger."""
        ...

    def update(self, lr: float) -> None:
        """Steps the optimizer and the EMA, and clears the gradients."""
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

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the model has the EMA's weights."""
        ...


class TorchNative:
    """DDP for zero0, FSDP2 for zero2 and zero3 and HSDP. `build` makes the model; its weights are drawn from `seed`, or
    left as they are (None) for a checkpoint to fill: to draw them takes a whole model in the host's memory."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        seed: int | None,
        processes: Processes,
        config: EngineConfig,
        optim: OptimConfig,
        plan: list[tuple[str, Style]],
    ) -> None:
        self.processes, self.config, self.optim = processes, config, optim
        with torch.device("meta"):
            model = build()
        layout = processes.layout
        if layout.cp > 1:
            model.attention = ContextAttention(model.attention, processes.context)  # type: ignore[arg-type, assignment]
        if layout.tp > 1:
            split_model(model, plan, processes.mesh["tp"])
        shard_model(model, processes, config)
        model.to_empty(device=processes.device)
        if seed is not None:
            init_weights(model, build, seed)
        self.model = model
        self.sharded = layout.zero >= 2
        # DDP takes no split parameters: with tensor parallelism the reduction is our own, after the last row.
        replicated = layout.dp * layout.cp > 1 and not self.sharded and layout.tp == 1
        self.wrapped = (
            DistributedDataParallel(model, process_group=processes.replicas.get_group()) if replicated else model
        )
        self.optimizers = build_optimizers(model, optim)
        self.ema = {name: p.detach().clone() for name, p in model.named_parameters()} if optim.ema else {}

    def forward_backward(self, rows: Sequence[Row], loss: Callable[[nn.Module, Row], Tensor]) -> Tensor:
        total = torch.zeros((), device=self.processes.device)
        layout = self.processes.layout
        for i, row in enumerate(rows):
            mine = row.part(*self.processes.part) if layout.cp * layout.tp > 1 else row
            with self._reducing(i == len(rows) - 1):
                with self._autocast():
                    value = loss(self.wrapped, mine)
                # Both wrappers average over the ranks that share parameters; the loss is a sum over them.
                (value * layout.dp * layout.cp).backward()
            total += value.detach()
        if layout.tp > 1:
            self._reduce()
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def _reduce(self) -> None:
        """What wrappers do not: of parameters that are not split the sum over the tensor group, without ZeRO the mean over the
        replicas. One collective each."""
        gradients = [(p, local(p.grad)) for p in self.model.parameters() if p.grad is not None]
        together = [g for p, g in gradients if not is_split(p)]
        all_reduce_together(together, self.processes.mesh["tp"].get_group())
        replicas = self.processes.layout.dp * self.processes.layout.cp
        if not self.sharded and replicas > 1:
            every = [g for _, g in gradients]
            torch._foreach_div_(every, replicas)
            all_reduce_together(every, self.processes.replicas.get_group())

    def _norm(self) -> Tensor:
        """The global norm where some parameters are split over the tensor group and others are not."""
        squares = torch.zeros(2, device=self.processes.device)  # of those that are not, and of those that are
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                squares[int(is_split(parameter))] += local(parameter.grad).float().square().sum()
        if self.sharded:
            shards = self.processes.shards
            dist.all_reduce(squares, group=shards.get_group(shards.ndim - 1))
        split = squares[1:].clone()
        dist.all_reduce(split, group=self.processes.mesh["tp"].get_group())
        return (squares[0] + split[0]).sqrt()

    def clip(self) -> Tensor:
        parameters = list(self.model.parameters())
        if self.processes.layout.tp > 1:
            norm = self._norm()
            if self.optim.clip:
                share = (self.optim.clip / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], share)
            return norm
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.optim.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.clip, norm)
        return norm

    def update(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.discard()
        if self.ema:
            live = [local(p) for p in self.model.parameters()]
            torch._foreach_lerp_([local(t) for t in self.ema.values()], live, 1 - self.optim.ema)

    def discard(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        named = dict(self.model.named_parameters())
        state = {f"model/{name}": parameter.detach() for name, parameter in named.items()}
        state |= {f"ema/{name}": tensor for name, tensor in self.ema.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in named.items()}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                state |= {f"optim/{names[parameter]}/{key}": value for key, value in values.items()}
        return state

    def materialise_optimizer(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if isinstance(optimizer, torch.optim.AdamW):
                        optimizer.state[parameter] = {
                            "step": torch.zeros((), dtype=torch.float32, device=self.processes.device),
                            "exp_avg": torch.zeros_like(parameter),
                            "exp_avg_sq": torch.zeros_like(parameter),
                        }
                    else:
                        optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if not self.ema:
            yield
            return
        live = [local(p) for p in self.model.parameters()]
        kept = [t.clone() for t in live]
        torch._foreach_copy_(live, [local(t) for t in self.ema.values()])
        try:
            yield
        finally:
            torch._foreach_copy_(live, kept)
            for module in self.model.modules():
                if isinstance(module, FSDPModule):  # zero2 keeps gathered what a forward pass has gathered
                    module.reshard()

    @contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """Gradients travel once a step: with the last row."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.processes.device.type, torch.bfloat16, enabled=self.config.precision == "bf16", cache_enabled=False
        )


def all_reduce_together(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors over a group, in place, as one."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    torch._foreach_copy_(
        tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded; shares its memory, outside autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_model(model: nn.Module, processes: Processes, config: EngineConfig) -> None:
    """FSDP2 around each block and around the rest; zero3 frees a block's weights after its forward pass, zero2 keeps them."""
    layout = processes.layout
    if layout.zero < 2:
        return
    mesh = processes.shards
    lower = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.get_submodule("blocks").children():
        policy = lower if config.precision == "bf16" else MixedPrecisionPolicy()
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=layout.zero == 3)
    fully_shard(model, mesh=mesh, reshard_after_forward=layout.zero == 3)


def init_weights(model: nn.Module, build: Callable[[], nn.Module], seed: int) -> None:
    """The same weights on every layout: drawn whole on the CPU from the seed, a parameter at a time, then sharded."""
    torch.manual_seed(seed)
    whole = build()
    whole.init_weights()  # type: ignore[operator]
    with torch.no_grad():
        for target, source in zip(model.parameters(), whole.parameters(), strict=True):
            target.copy_(sharded_like(target, source.to(target.device)))
