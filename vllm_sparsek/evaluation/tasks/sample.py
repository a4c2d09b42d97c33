"""One question about one context, built token by token so that the context's length is exact."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# stands for a message's text while the chat template is taken apart
MARK = "\x01"


class TaskError(ValueError):
    """A sample that cannot be built; the message names the remedy."""


@dataclass(frozen=True)
class Sample:
    """A prompt in two parts, and what its answer must name.

    Attributes:
        context: token ids, exactly as many as were asked for; question: token ids that follow,
            up to where the answer starts.
        references: strings, see ``recall``.
        max_tokens: length of the answer.
        needles: spans [start, stop) of the context without which the answer cannot be known;
            empty where it follows from the context as a whole.
    """

    context: list[int]
    question: list[int]
    references: tuple[str, ...]
    max_tokens: int
    needles: tuple[tuple[int, int], ...] = ()


def recall(answer: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the answer, case ignored: RULER's string match."""
    said = answer.lower()
    return sum(reference.lower() in said for reference in references) / len(references)


class Encoder:
    """Text to token ids, and the model's chat template taken apart.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.has_chat = bool(getattr(tokenizer, "chat_template", None))

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens around it."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def start(self) -> list[int]:
        """Token ids every plain text starts with: the model's BOS, if it has one."""
        return list(self.tokenizer("")["input_ids"])

    def frame(self) -> tuple[list[int], list[int]]:
        """Token ids before and after the one message of a prompt; plain without a template."""
        if not self.has_chat:
            return self.start(), self.ids("\n")
        head, tail = self.turns([("user", MARK)])
        return self.ids(head), self.ids(tail)

    def turns(self, messages: Sequence[tuple[str, str]]) -> list[str]:
        """A conversation as the model reads it, cut where a message's text is ``MARK``."""
        chat = [{"role": role, "content": text} for role, text in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return str(text).split(MARK)


class Filler:
    """Sentences to hide needles between, tokenised once.

    Args:
        sentences: at least one; every sentence is encoded with the space before it.
        name: of the text they come from.
    """

    def __init__(self, encoder: Encoder, sentences: Sequence[str], name: str) -> None:
        self.name = name
        self._ids = [encoder.ids(f" {sentence}") for sentence in sentences]

    def stream(self, first: int = 0) -> Iterator[list[int]]:
        """Token ids of the sentences without end, from one of them on."""
        order = itertools.chain(range(first, len(self._ids)), range(first))
        return (self._ids[index] for index in itertools.cycle(order))

    def stream_from_anywhere(self, rng: random.Random) -> Iterator[list[int]]:
        """The same from a random sentence on."""
        return self.stream(rng.randrange(len(self._ids)))


def split_sentences(text: str) -> list[str]:
    """Sentences of 20 to 400 characters, white space made single: headings and tables drop out."""
    parts = re.split(r"(?<=[.!?]) |(?<=[.!?][\"'\u201d\u2019)]) ", re.sub(r"\s+", " ", text))
    return [part for part in parts if 20 <= len(part) <= 400]


def hide(
    head: list[int],
    pieces: Sequence[tuple[float, list[int]]],
    sentences: Iterator[list[int]],
    length: int,
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Fill a context to exactly ``length`` tokens with pieces between sentences.

    The last sentence is cut where the context is full.

    Args:
        head: token ids in front.
        pieces: depth (0: right after the head, 1: at the end) and token ids of each piece.
        sentences: filler.
        length: tokens of the context.

    Returns:
        The token ids, and the span [start, stop) of each piece in the order given.

    Raises:
        TaskError: head and pieces alone are longer.
    """
    room = length - len(head) - sum(len(ids) for _, ids in pieces)
    if room < 0:
        raise TaskError(f"a context of {length} tokens is too short: {length - room} are needed")
    chunks: list[list[int]] = []
    while room > 0:
        chunks.append(next(sentences)[:room])
        room -= len(chunks[-1])
    order = sorted(range(len(pieces)), key=lambda i: pieces[i][0])
    context = list(head)
    spans: dict[int, tuple[int, int]] = {}
    placed = 0
    for index in order:
        depth, ids = pieces[index]
        until = round(depth * len(chunks))
        for chunk in chunks[placed:until]:
            context += chunk
        placed = max(placed, until)
        spans[index] = (len(context), len(context) + len(ids))
        context += ids
    for chunk in chunks[placed:]:
        context += chunk
    return context, tuple(spans[index] for index in range(len(pieces)))


@dataclass(frozen=True)
class Setting:
    """What a generator works with.

    Attributes:
        rng: the only source of chance.
        length: tokens of the context.
        encoder: the model's tokenizer.
        essay: sentences of real text; noise: few sentences without content, repeated.
        split: ``test``, or ``tune`` for choosing settings: other wordings of the same task.
    """

    rng: random.Random
    length: int
    encoder: Encoder
    essay: Filler
    noise: Filler
    split: str

    def prompt(
        self,
        intro: str,
        pieces: Sequence[str],
        filler: Filler,
        question: str,
        answer_prefix: str,
        references: Sequence[str],
        max_tokens: int,
        needles: Sequence[int] | None = None,
        in_order: bool = False,
    ) -> Sample:
        """A sample of one message: intro, filler with pieces at random depths, question.

        Args:
            needles: indices of the pieces that matter for the answer; None: all of them.
            in_order: the pieces keep their order in the text.
        """
        before, after = self.encoder.frame()
        encode = self.encoder.ids
        depths = [self.rng.random() for _ in pieces]
        if in_order:
            depths.sort()
        context, spans = hide(
            before + encode(f"{intro}\n\n"),
            [(depth, encode(f" {piece}")) for depth, piece in zip(depths, pieces, strict=True)],
            filler.stream_from_anywhere(self.rng) if filler is self.essay else filler.stream(),
            self.length,
        )
        wanted = range(len(pieces)) if needles is None else needles
        return Sample(
            context=context,
            question=encode(f"\n\n{question}") + after + encode(answer_prefix),
            references=tuple(references),
            max_tokens=max_tokens,
            needles=tuple(spans[index] for index in wanted),
        )
