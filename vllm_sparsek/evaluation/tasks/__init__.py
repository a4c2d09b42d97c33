"""Tasks by name. To add one: write a generator, name it here; the tests take it up by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_sparsek.evaluation.tasks import conversation, needles, passkey, variables, words
from vllm_sparsek.evaluation.tasks.sample import (
    Encoder,
    Filler,
    Sample,
    Setting,
    TaskError,
    split_sentences,
)

SPLITS = ("test", "tune")
# nothing to remember, the same over and over
NOISE = (
    "The field is wide.",
    "The air is warm.",
    "The road goes on.",
    "We walk along.",
    "It is the same again.",
)


@dataclass(frozen=True)
class Task:
    """A generator, and what its score belongs to.

    Attributes:
        make: builds one sample; ruler: part of the RULER average; has_needles: whether single
            spans hold the answer, so that an oracle can know them.
    """

    make: Callable[[Setting], Sample]
    ruler: bool = True
    has_needles: bool = True


TASKS = {
    "needle-noise": Task(needles.single_noise),
    "needle-essay": Task(needles.single_essay),
    "multi-key": Task(needles.multi_key),
    "multi-value": Task(needles.multi_value),
    "multi-query": Task(needles.multi_query),
    "variable-tracking": Task(variables.variable_tracking),
    "frequent-words": Task(words.frequent_words, has_needles=False),
    "passkey": Task(passkey.passkey, ruler=False),
    "conversation": Task(conversation.conversation, ruler=False),
}


class Generator:
    """Makes the samples of all tasks for one model and one filler text.

    Args:
        tokenizer: of transformers.
        essay: real text to hide needles in; essay_name: its name in messages.

    Raises:
        TaskError: the text has no sentences.
    """

    def __init__(self, tokenizer: Any, essay: str, essay_name: str) -> None:
        self.encoder = Encoder(tokenizer)
        sentences = split_sentences(essay)
        if not sentences:
            raise TaskError(f"{essay_name} has no sentences to hide needles between")
        self.essay = Filler(self.encoder, sentences, essay_name)
        self.noise = Filler(self.encoder, NOISE, "noise")

    def samples(
        self, task: str, length: int, count: int, seed: int = 0, split: str = "test"
    ) -> list[Sample]:
        """The first ``count`` samples of a task: the same for the same arguments.

        Args:
            length: tokens of the context.

        Raises:
            TaskError: the task cannot be built; names the task.
        """
        made: list[Sample] = []
        for index in range(count):
            rng = random.Random(f"{split} {seed} {task} {length} {index}")
            setting = Setting(rng, length, self.encoder, self.essay, self.noise, split)
            try:
                made.append(TASKS[task].make(setting))
            except TaskError as error:
                raise TaskError(f"task {task}: {error}") from None
        return made


__all__ = ["SPLITS", "TASKS", "Generator", "Sample", "Task", "TaskError"]
