"""DeepSpeed's own forms of a checkpoint, as files: of ZeRO, a rank a file, and the universal one, a directory a parameter.

    zero_pp_rank_1_mp_rank_00_optim_states.pt   what the second of the data-parallel ranks owns, of the first tensor-parallel part
    mp_rank_00_model_states.pt                  of that part: shapes, and what the caller gave along (zero3: one a rank)

    zero/NAME/fp32.pt, exp_avg.pt, ...          universal: a whole parameter and its states
    zero/optimizer_state.pt                     hyperparameters
    mp_rank_00_model_states.pt

Under our names these are model/NAME, optim/NAME/exp_avg and so on. The average is one more state, `ema`, of which DeepSpeed's
tools know nothing; its loader takes it as it is.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.checkpoint.metadata import SavedTensor
from megasora.errors import CheckpointError

Opened = tuple[dict[str, SavedTensor], Callable[[str], Tensor]]
FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
ROWS, WHOLE = "parameter_with_row_parallelism_patterns", "tp_replicated_parameter_patterns"
INFO = "universal_checkpoint_info"
VERSION = "0.19.8"  # of the library whose loader this was tried with


def is_universal(path: Path) -> bool:
    return (path / "zero").is_dir()


def is_zero(path: Path) -> bool:
    return any(FILE.fullmatch(file.name) for file in path.glob("*_optim_states.pt"))


def name_of(parameter: str, state: str) -> str:
    """Our name of what DeepSpeed calls a state of a parameter."""
    return {"fp32": f"model/{parameter}", "ema": f"ema/{parameter}"}.get(state, f"optim/{parameter}/{state}")


def state_of(name: str) -> tuple[str, str]:
    """The inverse: (parameter, state)."""
    part, _, rest = name.partition("/")
    if part == "optim":
        parameter, _, state = rest.rpartition("/")
        return parameter, state
    return rest, {"model": "fp32", "ema": "ema"}[part]


def universal_info(dims: Mapping[str, int | None]) -> dict[str, Any]:
    """What DeepSpeed's converter must know to put the parts of a tensor group together; `dims` as the plan splits parameters. A
    parameter matches one pattern at most, which it insists on."""
    rows = [f"^{re.escape(name)}$" for name, dim in dims.items() if dim == 1]
    return {
        "universal_checkpoint_version": 0.2,
        ROWS: rows,
        WHOLE: [f"^{re.escape(name)}$" for name, dim in dims.items() if dim is None],
    }


def facts_in(path: Path) -> dict[str, Any]:
    """What this project has given along. CheckpointError where somebody else made the checkpoint."""
    facts = model_states(path)[0].get("facts")
    if not isinstance(facts, dict):
        raise CheckpointError(
            f"{path}: has no facts of a run of this project: only its weights are of use, as run.init_from"
        )
    return facts


def model_states(path: Path) -> list[dict[str, Any]]:
    """Of each tensor-parallel part, its file without ZeRO-3's copies for other ranks."""
    files = sorted(path.glob("mp_rank_*_model_states.pt")) or sorted(
        path.glob("zero_pp_rank_0_mp_rank_*_model_states.pt")
    )
    if not files:
        raise CheckpointError(f"{path}: no *_model_states.pt: not a checkpoint of DeepSpeed's")
    return [read(file) for file in files]


