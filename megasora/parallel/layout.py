"""The layout: how the processes of a job divide the work, written as one string such as `dp4,zero2` or `hsdp2x4,zero3`."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from megasora.errors import ConfigError

TERM = re.compile(
    r"pp(?P<pp>\d+)(:(?P<schedule>1f1b|gpipe|interleaved|zbv))?|dp(?P<dp>\d+)|hsdp(?P<replicate>\d+)x(?P<shard>\d+)"
    r"|cp(?P<ulysses>\d+)(x(?P<ring>\d+))?(?P<dynamic>:dynamic)?|tp(?P<tp>\d+)(?P<nosp>:nosp)?|zero(?P<zero>[0-3])"
)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes share the work: `auto`, or terms such as dp4,zero2 or pp2,tp4. What blocks keep for their backward pass:
    everything (`recompute=none`), what was dear to compute (selective), what entered them (full, or of every K-th: everyK), or as
    much as `memory` allows (auto)."""

    layout: str = "auto"  # dpN,zero2; or factors of the processes: dp4 hsdp2x4 tp2 cp4x2 pp2, and zero0 to zero3
    recompute: str = "none"  # none, auto, selective, full, or everyK: of every K-th block
    memory: float = 0.0  # GiB of a device that recompute=auto may fill; 0: all it has, on a CPU as much as is wanted
    offload: bool = False  # what blocks keep waits in the host's memory
    plan_check: Literal["refuse", "warn", "off"] = "refuse"  # what `train` does with what cannot fit
    compile: bool = False  # blocks by torch.compile
    across_nodes: bool = False  # tp and Ulysses may be wider than a node

    def __post_init__(self) -> None:
        if not re.fullmatch(r"none|auto|selective|full|every[1-9]\d*", self.recompute):
            raise ValueError(
                f"recompute={self.recompute}: is not one of none, auto, selective, full, everyK such as every2"
            )
        if self.offload and self.recompute == "selective":
            raise ValueError(
                "offload=True: selective keeps what it keeps where it is; with offload use none, full or everyK"
            )
        if not self.memory >= 0:
            raise ValueError(f"memory={self.memory}: at least 0")
        if self.memory and self.recompute != "auto":
            raise ValueError(f"memory={self.memory}: goes with recompute=auto, not {self.recompute}")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of each kind of parallelism. The world is their product."""

    pp: int = 1
    schedule: str = "1f1b"
    dp_replicate: int = 1
    dp_shard: int = 1
    ulysses: int = 1
    ring: int = 1
    dynamic: bool = False  # a row takes as many of the cp ranks as it needs: 1, 2, 4, ...
    tp: int = 1
    sequence_parallel: bool = True
    zero: int = 0

    @property
    def cp(self) -> int:
        return self.ulysses * self.ring

    def context(self, ranks: int) -> tuple[int, int]:
        """Ulysses and ring degree of a row that so many of the cp ranks share."""
        ulysses = min(ranks, self.ulysses)
        return ulysses, ranks // ulysses

    @property
    def widths(self) -> list[int]:
        """How many of the cp ranks may share a row."""
        return (
            [n for n in range(1, self.cp + 1) if self.cp % n == 0 and n & (n - 1) == 0] if self.dynamic else [self.cp]
        )

    @property
    def dp(self) -> int:
        """Data-parallel ranks: groups that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def row_unit(self) -> int:
        """Tokens that the length of every row is a multiple of: each rank gets an equal share of it, and of its halves."""
        return math.lcm(2 * self.tp * self.cp, 128) * (self.cp if self.dynamic else 1)

    def __str__(self) -> str:
        hsdp = self.dp_replicate > 1 and self.dp_shard > 1
        terms = [
            f"pp{self.pp}:{self.schedule}" * (self.pp > 1),
            f"hsdp{self.dp_replicate}x{self.dp_shard}" if hsdp else f"dp{self.dp}",
            f"cp{self.ulysses}x{self.ring}{':dynamic' * self.dynamic}" * (self.cp > 1),
            f"tp{self.tp}{'' if self.sequence_parallel else ':nosp'}" * (self.tp > 1),
            f"zero{self.zero}" * (self.zero > 0),
        ]
        return ",".join(term for term in terms if term)


def parse_layout(text: str, world: int | None = None) -> Layout:
    """Reads a layout for `world` processes, or for as many as it asks for; `auto` is plain data parallelism, sharded (ZeRO-2)
    where there are several.

    Raises ConfigError, naming `parallel.layout` and a layout that works, when a term is unknown, the product is not the
    world, or the layout asks for what this version does not have.
    """
    fitting = f"dp{world},zero2" if world and world > 1 else "dp1"
    if text in ("auto", ""):
        text = fitting
    found: dict[str, str] = {}
    for term in text.replace(" ", "").split(","):
        match = TERM.fullmatch(term)
        if match is None:
            raise ConfigError(f"parallel.layout={text}: {term!r} is not a term of a layout; valid here: {fitting}")
        new = {name: value for name, value in match.groupdict().items() if value is not None}
        if found.keys() & new.keys():
            raise ConfigError(f"parallel.layout={text}: {term!r} says something twice; valid here: {fitting}")
        found |= new
    zero = int(found.get("zero", 0))
    replicate, shard = int(found.get("replicate", 1)), int(found.get("shard", 1))
    if "dp" in found:
        if "shard" in found:
            raise ConfigError(f"parallel.layout={text}: give dp or hsdp, not both; valid here: {fitting}")
        replicate, shard = (int(found["dp"]), 1) if zero == 0 else (1, int(found["dp"]))
    elif "zero" in found and "shard" not in found:
        replicate, shard = (2, 1) if zero == 0 else (1, 2)
    if "shard" in found and zero == 0:
        zero = 3
    layout = Layout(
        pp=int(found.get("pp", 1)), schedule=found.get("schedule", "1f1b"), dp_replicate=replicate, dp_shard=shard,
        ulysses=int(found.get("ulysses", 1)), ring=int(found.get("ring", 1)), dynamic="dynamic" in found,
        tp=int(found.get("tp", 1)),
        sequence_parallel="nosp" not in found, zero=zero,
    )  # fmt: skip
    if world is not None and layout.world != world:
        raise ConfigError(
            f"parallel.layout={text}: {layout.world} processes wanted, {world} started; valid here: {fitting}"
        )
    if layout.dynamic and (layout.ulysses & (layout.ulysses - 1) or layout.ring & (layout.ring - 1)):
        raise ConfigError(f"parallel.layout={text}: cp:dynamic wants powers of two; valid here: {fitting}")
    if layout.schedule == "zbv":
        raise ConfigError(f"parallel.layout={text}: zbv is not in this version; valid here: {fitting}")
    return layout


def check_share(global_batch: int, layout: Layout) -> None:
    """Raises ConfigError, with the nearest batch that works, where the data-parallel ranks cannot share a batch evenly."""
    if global_batch % layout.dp:
        nearest = max(1, round(global_batch / layout.dp)) * layout.dp
        raise ConfigError(
            f"data.global_batch={global_batch}: {layout.dp} data-parallel ranks must share it evenly; nearest is {nearest}"
        )
