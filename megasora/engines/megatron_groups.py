"""megatron-core's groups, made to agree with the mesh, and the object by which DeepSpeed asks for them (`mpu`)."""

from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megasora.parallel.mesh import Processes


class Mpu:
    """What DeepSpeed and megatron-core call a model-parallel unit: the group whose ranks hold parts of one model, and the group
    whose ranks see other tokens, over which ZeRO shards (data parallel x context parallel). Neither knows of the other parts
    of this project's mesh."""

    def __init__(self, tensor: ProcessGroup, data: ProcessGroup) -> None:
        self.tensor, self.data = tensor, data

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.tensor

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.tensor)

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.tensor)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)


def mpu_of(processes: Processes) -> Mpu:
    """Over megatron-core's groups where layers are split by it, else over the mesh's own. All ranks call it."""
    if processes.layout.tp == 1:
        return Mpu(processes.mesh["tp"].get_group(), processes.replicas.get_group())
    parallel_state = initialise(processes)
    return Mpu(
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def initialise(processes: Processes):  # type: ignore[no-untyped-def] # the module is megatron-core's
    """megatron-core's `parallel_state` for this layout. RuntimeError if one of its groups has other ranks than the mesh's."""
    from megatron.core import parallel_state

    layout = processes.layout
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp, context_parallel_size=layout.cp, order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )  # fmt: skip
    mesh = processes.mesh
    pairs: dict[str, tuple[Callable[[], ProcessGroup], ProcessGroup]] = {
        "tensor": (parallel_state.get_tensor_model_parallel_group, mesh["tp"].get_group()),
        "context": (parallel_state.get_context_parallel_group, mesh["cp"].get_group()),
        "pipeline": (parallel_state.get_pipeline_model_parallel_group, mesh["pp"].get_group()),
        "data x context": (
            lambda: parallel_state.get_data_parallel_group(with_context_parallel=True), processes.replicas.get_group()
        ),
    }  # fmt: skip
    for name, (theirs, ours) in pairs.items():
        found, expected = dist.get_process_group_ranks(theirs()), dist.get_process_group_ranks(ours)
        if found != expected:
            raise RuntimeError(f"megatron-core's {name} group has ranks {found}, the mesh's has {expected}")
    return parallel_state
