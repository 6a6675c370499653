"""The second engine: DeepSpeed's ZeRO under the same plain models, with megatron-core's layers where they are split.

What a rank owns of a parameter is a stretch of it, flattened, inside flat tensors that DeepSpeed makes. A checkpoint sees it as
boxes of the whole parameter (`fragments`), so it has the same names and shapes as one of `torch_native`, and a run may go from
one engine to the other. DeepSpeed is asked for reduction, clipping, the update and the gathering of weights; which rank has which
tokens, attention over them and the loss are this project's own.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megasora.checkpoint.deepspeed_files import INFO, universal_info
from megasora.checkpoint.directory import begin
from megasora.checkpoint.ranks import Ranks
from megasora.checkpoint.save import seal
from megasora.engines.deepspeed_config import DeepSpeedConfig, build_json
from megasora.engines.fragments import WHOLE, Fragment, Split, in_pieces
from megasora.engines.megatron_groups import mpu_of
from megasora.engines.optim import OptimConfig, build_optimizers
from megasora.engines.torch_native import Answering, EngineConfig, Row, stretch_here, whole_answer
from megasora.models.base import Model
from megasora.models.packing import PackedRow
from megasora.parallel.context import ContextAttention
from megasora.parallel.layout import ParallelConfig
from megasora.parallel.mesh import Processes
from megasora.parallel.plan import split_dim
from megasora.parallel.remat import offload, recompute
from megasora.parallel.tensor import Style
from megasora.parallel.zero import all_reduce_together

STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


@dataclass(frozen=True)
class Place:
    """Where DeepSpeed keeps a parameter: the number of its flat tensor, and its own number among the parameters there."""

    group: int
    number: int


class DeepSpeedZero:
    """`build` makes the model; its weights are drawn from `seed`, or left as they are (None) for a checkpoint to fill. Without
    ZeRO (zero0, in fp32) every rank owns whole parameters."""

    def __init__(
        self,
        build: Callable[[], Model[Any]],
        seed: int | None,
        processes: Processes,
        parallel: ParallelConfig,
        config: EngineConfig,
        optim: OptimConfig,
        plan: list[tuple[str, Style]],
        section: DeepSpeedConfig,
        global_batch: int,
    ) -> None:
        self.processes, self.optim, self.section = processes, optim, section
        self.stage = processes.layout.zero
        layout, device = processes.layout, processes.device
        library = import_deepspeed(device)
        told = build_json(section, optim, config, layout, device, global_batch)
        self.offloaded = section.offload != "none"
        with torch.device("meta"):
            model = build()
        whole = {name: p.shape for name, p in model.named_parameters()}
        self.dims = {name: split_dim(model.config.family, name) for name in whole}
        if layout.cp > 1:
            model.attention = ContextAttention(model.attention, processes.contexts)
        self.mpu = mpu_of(processes)
        self.splits: dict[str, Split] = {}
        self.partial: set[str] = set()  # of these gradients each rank of the tensor group has a part
        if layout.tp > 1:
            from megasora.engines.megatron_layers import apply_plan, check_marks, mark_splits

            applied = apply_plan(model, plan, processes)
            self.splits, self.partial = applied.splits, applied.partial
        recompute(model.blocks.children(), parallel.recompute)
        if parallel.offload:
            offload(model.blocks.children())
        model.to_empty(device="cpu" if self.stage == 3 else device)  # zero3 takes a parameter at a time from the host
        if layout.tp > 1:
            mark_splits(model, self.splits)
            check_marks(model, whole)
        if seed is not None:
            self._init_weights(model, build, seed)
        self.parameters = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        (self.optimizer,) = build_optimizers(self.parameters, optim)
        if self.stage == 3:
            library.zero.Init(
                module=model, data_parallel_group=self.mpu.get_data_parallel_group(), config_dict_or_path=told,
                mpu=self.mpu, dtype=torch.float32,
            )  # fmt: skip
        self.engine, self.zero, _, _ = library.initialize(
            model=model, optimizer=self.optimizer, config=told, mpu=self.mpu, dist_init_required=False
        )
        self.model = model
        self.materialise_optimizer()

    def _init_weights(self, model: Model[Any], build: Callable[[], Model[Any]], seed: int) -> None:
        """The same weights as on every layout of the other engine: drawn whole on the CPU, then cut."""
        torch.manual_seed(seed)
        source = build()
        source.init_weights()
        weights = dict(source.named_parameters())
        with torch.no_grad():
            for name, target in model.named_parameters():
                target.copy_(self.splits.get(name, WHOLE).of(weights[name]))

    @cached_property
    def places(self) -> dict[str, Place]:
        if self.stage == 0:
            return {name: Place(number, 0) for number, name in enumerate(self.parameters)}
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        groups = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
        return {names[id(p)]: Place(i, number) for i, group in enumerate(groups) for number, p in enumerate(group)}

    @cached_property
    def flats(self) -> list[Tensor]:
        """What the optimizer updates, in fp32."""
        if self.stage == 0:
            return list(self.parameters.values())
        found: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        return found

    @cached_property
    def fragments(self) -> dict[str, Fragment | None]:
        """By parameter: what of it is here."""
        if self.stage == 0:
            return {name: Fragment(p, 0, 0, p.numel()) for name, p in self.parameters.items()}
        found: dict[str, Fragment | None] = {}
        offset = dict.fromkeys(range(len(self.flats)), 0)
        rank = self.mpu.get_data_parallel_rank()
        for name, place in self.places.items():
            parameter: Any = self.parameters[name]
            flat = self.flats[place.group]
            if self.stage == 3:  # a share of each parameter
                size = parameter.partition_numel()
                count = min(size, parameter.ds_numel - rank * size)
                found[name] = Fragment(flat, offset[place.group], rank * size, count) if count > 0 else None
                offset[place.group] += size
            else:  # a share of all of a group's parameters, one after the other
                link = parameter._hp_mapping
                found[name] = None
                if link is not None:
                    start = link.lp_fragment_address.start
                    found[name] = Fragment(flat, link.hp_fragment_address.start, start, link.lp_fragment_address.numel)
        return {name: found[name] for name in self.parameters}

    def forward_backward(self, rows: Sequence[Row], loss: Callable[[Answering, Row], Tensor]) -> Tensor:
        total = torch.zeros((), device=self.processes.device)
        for i, row in enumerate(rows):
            self.engine.set_gradient_accumulation_boundary(i == len(rows) - 1)
            with record_function("forward"):
                value = loss(self.engine, stretch_here(self.processes, row))
            total += value.detach() * self.processes.share
            # DeepSpeed's reduction is a mean.
            with record_function("backward"):
                self.engine.backward(value * self.mpu.get_data_parallel_world_size(), scale_wrt_gas=False)
        self._reduce_over_tensor_group()
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def _reduce_over_tensor_group(self) -> None:
        """Of the gradients that ZeRO has already reduced and shared out: the ranks of a tensor group own the same stretches."""
        found = [(name, gradient) for name in sorted(self.partial) if (gradient := self._gradient(name)) is not None]
        all_reduce_together([gradient for _, gradient in found], self.mpu.get_model_parallel_group())
        if self.offloaded:  # norms were taken when gradients went to the host
            for name, gradient in found:
                self.zero.norm_for_param_grads[self.zero.get_param_id(self.parameters[name])] = gradient.norm()

    def _gradient(self, name: str) -> Tensor | None:
        """This rank's stretch of the reduced gradient: a view. None: nothing of it is here, or nothing depends on it."""
        fragment, parameter = self.fragments[name], self.parameters[name]
        if fragment is None:
            return None
        if self.stage == 0:
            return None if parameter.grad is None else parameter.grad.view(-1)
        if self.offloaded:
            assert fragment.flat.grad is not None
            return fragment.of(fragment.flat.grad)
        if self.stage == 3:
            place = self.places[name]
            found: Tensor = self.zero.averaged_gradients[place.group][place.number]
            return found.view(-1)[: fragment.count]
        link: Any = parameter
        return link._hp_mapping.get_lp_grad_fragment(link._index_in_param_group).view(-1)

    def gradients(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.parameters:
            fragment, gradient = self.fragments[name], self._gradient(name)
            if fragment is not None and gradient is None:
                gradient = torch.zeros(fragment.count, device=self.processes.device)
            found[name] = self._pieces(name, gradient)
        return found

    def _pieces(self, name: str, numbers: Tensor | None) -> Tensor:
        fragment = self.fragments[name]
        start = 0 if fragment is None else fragment.start
        return in_pieces(self.shapes[name], self.splits.get(name, WHOLE), start, numbers)

    @torch.no_grad()
    def clip(self) -> Tensor:
        """DeepSpeed's own norm; it scales by it when it steps."""
        from deepspeed.runtime.utils import clip_grad_norm_, combine_grad_norm_groups

        if self.stage == 0:
            norm = clip_grad_norm_(self.parameters.values(), self.optim.clip or math.inf, mpu=self.mpu)
        elif self.stage == 3:
            norm = combine_grad_norm_groups(self.zero._get_norm_groups())
        else:
            norm = self.zero.scaled_global_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.processes.device)

    def update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with record_function("optimizer"):
            self.engine.step()
        if self.optim.ema:
            with torch.no_grad(), record_function("ema"):
                for flat in self.flats:
                    self.optimizer.state[flat]["ema"].lerp_(flat, 1 - self.optim.ema)

    @torch.no_grad()
    def sizes(self) -> dict[str, float]:
        """The norm of the weights only."""
        squares = torch.zeros((), dtype=torch.float32, device=self.processes.device)
        for name, fragment in self.fragments.items():
            # What all ranks of a tensor group have whole counts once.
            apart = name in self.splits or self.processes.place["tp"] == 0
            if fragment is not None and apart and (self.stage or self.mpu.get_data_parallel_rank() == 0):
                squares += fragment.of(fragment.flat).float().norm().square().to(squares.device)
        dist.all_reduce(squares)
        return {"weight_norm": math.sqrt(squares.item())}

    def discard(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.stage == 0:
            return
        self.zero.zero_grad()
        if self.stage < 3:
            self.zero.micro_step_id = -1  # the next gradients are the first again
            for kept in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
                kept.update(dict.fromkeys(kept))
        if self.offloaded:
            self.zero.reset_cpu_buffers()

    def materialise_optimizer(self) -> None:
        """The average is one more state: so it is laid out, and may be offloaded, as the others."""
        for flat in self.flats:
            state = self.optimizer.state[flat]
            if not state:
                if self.optim.name == "adamw":
                    state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state |= {key: torch.zeros_like(flat) for key in STATES[self.optim.name]}
                if self.optim.ema:
                    state["ema"] = flat.detach().clone()

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, fragment in self.fragments.items():
            state = {} if fragment is None else self.optimizer.state[fragment.flat]

            def here(values: Tensor | None, name: str = name, fragment: Fragment | None = fragment) -> Tensor:
                return self._pieces(name, None if fragment is None or values is None else fragment.of(values))

            found[f"model/{name}"] = here(None if fragment is None else fragment.flat)
            if self.optim.ema:
                found[f"ema/{name}"] = here(state.get("ema"))
            for key in STATES[self.optim.name]:
                found[f"optim/{name}/{key}"] = here(state.get(key))
            if "step" in state:
                found[f"optim/{name}/step"] = state["step"]
        return found

    @torch.no_grad()
    def loaded(self) -> None:
        """The weights that models compute with follow those that the optimizer has."""
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()
            for number in range(len(self.flats)):
                self.zero._reassign_or_swap_out_partitioned_parameters(number)
            self.zero.checkpoint_event_epilogue()
        elif self.stage:
            self.zero.update_lp_params()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        if not self.optim.ema:
            yield
            return
        live = [flat.detach() for flat in self.flats]
        kept = [flat.clone() for flat in live]
        torch._foreach_copy_(live, [self.optimizer.state[flat]["ema"] for flat in self.flats])
        self.loaded()
        try:
            yield
        finally:
            torch._foreach_copy_(live, kept)
            self.loaded()

    def save_own(self, root: Path, step: int, facts: dict[str, Any], check: Callable[[], None]) -> Path | None:
        """DeepSpeed's checkpoint of ZeRO, sealed like one of ours. A rank that cannot write leaves the others to a time-out."""
        if not self.section.checkpoints:
            return None
        ranks, what = Ranks(), f"saving step {step} in {root}"
        temporary = ranks.first(what, lambda: begin(root, step, check))
        given = {"facts": facts, INFO: universal_info(self.dims)}
        ranks.every(
            what, lambda: self.engine.save_checkpoint(str(root), temporary.name, client_state=given, save_latest=False)
        )
        return ranks.first(what, lambda: seal(temporary, step, facts, check))

    @torch.no_grad()
    def predict(self, row: PackedRow, *options: Any) -> Tensor:
        return whole_answer(self.processes, self.engine, row, *options)


def import_deepspeed(device: torch.device) -> ModuleType:
    """The library, told what the device is and to keep its log off stdout."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.utils import logger

    for handler in logger.handlers:
        handler.setStream(sys.stderr)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled now
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    library: ModuleType = deepspeed
    return library