def read(file: Path) -> Any:
    """One of DeepSpeed's files, its tensors mapped and not read. CheckpointError for one that would run code."""
    try:
        with trusted():
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(f"{file}: refused: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def trusted() -> Iterator[None]:
    """The types of DeepSpeed's that describe a checkpoint, where the library is installed."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:
        yield
        return
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        yield


def open_universal(path: Path) -> Opened:
    shapes = whole_shapes(path)
    files = {
        name_of(folder.name, file.stem): file
        for folder in sorted((path / "zero").iterdir())
        if folder.is_dir()
        for file in sorted(folder.glob("*.pt"))
    }
    common = read(path / "zero" / "optimizer_state.pt")

    def find(name: str) -> Tensor:
        if name not in files:  # zero3 has one step for all
            return torch.as_tensor(common["optimizer_state_dict"]["state"][0]["step"], dtype=torch.float32)
        found = read(files[name])
        tensor = torch.as_tensor(found["param"] if isinstance(found, dict) else found)
        if name.endswith("/step"):
            return tensor.float()
        return tensor.view(shapes.get(state_of(name)[0], tensor.shape))  # of zero3 it is flat

    names = set(files)
    if not any(name.endswith("/step") for name in names):
        names |= {f"optim/{state_of(name)[0]}/step" for name in files}
    return {name: described(find(name)) for name in sorted(names)}, find


def whole_shapes(path: Path) -> dict[str, torch.Size]:
    """By parameter, where no tensor parallelism has divided it."""
    states = model_states(path)
    if len(states) > 1 or not states[0].get("param_shapes"):
        return {}
    return {name: shape for group in states[0]["param_shapes"] for name, shape in group.items()}


def described(tensor: Tensor) -> SavedTensor:
    return SavedTensor(tuple(tensor.shape), tensor.dtype)


def open_zero(path: Path) -> Opened:
    """Each parameter from the stretches that the ranks own."""
    files = {(int(m[2]), int(m[1])): f for f in path.glob("*_optim_states.pt") if (m := FILE.fullmatch(f.name))}
    parts, ranks = 1 + max(part for part, _ in files), 1 + max(rank for _, rank in files)
    missing = [(part, rank) for part in range(parts) for rank in range(ranks) if (part, rank) not in files]
    states = model_states(path)
    if missing or len(states) != parts:
        raise CheckpointError(f"{path}: files of (tensor part, rank) {missing[:3] or 'model states'} are missing")
    info = states[0].get(INFO) or {}
    shapes = [{n: s for group in state["param_shapes"] for n, s in group.items()} for state in states]
    groups = [list(map(list, state["param_shapes"])) for state in states]

    @cache
    def stretches(part: int, rank: int) -> dict[str, dict[str, Tensor]]:
        """parameter -> state -> its numbers there."""
        found = read(files[part, rank])["optimizer_state_dict"]
        if "fp32_flat_groups" in found:  # zero3: a share of each parameter
            flats, optimizer = found["fp32_flat_groups"], found["optimizer_state_dict"]["state"]
            places = [list(shares(group, shapes[part], rank, ranks)) for group in groups[part]]
        else:
            flats, optimizer = found["single_partition_of_fp32_groups"], found["base_optimizer_state"]["state"]
            mappings = found["param_slice_mappings"]
            places = [[(name, at.start, at.numel) for name, at in group.items()] for group in mappings]
        mine: dict[str, dict[str, Tensor]] = {}
        for number, (flat, group) in enumerate(zip(flats, places, strict=True)):
            for name, start, count in group:
                kept = {"fp32": flat, **optimizer.get(number, {})}
                mine[name] = {
                    state: value[start : start + count] if value.ndim else value.float()
                    for state, value in kept.items()
                }
        return mine

    def find(name: str) -> Tensor:
        parameter, state = state_of(name)
        mine = []
        for part in range(parts):
            pieces = [there[parameter][state] for rank in range(ranks) if parameter in (there := stretches(part, rank))]
            if not pieces[0].ndim:
                return pieces[0]
            mine.append(torch.cat(pieces).view(shapes[part][parameter]))
        return (
            mine[0]
            if parts == 1 or matches(info, WHOLE, parameter)
            else torch.cat(mine, 1 if matches(info, ROWS, parameter) else 0)
        )

    found: dict[str, SavedTensor] = {}
    for rank in range(ranks):
        for parameter, kept in stretches(0, rank).items():
            for state, value in kept.items():
                shape = list(shapes[0][parameter]) if value.ndim else []
                if shape and parts > 1 and not matches(info, WHOLE, parameter):
                    shape[1 if matches(info, ROWS, parameter) else 0] *= parts
                found[name_of(parameter, state)] = SavedTensor(tuple(shape), value.dtype)
    return dict(sorted(found.items())), find


def matches(info: dict[str, Any], kind: str, parameter: str) -> bool:
    return any(re.match(pattern, parameter) for pattern in info.get(kind, []))


def shares(
    group: Iterable[str], shapes: Mapping[str, torch.Size], rank: int, ranks: int
) -> Iterator[tuple[str, int, int]]:
    """Of the parameters of a group of zero3: where a rank's share begins in its flat tensor, and how long it is."""
    offset = 0
    for name in group:
        numbers = shapes[name].numel()
        size = -(-numbers // ranks)
        count = max(0, min(size, numbers - rank * size))
        yield name, offset, count
        offset += size


def write_universal(
    target: Path,
    tensors: Iterable[str],
    read: Callable[[str], Tensor],
    facts: dict[str, Any],
    dims: Mapping[str, int | None],
) -> None:
    """Writes the universal form into the directory `target`. Memory: one tensor."""

    def save(name: str, value: Any) -> None:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, file)

    step = torch.zeros(())
    for name in tensors:
        parameter, state = state_of(name)
        value = read(name)
        if state == "step":
            step = value
            save(f"zero/{parameter}/step.pt", value)
        else:
            save(f"zero/{parameter}/{state}.pt", {"param": value.clone(), "cat_dim": dims.get(parameter) or 0})
    optim = facts["config"]["optim"]
    common = {"lr": optim["lr"], "betas": tuple(optim["betas"]), "eps": optim["eps"]}
    hyper = [{**common, "weight_decay": decay, "params": [i]} for i, decay in enumerate((optim["weight_decay"], 0.0))]
    inner = {"state": {i: {"step": step} for i in range(len(hyper))}, "param_groups": hyper}
    save("zero/optimizer_state.pt", {
        "ds_version": VERSION, "clip_grad": optim["clip"], "param_groups": hyper, "optimizer_state_dict": inner,
    })  # fmt: skip
    given = {
        "module": {}, "param_shapes": None, "dp_world_size": 1, "mp_world_size": 1, "global_steps": facts["step"],
        "global_samples": 0, "skipped_steps": 0, "ds_config": {}, "ds_version": VERSION, "facts": facts,
        INFO: universal_info(dims),
    }  # fmt: skip
    # ZeRO 3 asks for the second.
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        save(name, given)
