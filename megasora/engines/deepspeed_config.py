"""What DeepSpeed is told: what follows from this project's config, merged with a plain DeepSpeed JSON of the user's; and what
this engine refuses. Knows nothing of the library but the names of its keys."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from megasora.engines.optim import OptimConfig
from megasora.engines.torch_native import EngineConfig
from megasora.errors import ConfigError
from megasora.parallel.layout import Layout, ParallelConfig
from megasora.parallel.plan import refusal
from megasora.parallel.zero import BUCKET

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """Read by engine=deepspeed alone. `json` is a file of DeepSpeed's configuration; what it says of something that this config
    says too must agree. `offload` keeps the optimizer's state, or the parameters too (zero3), in the host's memory."""

    json: str = ""
    offload: Literal["none", "optimizer", "all"] = "none"
    checkpoints: bool = False  # DeepSpeed's own too, under run.dir/deepspeed


# Keys that this config decides: what decides them. The reader of an error wants to know where to look.
DECIDED = {
    "train_batch_size": "data.global_batch",
    "gradient_clipping": "optim.clip",
    "zero_optimization.stage": "parallel.layout",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload",
    "zero_optimization.offload_param.device": "deepspeed.offload",
    "zero_optimization.memory_efficient_linear": "engine (it would replace torch's linear in the whole process)",
    "bf16.enabled": "precision.precision (bf16 is torch_autocast here, over fp32 weights)",
    "fp16.enabled": "precision.precision",
    "torch_autocast.enabled": "precision.precision",
    "torch_autocast.dtype": "precision.precision",
    "communication_data_type": "precision (gradients are reduced in fp32)",
    "data_types.grad_accum_dtype": "precision (gradients are summed in fp32)",
    "optimizer.type": "optim.name",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
    "gradient_accumulation_steps": "data.capacity (a rank takes as many rows as its share of the batch fills)",
    "train_micro_batch_size_per_gpu": "data.capacity (a row packs as many samples as it holds)",
}  # fmt: skip
# Others that are passed on as they are; the rest DeepSpeed would ignore here, or it is done by another part of this project.
PASSED = (
    "zero_optimization", "torch_autocast", "comms_logger", "flops_profiler", "aio", "wall_clock_breakdown", "memory_breakdown",
    "dump_state", "steps_per_print", "tensorboard", "wandb", "csv_monitor",
)  # fmt: skip
ELSEWHERE = {
    "scheduler": "optim.schedule", "activation_checkpointing": "parallel.recompute", "pipeline": "engine=torch_native",
    "tensor_parallel": "parallel.layout", "sequence_parallel_size": "parallel.layout", "checkpoint": "the section checkpoint",
    "data_efficiency": "the section data", "curriculum_learning": "stages",
}  # fmt: skip
GPU_ONLY = ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")


def check_engine(
    section: DeepSpeedConfig,
    optim: OptimConfig,
    precision: EngineConfig,
    parallel: ParallelConfig,
    layout: Layout,
    device: torch.device,
    global_batch: int,
) -> None:
    """Raises ConfigError, with the nearest that works, for what this engine does not do."""
    for module in ("deepspeed", *(("megatron.core",) if layout.tp > 1 else ())):
        if find_spec(module.split(".")[0]) is None:
            raise ConfigError(
                f"engine=deepspeed: {module} is not installed: pip install -c constraints.txt 'megasora[deepspeed]', "
                f"or use engine=torch_native"
            )
    if layout.pp > 1:
        raise refusal(layout, "pipelines belong to engine=torch_native; engine=deepspeed has none", pp=1)
    if layout.zero and layout.dp_replicate > 1:
        why = "engine=deepspeed has no hsdp (its own is zero_hpz_partition_size)"
        raise refusal(layout, why, dp_replicate=1, dp_shard=layout.dp)
    if precision.precision == "bf16" and layout.zero == 0:
        why = "engine=deepspeed without ZeRO is wrong in bf16 (a step too many when it starts)"
        raise refusal(layout, why, zero=1, dp_replicate=1, dp_shard=layout.dp)
    if layout.tp > 1 and layout.sequence_parallel and not sequence_parallel_works():
        why = "megatron-core's sequence parallelism needs a GPU"
        raise refusal(layout, why, sequence_parallel=False)
    if parallel.recompute == "selective" and layout.zero == 3:
        raise ConfigError(
            "parallel.recompute=selective: with zero3 engine=deepspeed gathers weights inside what is repeated, which torch "
            "takes for another computation; use full"
        )
    if optim.fused != "torch":
        raise ConfigError(
            f"optim.fused={optim.fused}: engine=deepspeed steps flat stretches by torch's kernels; use torch"
        )
    if parallel.compile:
        raise ConfigError("parallel.compile=true: belongs to engine=torch_native; use false")
    if optim.name == "muon":
        raise ConfigError("optim.name=muon: engine=deepspeed owns flat stretches of matrices; use adamw")
    if precision.fp8 != "none":
        raise ConfigError(f"precision.fp8={precision.fp8}: engine=deepspeed has none in this version; use none")
    if section.offload != "none" and layout.zero == 0:
        raise refusal(
            layout, f"deepspeed.offload={section.offload} wants ZeRO", zero=1, dp_replicate=1, dp_shard=layout.dp
        )
    if section.offload == "all" and layout.zero < 3:
        raise refusal(layout, "deepspeed.offload=all wants zero3", zero=3)
    if section.checkpoints and layout.zero == 0:
        why = "deepspeed.checkpoints are ZeRO's"
        raise refusal(layout, why, zero=1, dp_replicate=1, dp_shard=layout.dp)
    build_json(section, optim, precision, layout, device, global_batch)


def sequence_parallel_works() -> bool:
    """megatron-core asks CUDA for the device of its buffers."""
    try:
        torch.cuda.current_device()
    except (AssertionError, RuntimeError):
        return False
    return True


def build_json(
    section: DeepSpeedConfig,
    optim: OptimConfig,
    precision: EngineConfig,
    layout: Layout,
    device: torch.device,
    global_batch: int,
) -> Json:
    """The dictionary for `deepspeed.initialize`. ConfigError for a JSON that contradicts this config."""
    bf16 = precision.precision == "bf16"
    decided: Json = {
        "gradient_clipping": optim.clip,  # DeepSpeed's default is 1.0, not none
        "zero_optimization": {"stage": layout.zero, "memory_efficient_linear": False},
        "bf16": {"enabled": False}, "fp16": {"enabled": False},
        # Masters, gradients and what a model computes in fp32 stay so; with an empty list, sums too.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"} if bf16 else {"enabled": False},
        "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1,
    }  # fmt: skip
    if section.offload != "none":
        decided["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if section.offload == "all":
        decided["zero_optimization"]["offload_param"] = {"device": "cpu"}
    compared = decided | {
        "train_batch_size": global_batch,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": optim.weight_decay,
            },
        }
    }  # fmt: skip
    theirs = read_json(section.json) if section.json else {}
    passed = check_json(section.json, theirs, compared, device)
    pinned = {"pin_memory": device.type != "cpu"}
    offloads = {key: pinned for key in ("offload_optimizer", "offload_param") if key in decided["zero_optimization"]}
    defaults: Json = {
        "zero_optimization": {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **offloads},
        "steps_per_print": None,
    }
    if bf16:
        defaults["torch_autocast"] = {"lower_precision_safe_modules": []}
    own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return over(over(over(defaults, passed), decided), own)


def read_json(file: str) -> Json:
    try:
        found = json.loads(Path(file).read_text())
    except OSError as error:
        raise ConfigError(f"deepspeed.json={file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"deepspeed.json={file}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"deepspeed.json={file}: a JSON object is expected")
    return found


def check_json(file: str, theirs: Json, ours: Json, device: torch.device) -> Json:
    """What of the user's JSON is passed on. ConfigError where it contradicts ours or would do nothing."""
    known = sorted({*PASSED, *(key.split(".")[0] for key in DECIDED)})
    passed: Json = {}
    for key, value in leaves(theirs):
        top, said = key[0], ".".join(key)
        where = f"deepspeed.json={file}: {said}={json.dumps(value)}"
        if value == "auto":
            continue
        if said in DECIDED:
            expected = at(ours, key)
            offloaded_nowhere = expected is None and said.endswith(".device") and value == "none"
            if value != expected and not offloaded_nowhere and not same_optimizer(said, value):
                raise ConfigError(
                    f"{where}: {DECIDED[said]} says {json.dumps(expected)}; make them agree, or leave it out"
                )
        elif top in ELSEWHERE:
            raise ConfigError(f"{where}: that is {ELSEWHERE[top]} here; leave it out")
        elif top in PASSED:
            if key[-1] in GPU_ONLY and device.type == "cpu":
                raise ConfigError(f"{where}: ZeRO++ needs GPUs; leave it out")
            put(passed, key, value)
        elif top in ("bf16", "fp16", "optimizer", "data_types"):
            raise ConfigError(f"{where}: is not used by this engine; leave it out")
        else:
            raise ConfigError(f"{where}: is no key that this engine passes on; those are {', '.join(known)}")
    return passed


def same_optimizer(key: str, value: Any) -> bool:
    """DeepSpeed's Adam decays as AdamW unless told otherwise."""
    return key == "optimizer.type" and str(value).lower() in ("adam", "adamw")


def leaves(tree: Json, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*above, key))
        else:
            yield (*above, key), value


def at(tree: Json, key: tuple[str, ...]) -> Any:
    for name in key:
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return tree


def put(tree: Json, key: tuple[str, ...], value: Any) -> None:
    for name in key[:-1]:
        tree = tree.setdefault(name, {})
    tree[key[-1]] = value


def over(below: Json, above: Json) -> Json:
    """Both, `above` counting where they meet."""
    merged = dict(below)
    for key, value in above.items():
        inner = below.get(key)
        merged[key] = over(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged
