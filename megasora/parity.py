"""Does a layout compute the same? The config's own model at seeded inputs: loss, every parameter's gradient, their norm, and the
parameters after three steps of SGD, on one process and on the layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from megasora.build import build_engine, build_recipe, check_engine
from megasora.encoders import LatentFacts
from megasora.engines.fragments import Pieces, together
from megasora.errors import ConfigError
from megasora.microbatch import MicroBatch, training_loss
from megasora.models.base import Model
from megasora.models.families import build_model
from megasora.models.packing import Item, Shape, pack
from megasora.models.text import Text
from megasora.parallel.mesh import Processes
from megasora.parallel.plan import check_layout
from megasora.schema import Config
from megasora.seeding import generator

# (T, H, W) in patches of the samples of a row: still pictures and clips, no two rows alike, odd numbers of tokens.
ROWS: list[list[Shape]] = [
    [(1, 4, 4), (3, 2, 6)], [(2, 4, 2), (1, 6, 6)], [(2, 3, 5), (1, 3, 3)], [(5, 3, 3)],
]  # fmt: skip
COUNT = 8  # rows in all, to be divided among data-parallel ranks
LENGTH = 64  # tokens of a row, padding among them
SGD = 0.1


@dataclass(frozen=True)
class Outcome:
    """What a layout computed, whole, on every rank."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]  # after three steps


def save(outcome: Outcome, file: Path) -> None:
    """For the process that compares."""
    tensors = {f"gradient/{name}": tensor for name, tensor in outcome.gradients.items()}
    tensors |= {f"parameter/{name}": tensor for name, tensor in outcome.parameters.items()}
    save_file(tensors, file, {"loss": repr(outcome.loss), "norm": repr(outcome.norm)})


def load(file: Path) -> Outcome:
    with safe_open(file, "pt") as found:
        facts = found.metadata()
        gradients, parameters = (
            {name.removeprefix(kind): found.get_tensor(name) for name in found.keys() if name.startswith(kind)}  # noqa: SIM118
            for kind in ("gradient/", "parameter/")
        )
    return Outcome(float(facts["loss"]), float(facts["norm"]), gradients, parameters)


def run(config: Config, group: Processes) -> Outcome:
    """Three steps on this layout. All ranks call it."""
    check_layout(config.model, group.layout)
    check_engine(config, group.layout)
    if COUNT % group.layout.dp:
        raise ConfigError(f"parallel.layout={group.layout}: parity divides {COUNT} rows among data-parallel ranks")
    config = replace(config, optim=replace(config.optim, name="sgd", ema=0.0, weight_decay=0.0))
    engine = build_engine(config, group, build=noisy(partial(build_model, config.model)))
    mine = list(range(COUNT))[group.data_rank :: group.layout.dp]
    rows = [replace(parity_row(config, group, n), width=width) for n, width in rows_of(group, mine)]
    loss_of = training_loss(build_parity_recipe(config, group))
    losses, norms, gradients = [], [], dict[str, Tensor]()
    for _ in range(3):
        losses.append(engine.forward_backward(rows, loss_of).item())
        if not gradients:
            gradients = of_all_stages(group, {name: whole(tensor) for name, tensor in engine.gradients().items()})
        norms.append(engine.clip().item())
        engine.update(SGD)
    found = {name.removeprefix("model/"): t for name, t in engine.tensors().items() if name.startswith("model/")}
    parameters = of_all_stages(group, {name: whole(tensor) for name, tensor in found.items()})
    return Outcome(losses[0], norms[0], gradients, parameters)


