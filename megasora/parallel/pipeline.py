"""Pipeline parallelism: each process has some of the blocks, and rows go through the processes in turn.

Every stage makes the setting of a row itself, from embedders that all stages have; their gradients are parts of a sum over the
pipeline. The first stage alone has the entry, the last alone the exit and the loss. Only what goes from block to block is sent.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasora.models.base import Model
from megasora.models.packing import PackedRow
from megasora.parallel.schedule import CHUNKS, Action, Kind, schedule, split_blocks


@dataclass(frozen=True)
class Place:
    """A process's place in its pipeline, and groups for what is sent.

    Forward and backward, and links that begin at an even place and at an odd one, have groups of their own, and so has the link
    that closes a ring of an odd number: then a process sends or receives in a group, with one other, and no message waits behind
    another, although NCCL takes a group's one by one.
    """

    index: int
    count: int
    name: str  # of the schedule
    # Groups of the links from even places, from odd ones, and where there is one the closing link.
    forward: tuple[dist.ProcessGroup, ...]
    backward: tuple[dist.ProcessGroup, ...]

    @property
    def chunks(self) -> int:
        return CHUNKS[self.name]

    def stage(self, chunk: int) -> int:
        return chunk * self.count + self.index

    @property
    def last(self) -> int:
        return self.chunks * self.count - 1

    def link(self, kind: Kind, sender: int) -> dist.ProcessGroup:
        groups, closing = (self.forward, self.count - 1) if kind == "forward" else (self.backward, 0)
        return groups[2 if self.count % 2 and sender == closing else sender % 2]


class Stages(nn.Module):
    """A model of which only this process's chunks of blocks, and what they need, are left."""

    def __init__(self, model: Model[Any], place: Place) -> None:
        super().__init__()
        self.place, self.shared = place, shared_parameters(model)
        ranges = split_blocks(block_costs(model), place.last + 1)
        self.chunks = [list(map(str, ranges[place.stage(chunk)])) for chunk in range(place.chunks)]
        mine = {name for names in self.chunks for name in names}
        model.blocks = nn.ModuleDict({str(i): b for i, b in enumerate(model.blocks) if str(i) in mine})  # type: ignore[assignment]
        for name in (*model.ENTRY,) * (place.index > 0) + (*model.EXIT,) * (place.index < place.count - 1):
            if hasattr(model, name):  # some of a family have one of two
                delattr(model, name)
        self.model = model

    def forward(self, row: PackedRow, x: Tensor | None, chunk: int) -> Tensor:
        """x [L, D] of the stage before (none: this is the first) -> [L, D], or the model's answer from the last stage."""
        setting = self.model.setting(row)
        x = self.model.enter(setting) if x is None else x  # [L, D]
        for name in self.chunks[chunk]:
            x = self.model.get_submodule(f"blocks.{name}")(x, setting)
        return self.model.leave(x, setting) if self.place.stage(chunk) == self.place.last else x


