"""Schema and loading of arms and workloads (`configs/bench/*.yaml`, `--bench-config FILE`).

Unknown keys are refused with the nearest valid key named. All lengths are tokens unless the field
says words.
"""

from __future__ import annotations

import difflib
import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from vllm_sparsek.serving_bench.errors import BenchError

NonNegativeInt = Annotated[int, Field(ge=0)]


def nearest(key: str, valid: list[str]) -> str:
    """Return `did you mean 'x'?` if a valid key is near, else the list of valid keys."""
    match = difflib.get_close_matches(key, valid, n=1)
    return f"did you mean {match[0]!r}?" if match else f"valid: {', '.join(valid)}"


class Strict(BaseModel):
    """A frozen model that names the nearest valid key when it refuses an unknown one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            valid = list(cls.model_fields)
            for key in data:
                if key not in valid:
                    raise ValueError(f"unknown key {key!r}; {nearest(str(key), valid)}")
        return data


class Arm(Strict):
    """One server: vLLM's arguments and environment. Without a backend it is the dense arm."""

    description: str = ""
    attention_backend: str | None = None
    sparsek: dict[str, Any] | None = None
    server_args: list[str] = []
    env: dict[str, str] = {}

    @model_validator(mode="after")
    def _sparsek_needs_its_backend(self) -> Arm:
        if self.sparsek is not None and self.dense:
            raise ValueError("`sparsek` settings need `attention_backend: sparsek`")
        return self

    @property
    def dense(self) -> bool:
        """Whether every token of the context is read by definition."""
        return (self.attention_backend or "").lower() != "sparsek"

    def vllm_args(self) -> list[str]:
        """Arguments of `vllm serve` that make this arm."""
        args: list[str] = []
        if self.attention_backend is not None:
            args += ["--attention-backend", self.attention_backend]
        if self.sparsek is not None:
            args += ["--additional-config", json.dumps({"sparsek": self.sparsek})]
        return args + self.server_args


class Size(Strict):
    """What the sizes of all datasets share. `request_rate` is in requests per second."""

    output_len: PositiveInt
    max_concurrency: PositiveInt
    request_rate: PositiveFloat | None = None
    warmup: NonNegativeInt = 2
    client_args: list[str] = []


class RandomSize(Size):
    """Unrelated random prompts; lengths vary by ± range_ratio."""

    num_prompts: PositiveInt
    input_len: PositiveInt
    range_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def prompt_len(self) -> int:
        """Longest prompt, in tokens."""
        return int(self.input_len * (1 + self.range_ratio))


class PrefixSize(Size):
    """`num_prefixes` random prefixes, each followed by num_prompts / num_prefixes suffixes."""

    num_prompts: PositiveInt
    num_prefixes: PositiveInt
    prefix_len: PositiveInt
    suffix_len: PositiveInt

    @model_validator(mode="after")
    def _at_least_one_prompt_per_prefix(self) -> PrefixSize:
        if self.num_prompts % self.num_prefixes:
            raise ValueError("num_prompts must be a multiple of num_prefixes")
        return self

    @property
    def prompt_len(self) -> int:
        """Longest prompt, in tokens."""
        return self.prefix_len + self.suffix_len


class MultiTurnSize(Size):
    """Conversations of `turns` requests; the replies inside the prompts are synthetic text."""

    conversations: PositiveInt
    turns: PositiveInt
    system_words: NonNegativeInt = 0
    turn_words: PositiveInt
    reply_words: NonNegativeInt = 0

    @property
    def num_prompts(self) -> int:
        """Requests in all."""
        return self.conversations * self.turns

    @property
    def prompt_words(self) -> int:
        """Words of the longest prompt: the last turn's."""
        return (
            self.system_words + self.turns * self.turn_words + (self.turns - 1) * self.reply_words
        )

    @property
    def prompt_len(self) -> int:
        """Length of the longest prompt in tokens, at one token per word."""
        return self.prompt_words


class RandomWorkload(Strict):
    """vLLM's dataset `random`."""

    description: str = ""
    dataset: Literal["random"]
    scales: dict[str, RandomSize]


class PrefixWorkload(Strict):
    """vLLM's dataset `prefix_repetition`."""

    description: str = ""
    dataset: Literal["prefix_repetition"]
    scales: dict[str, PrefixSize]


class MultiTurnWorkload(Strict):
    """Conversations written by us, replayed in order through vLLM's dataset `custom`."""

    description: str = ""
    dataset: Literal["multi_turn"]
    scales: dict[str, MultiTurnSize]


Workload = Annotated[
    RandomWorkload | PrefixWorkload | MultiTurnWorkload, Field(discriminator="dataset")
]
AnySize = RandomSize | PrefixSize | MultiTurnSize


class BenchConfig(Strict):
    """Arms and workloads by name."""

    arms: dict[str, Arm] = {}
    workloads: dict[str, Workload] = {}

    def arm(self, name: str) -> Arm:
        """Return the arm of that name, or raise BenchError naming the nearest."""
        if name not in self.arms:
            raise BenchError(f"no arm {name!r}; {nearest(name, list(self.arms))}")
        return self.arms[name]

    def size(self, workload: str, scale: str) -> AnySize:
        """Return a workload's size at a scale, or raise BenchError naming the nearest."""
        if workload not in self.workloads:
            raise BenchError(f"no workload {workload!r}; {nearest(workload, list(self.workloads))}")
        scales = self.workloads[workload].scales
        if scale not in scales:
            raise BenchError(
                f"workload {workload!r} has no scale {scale!r}; {nearest(scale, list(scales))}"
            )
        return scales[scale]


def parse(text: str, source: str) -> BenchConfig:
    """Read one YAML document; BenchError with one line per fault, each naming `source`."""
    try:
        return BenchConfig.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as error:
        raise BenchError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            where = ".".join(str(part) for part in fault["loc"]) or "top level"
            lines.append(f"{source}: {where}: {fault['msg'].removeprefix('Value error, ')}")
        raise BenchError("\n".join(lines)) from error


def load(extra: Path | None = None) -> BenchConfig:
    """Read the arms and workloads shipped with the package, then those of `extra` over them."""
    documents = [
        (entry.read_text(encoding="utf-8"), f"configs/bench/{entry.name}")
        for entry in sorted(
            files("vllm_sparsek.configs").joinpath("bench").iterdir(), key=lambda e: e.name
        )
        if entry.name.endswith(".yaml")
    ]
    if extra is not None:
        try:
            documents.append((extra.read_text(encoding="utf-8"), str(extra)))
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"cannot read --bench-config {extra}: {error}") from error
    arms: dict[str, Arm] = {}
    workloads: dict[str, Any] = {}
    for text, source in documents:
        config = parse(text, source)
        arms |= config.arms
        workloads |= config.workloads
    return BenchConfig(arms=arms, workloads=workloads)
