"""The prompts of all jobs, written once and put to every arm alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparsek.evaluation import texts
from vllm_sparsek.evaluation.plan import PERPLEXITY, fingerprint, slug
from vllm_sparsek.evaluation.tasks import TASKS, Generator, TaskError
from vllm_sparsek.evaluation.texts import Text
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.writing import write_atomically

# lengths of contexts are multiples of it
LENGTH_UNIT = 64


@dataclass(frozen=True)
class Job:
    """Prompts of one task or text at one length.

    Attributes:
        name: the task, or ``perplexity: <text>``; task: the task or ``perplexity``.
        path: file of prompts, see ``worker``; digest: of its content.
        references: per prompt, what the answer must name.
        longest: tokens of the longest prompt and its answer.
    """

    name: str
    task: str
    path: Path
    digest: str
    references: list[list[str]]
    longest: int

    @property
    def kind(self) -> str:
        """What the worker makes of it."""
        return "losses" if self.task == PERPLEXITY else "answers"


@dataclass(frozen=True)
class Request:
    """What to ask: see the options of the command."""

    model: str
    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int
    windows: int
    seed: int
    split: str
    texts: Sequence[Text]


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer. Raises BenchError if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BenchError(f"the tokenizer of {model} cannot be loaded: {reason}") from error


def context_limit(model: str) -> int | None:
    """Longest context of a model in tokens, as its config.json says."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BenchError(f"the configuration of {model} cannot be loaded: {reason}") from error
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def prepare(
    request: Request, tokenizer: Any, limit: int | None, folder: Path
) -> dict[int, list[Job]]:
    """Write the prompts; return the jobs of each length.

    Args:
        limit: tokens that a prompt and its answer may have together, None: unknown.

    Raises:
        BenchError: a length, text or task that cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs: dict[int, list[Job]] = {length: [] for length in request.lengths}
    try:
        essay = request.texts[0]
        generator = Generator(tokenizer, essay.content, essay.name)
        for length in request.lengths:
            if length % LENGTH_UNIT:
                raise BenchError(f"--lengths {length} is not a multiple of {LENGTH_UNIT}")
            for task in request.tasks:
                if task in TASKS:
                    jobs[length].append(_task_job(request, generator, task, length, folder))
    except TaskError as error:
        raise BenchError(str(error)) from error
    if PERPLEXITY in request.tasks:
        for text in request.texts:
            ids = generator.encoder.ids(text.content)
            for length in request.lengths:
                jobs[length].append(_text_job(request, text, ids, generator.encoder.start(),
                                              length, folder))  # fmt: skip
    for length in request.lengths:
        longest = max(job.longest for job in jobs[length])
        if limit is not None and longest > limit:
            fits = (limit - (longest - length)) // LENGTH_UNIT * LENGTH_UNIT
            raise BenchError(
                f"--lengths {length}: with question and answer {longest} tokens, but the model's "
                f"context has {limit}; the longest that fits is {fits}"
            )
    return jobs


def _write(folder: Path, name: str, task: str, length: int, prompts: list[dict[str, Any]]) -> Job:
    path = folder / f"{slug(name)}-{length}.json"
    write_atomically(path, json.dumps(prompts).encode())
    longest = max(len(prompt["ids"]) + prompt["max_tokens"] for prompt in prompts)
    references = [list(prompt["references"]) for prompt in prompts if "references" in prompt]
    return Job(name, task, path, fingerprint(prompts), references, longest)


def _task_job(request: Request, generator: Generator, task: str, length: int, folder: Path) -> Job:
    samples = generator.samples(task, length, request.samples, request.seed, request.split)
    prompts = [
        {
            "ids": s.context + s.question,
            "max_tokens": s.max_tokens,
            "needles": s.needles,
            "references": s.references,
        }
        for s in samples
    ]
    return _write(folder, task, task, length, prompts)


def _text_job(
    request: Request, text: Text, ids: list[int], start: list[int], length: int, folder: Path
) -> Job:
    windows = texts.windows(ids, start, length, request.windows)
    if not windows:
        raise BenchError(
            f"the text {text.name} has {len(ids)} tokens, too few for a window of {length}: "
            "leave it out or lower --lengths"
        )
    prompts = [{"ids": window, "max_tokens": 1} for window in windows]
    return _write(folder, f"{PERPLEXITY}: {text.name}", PERPLEXITY, length, prompts)