class Pipeline:
    """Takes rows through the stages, forward and backward, in the order of the schedule."""

    def __init__(
        self,
        stages: Stages,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        lower: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Tokens of `width` numbers of a `dtype` are sent; forward passes run in `lower`."""
        self.stages, self.place, self.lower = stages, stages.place, lower
        self.width, self.dtype, self.device = width, dtype, device

    def step(
        self,
        rows: Sequence[Any],
        loss: Callable[[Callable[..., Tensor], Any], Tensor],
        backward: Callable[[Tensor, Tensor | None, bool], None],
    ) -> Tensor:
        """Accumulates gradients of the sum of `loss(model, row)`; gives that sum on the last stage, else zero.

        `backward(y, gradient, last)` runs a backward pass, the `last` one of the step among them.
        """
        total = torch.zeros((), device=self.device)
        held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}  # (chunk, row) -> what came in and what went out
        sent: list[tuple[dist.Work, Tensor]] = []
        actions = schedule(self.place.name, self.place.count, len(rows))[self.place.index]
        packed = [row.row for row in rows]
        arriving = self._receive(actions[0], packed)
        for number, action in enumerate(actions):
            came, row = arriving, rows[action.row]
            if number + 1 < len(actions):
                arriving = self._receive(actions[number + 1], packed)  # on its way while this one computes
            x = None
            if came is not None:
                came[0].wait()
                x = came[1]
            if action.kind == "forward":
                if x is not None:
                    x.requires_grad_()
                if self.place.stage(action.chunk) < self.place.last:
                    with self.lower():
                        y = self.stages(row.row, x, action.chunk)
                    sent = [*on_their_way(sent), self._send(y.detach(), "forward")]
                else:
                    with self.lower():
                        y = loss(partial(self.stages, x=x, chunk=action.chunk), row)
                    total += y.detach()
                held[action.chunk, action.row] = x, y
            else:
                before, y = held.pop((action.chunk, action.row))
                backward(y, x, number + 1 == len(actions))
                if before is not None:
                    assert before.grad is not None
                    sent = [*on_their_way(sent), self._send(before.grad, "backward")]
        for work, _ in sent:
            work.wait()
        return total

    def answer(self, row: PackedRow) -> Tensor | None:
        """The model's answer for a row, on the last stage only."""
        found = None
        for chunk in range(self.place.chunks):
            action = Action("forward", chunk, 0)
            came = self._receive(action, [row])
            if came is not None:
                came[0].wait()
            with self.lower():
                y = self.stages(row, None if came is None else came[1], chunk)
            if self.place.stage(chunk) < self.place.last:
                self._send(y, "forward")[0].wait()
            else:
                found = y
        return found

    def _receive(self, action: Action, rows: Sequence[PackedRow]) -> tuple[dist.Work, Tensor] | None:
        """Begins to receive what an action needs; None where nothing has to come."""
        stage = self.place.stage(action.chunk)
        if stage == (0 if action.kind == "forward" else self.place.last):
            return None
        source = (self.place.index + (-1 if action.kind == "forward" else 1)) % self.place.count
        tokens = self.stages.model.carried(rows[action.row])
        x = torch.empty(tokens, self.width, dtype=self.dtype, device=self.device)
        work = dist.irecv(x, group=self.place.link(action.kind, source), group_src=source)
        assert work is not None
        return work, x

    def _send(self, x: Tensor, kind: Kind) -> tuple[dist.Work, Tensor]:
        """Begins to send to the next stage, or back to the one before. The tensor must live until it is gone."""
        x = x.contiguous()
        assert x.dtype == self.dtype  # what the other side expects
        target = (self.place.index + (1 if kind == "forward" else -1)) % self.place.count
        work = dist.isend(x, group=self.place.link(kind, self.place.index), group_dst=target)
        assert work is not None
        return work, x


def on_their_way(sent: list[tuple[dist.Work, Tensor]]) -> list[tuple[dist.Work, Tensor]]:
    """Without those that have arrived, whose tensors need no longer be kept."""
    return [(work, x) for work, x in sent if not work.is_completed()]


def on_all_stages(answer: Tensor | None, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """What the last stage has and the others have not, in fp32."""
    shape, last = [None if answer is None else tuple(answer.shape)], dist.get_world_size(group) - 1
    dist.broadcast_object_list(shape, group=group, group_src=last, device=device)
    y = torch.empty(shape[0] or (), device=device) if answer is None else answer.float().contiguous()
    dist.broadcast(y, group=group, group_src=last)
    return y


def shared_parameters(model: Model[Any]) -> set[str]:
    """Names of the parameters that every stage has: those that make the setting."""
    apart = ("blocks", *model.ENTRY, *model.EXIT)
    return {name for name, _ in model.named_parameters() if name.split(".")[0] not in apart}


def block_costs(model: Model[Any]) -> list[float]:
    """What each block costs a token, in multiply-adds of its matrices; entry and exit count with the first and the last."""
    costs = [matrices(block) for block in model.blocks]
    for names, at in ((model.ENTRY, 0), (model.EXIT, -1)):
        costs[at] += sum(matrices(child) for name, child in model.named_children() if name in names)
    return costs


def matrices(module: nn.Module) -> float:
    return float(sum(p.numel() for p in module.parameters() if p.ndim == 2))
