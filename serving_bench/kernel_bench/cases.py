"""What is run: sets of cases, read from `configs/kernels/*.yaml` (keys: see gpt4.yaml)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.serving_bench.config import NonNegativeInt, Strict, nearest
from vllm_sparsek.serving_bench.errors import BenchError

Kind = Literal["prefill", "decode", "select", "score", "training"]
DTypeName = Literal["float16", "bfloat16", "float32"]
CacheName = Literal["float8_e4m3fn"]


class BudgetEntry(Strict):
    """A budget as the file has it, in tokens."""

    k: PositiveInt
    window: PositiveInt
    sinks: NonNegativeInt = 0
    refresh: PositiveInt = 1
    granularity: Literal["token", "page"] = "token"


class Tier(Strict):
    """What a tier asks for: microseconds per (batch x head) at a density of at least `density`."""

    us_per_head: PositiveFloat
    inclusive: bool = False
    density: PositiveFloat
    speedup: PositiveFloat
    beats: list[str]


class Entry(Strict):
    """One entry of a file's `cases`."""

    group: str
    kind: Kind
    shapes: list[tuple[PositiveInt, PositiveInt]] = Field(min_length=1)
    chunk: PositiveInt | None = None
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    dtype: DTypeName
    cache: CacheName | None = None
    page: PositiveInt = 16
    budgets: list[BudgetEntry] = Field(default_factory=list)
    against: str | None = None
    arms: list[str] | None = None
    local_window: PositiveInt | None = None
    sweep: bool = False
    profile: bool = False


class CaseSet(Strict):
    """One file."""

    description: str
    tiers: dict[str, Tier] = Field(default_factory=dict)
    cases: list[Entry]


def budget_label(budget: Budget) -> str:
    """A budget in a table: `k512+w448 R128 token`."""
    sinks = f"s{budget.sinks}+" if budget.sinks else ""
    unit = "token" if budget.unit == 1 else f"page{budget.unit}"
    return f"{sinks}k{budget.k}+w{budget.window} R{budget.refresh} {unit}"


@dataclass(frozen=True)
class Case:
    """One shape and the budgets its sparse arms run with.

    Attributes:
        case_set, group, kind: file, what --run names, and what is done.
        batch, context: requests and tokens of each.
        queries: new tokens of each request, the last ones of its context.
        query_heads, kv_heads, head_dim, dtype, page: the layer.
        budgets: of the sparse arms.
        against: name of the arm that speed-ups refer to.
        arms: names of the arms to run, None: all of the kind.
        local_window: tokens of the local mask, None: no such arm.
        sweep, profile: belongs to the sweeps; is run under Nsight Compute.
        cache: dtype of a quantised cache, None: that of the queries.
    """

    case_set: str
    group: str
    kind: Kind
    batch: int
    context: int
    queries: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    page: int
    budgets: tuple[Budget, ...]
    against: str | None = None
    arms: tuple[str, ...] | None = None
    local_window: int | None = None
    sweep: bool = False
    profile: bool = False
    cache: str | None = None

    @property
    def name(self) -> str:
        """The shape in a table: `prefill B16 H96/96 S4096 D128 float16`."""
        if self.kind == "training":
            return f"training {self.batch} rows of {self.context}"
        new = f"{self.queries} of " if 1 < self.queries < self.context else ""
        cache = f" cache {self.cache}" if self.cache is not None else ""
        page = f" page {self.page}" if self.page != 16 else ""
        return (
            f"{self.kind} B{self.batch} H{self.query_heads}/{self.kv_heads} S{new}{self.context} "
            f"D{self.head_dim} {self.dtype}{cache}{page}"
        )


def _cases(name: str, entry: Entry) -> list[Case]:
    if entry.heads % entry.kv_heads:
        raise ValueError(f"heads {entry.heads} is not a multiple of kv_heads {entry.kv_heads}")
    if entry.cache is not None and entry.kind not in ("prefill", "decode"):
        raise ValueError(f"cache is a key of prefill and decode, not of {entry.kind}")
    found = []
    for batch, context in entry.shapes:
        whole = entry.kind == "prefill"
        queries = entry.chunk or (context if whole else 1)
        if queries > context:
            raise ValueError(f"chunk {queries} is longer than the context {context}")
        budgets = tuple(
            Budget(b.k, b.window, b.sinks, b.refresh, entry.page if b.granularity == "page" else 1)
            for b in entry.budgets
        )
        found.append(
            Case(
                name, entry.group, entry.kind, batch, context, queries, entry.heads,
                entry.kv_heads, entry.head_dim, entry.dtype, entry.page, budgets, entry.against,
                None if entry.arms is None else tuple(entry.arms), entry.local_window,
                entry.sweep, entry.profile, entry.cache,
            )
        )  # fmt: skip
    return found


def parse(text: str, name: str) -> CaseSet:
    """Read one YAML document; BenchError with one line per fault, each naming the set."""
    try:
        case_set = CaseSet.model_validate(yaml.safe_load(text) or {})
        for entry in case_set.cases:
            _cases(name, entry)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            where = ".".join(str(part) for part in fault["loc"]) or "top level"
            lines.append(f"{name}: {where}: {fault['msg'].removeprefix('Value error, ')}")
        raise BenchError("\n".join(lines)) from error
    except (yaml.YAMLError, ValueError) as error:
        raise BenchError(f"{name}: {' '.join(str(error).split())}") from error
    return case_set


def load() -> dict[str, CaseSet]:
    """The sets that come with the package, by name."""
    folder = files("vllm_sparsek.configs").joinpath("kernels")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {
        name.removesuffix(".yaml"): parse(
            folder.joinpath(name).read_text(encoding="utf-8"), f"configs/kernels/{name}"
        )
        for name in names
    }


@dataclass(frozen=True)
class Choice:
    """What one invocation runs: the cases, and the tiers of their sets by (set, tier)."""

    cases: list[Case]
    tiers: dict[str, Tier]


def choose(
    config: str | None = None, groups: list[str] | None = None, sweep: bool = False
) -> Choice:
    """Cases to run; nothing asked for: all of them.

    Args:
        config: name of one set, None: all sets.
        groups: groups to run, None: all.
        sweep: the sweeps alone.

    Raises:
        BenchError: there is no such set or group, or nothing is left.
    """
    sets = load()
    if config is not None and config not in sets:
        raise BenchError(f"no --config {config!r}; {nearest(config, list(sets))}")
    wanted = list(sets) if config is None else [config]
    cases = [case for name in wanted for entry in sets[name].cases for case in _cases(name, entry)]
    known = list(dict.fromkeys(case.group for case in cases))
    for group in groups or []:
        if group not in known:
            raise BenchError(f"no group {group!r} to --run; {nearest(group, known)}")
    everything = config is None and groups is None and not sweep
    cases = [
        case
        for case in cases
        if (groups is None or case.group in groups) and (everything or case.sweep == sweep)
    ]
    if not cases:
        raise BenchError("no case has all that was asked for: leave out --sweep or --config")
    present = {case.case_set for case in cases if case.group == "tiers"}
    return Choice(
        cases, {name: t for s in wanted if s in present for name, t in sets[s].tiers.items()}
    )