def rows_of(group: Processes, mine: list[int]) -> list[tuple[int, int]]:
    """This rank's rows among those of its data-parallel group, and how many ranks share each: where the layout lets rows differ,
    a pool goes through all widths, from narrow to wide."""
    layout, place = group.layout, group.place["cp"]
    found, first = [], 0
    for width in layout.widths:
        side_by_side = layout.cp // width
        while len(mine) - first >= side_by_side:
            found.append((mine[first + place // width], width))
            first += side_by_side
            if width < layout.cp:
                break  # one micro-batch of each but the widest
    return found


def build_parity_recipe(config: Config, group: Processes) -> Any:
    facts = LatentFacts({}, Text(torch.zeros(1, config.model.text_width), torch.zeros(config.model.pooled_width)))
    return build_recipe(config, group, facts, config.stages[0], 0)


def parity_row(config: Config, group: Processes, number: int) -> MicroBatch:
    """One of the rows, the same on every layout; the first frame of a clip is given, so that a sample has two timesteps."""
    model, random = config.model, generator("parity", config.run.seed, number)
    items, data, noise, weights = [], [], [], []
    for T, H, W in next(islice(cycle(ROWS), number, None)):
        tokens = T * H * W
        clean, blur = (torch.randn(tokens, model.patch_values, generator=random) for _ in range(2))
        t = torch.rand((), generator=random).clamp(0.05, 0.95).item()
        timesteps = torch.full((T,), t)
        if T > 1:
            timesteps[0] = 0.0
        text = torch.randn(int(torch.randint(2, 7, (), generator=random)), model.text_width, generator=random)
        pooled = torch.randn(model.pooled_width, generator=random)
        label = int(torch.randint(max(model.classes, 1), (), generator=random)) if model.classes else -1
        items.append(Item((1 - t) * clean + t * blur, (T, H, W), timesteps, text, pooled, 16.0, label))
        data.append(clean)
        noise.append(blur)
        learned = (timesteps > 0).repeat_interleave(H * W)
        weights.append(learned / (learned.sum() * COUNT * len(ROWS[0])))
    row = pack([to_device(item, group.device) for item in items], LENGTH)
    padding = LENGTH - sum(map(len, data))
    x, y = (F.pad(torch.cat(parts), (0, 0, 0, padding)).to(group.device) for parts in (data, noise))
    return MicroBatch(row, x, y, F.pad(torch.cat(weights), (0, padding)).to(group.device))


def to_device(item: Item, device: torch.device) -> Item:
    return replace(
        item, patches=item.patches.to(device), text=item.text.to(device), pooled=item.pooled.to(device)
    )  # fmt: skip


def noisy(build: Callable[[], Model[Any]]) -> Callable[[], Model[Any]]:
    """A model whose parameters are noise where they would begin at zero: else most gradients vanish and nothing is compared."""

    def build_noisy() -> Model[Any]:
        model = build()
        plain: Any = model.init_weights

        def init_weights() -> None:
            plain()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)

        model.init_weights = init_weights  # type: ignore[method-assign]
        return model

    return build_noisy


def of_all_stages(group: Processes, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each stage of a pipeline has, on all of them."""
    found: list[dict[str, Tensor]] = [mine] * group.layout.pp
    if group.layout.pp > 1:
        dist.all_gather_object(found, mine, group=group.mesh["pp"].get_group())
    return {name: tensor for stage in found for name, tensor in stage.items()}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on the CPU."""
    if isinstance(tensor, Pieces):
        return together(tensor)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


@dataclass(frozen=True)
class Difference:
    """The worst relative error, and where; and the parameters that have no gradient on either side. Such is the bias of a key
    without norm, which moves all scores of a query alike: what is left of it is rounding."""

    worst: float
    where: str
    without: list[str]


def compare(reference: Outcome, other: Outcome) -> Difference:
    """Error of a gradient: |g - ref| / max(|ref|, 1e-3 · |ref over all parameters| / sqrt(their number)). Of the loss and the
    norm: relative. Of the parameters after three steps of SGD: as of gradients."""
    errors = {
        "loss": abs(other.loss - reference.loss) / abs(reference.loss),
        "norm": abs(other.norm - reference.norm) / abs(reference.norm),
    }
    without: list[str] = []
    for kind, ours, theirs in (
        ("gradient of", other.gradients, reference.gradients),
        ("parameter", other.parameters, reference.parameters),
    ):
        mean = math.hypot(*(tensor.norm().item() for tensor in theirs.values())) / math.sqrt(len(theirs))
        for name, expected in theirs.items():
            sizes = ours[name].norm().item(), expected.norm().item()
            if max(sizes) < 1e-6 * mean:
                without.append(name)
                continue
            errors[f"{kind} {name}"] = (ours[name] - expected).norm().item() / max(sizes[1], 1e-3 * mean)
    where = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    return Difference(errors[where], where, without)
