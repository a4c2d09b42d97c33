"""What a scorer is fitted on: windows of the user's texts, and retrieval prompts made from them."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_sparsek.training.retrieval import retrieval_window

# characters a window of a text is cut from, per token: no usual text has more on average
CHARACTERS_PER_TOKEN = 12
# share of the windows that are retrieval prompts
RETRIEVAL_SHARE = 0.4
# characters of one text before the next one's turn, where they are mixed
PASSAGE = 1500
# a fact for every so many tokens of a retrieval prompt
TOKENS_PER_FACT = 290


class DataError(ValueError):
    """Texts that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Window:
    """One training window.

    Attributes:
        name: kind and source, for logs.
        ids: token ids.
        answers: (first, end) positions of the queries that predict each answer.
    """

    name: str
    ids: list[int]
    answers: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """A text with the name it is logged under."""

    name: str
    content: str


def standard_library() -> Text:
    """Source of Python's standard library: text that every machine has."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 15_000)
    return Text("python-stdlib", "\n\n".join(path.read_text(errors="ignore") for path in files))


def read_texts(paths: list[Path]) -> list[Text]:
    """Read texts; a folder stands for its .txt, .md and .py files, as one text.

    Raises:
        DataError: no such file, not text, empty.
    """
    texts = []
    for path in paths:
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md", ".py"))
        elif path.is_file():
            files = [path]
        else:
            raise DataError(f"--data {path}: no such file or folder.")
        try:
            content = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
        except UnicodeDecodeError as error:
            raise DataError(f"--data {path}: not UTF-8 text ({error}).") from None
        if not content.strip():
            raise DataError(f"--data {path}: no text in it (folders: .txt, .md and .py count).")
        texts.append(Text(path.name, content))
    return texts


def digest(texts: list[Text]) -> str:
    """Names of texts with the start of the SHA-256 of each, to record what was read."""
    return ", ".join(
        f"{text.name} (sha256 {hashlib.sha256(text.content.encode()).hexdigest()[:16]})"
        for text in texts
    )


def training_windows(
    tokenizer: Any, texts: list[Text], tokens: int, count: int, seed: int
) -> list[Window]:
    """Windows in equal parts from all texts, 40 % of them with facts and questions.

    Half of the retrieval prompts are chats if the model has a chat template.

    Args:
        tokenizer: of the model.
        texts: what to read; tokens: length of a window; count: number of windows.
        seed: places and facts follow from it.

    Raises:
        DataError: a text is shorter than a window.
    """
    r = random.Random(seed)
    retrieval = round(RETRIEVAL_SHARE * count)
    plain = [
        _text_window(tokenizer, texts[i % len(texts)], tokens, r) for i in range(count - retrieval)
    ]
    hidden = [
        asking_window(tokenizer, texts[i % len(texts)], tokens, r.randrange(1 << 30), i % 2 == 1)
        for i in range(retrieval)
    ]
    return plain + hidden


def asking_window(tokenizer: Any, text: Text, tokens: int, seed: int, chat: bool) -> Window:
    """One retrieval prompt over a text; a chat only if the model has a template."""
    chat = chat and tokenizer.chat_template is not None
    facts = max(1, tokens // TOKENS_PER_FACT)
    made = retrieval_window(tokenizer, text.content, tokens, seed, facts, chat)
    return Window(f"{'chat' if chat else 'questions'} over {text.name}", made.ids,
                  made.answer_queries)  # fmt: skip


def mixed_text(texts: list[Text], tokens: int, seed: int) -> Text:
    """Passages of all texts, one after the other, together enough for ``tokens`` tokens."""
    r = random.Random(seed)
    size = tokens * CHARACTERS_PER_TOKEN // len(texts)
    # lines of equal parts, so that a window cut from anywhere in them has its share of every text
    parts = []
    for text in texts:
        start = r.randrange(max(1, len(text.content) - size))
        parts.append(text.content[start : start + size].splitlines())
    rounds = max(1, size // PASSAGE)
    passages = [
        "\n".join(lines[len(lines) * i // rounds : len(lines) * (i + 1) // rounds])
        for i in range(rounds)
        for lines in parts
    ]
    return Text("all texts", "\n".join(passages))


def probe_windows(
    tokenizer: Any, texts: list[Text], tokens: int, count: int, seed: int
) -> list[Window]:
    """Windows to measure on, at other places than those fitted to.

    A single one is a chat over passages of all texts; more are, by turns, text, questions, text,
    chat, of all texts.
    """
    if count == 1:
        return [asking_window(tokenizer, mixed_text(texts, tokens, seed), tokens, seed, True)]
    return [refinement_window(tokenizer, texts, tokens, seed, i) for i in range(count)]


def refinement_window(
    tokenizer: Any, texts: list[Text], tokens: int, seed: int, step: int
) -> Window:
    """The window of a step of refinement: by turns text, questions, text, chat, of all texts."""
    r = random.Random(f"refinement {seed} {step}")
    text = texts[step // 2 % len(texts)]
    if step % 2 == 0:
        return _text_window(tokenizer, text, tokens, r)
    return asking_window(tokenizer, text, tokens, r.randrange(1 << 30), step % 4 == 3)


def _text_window(tokenizer: Any, text: Text, tokens: int, r: random.Random) -> Window:
    size = tokens * CHARACTERS_PER_TOKEN
    start = r.randrange(max(1, len(text.content) - size))
    ids = tokenizer(text.content[start : start + size])["input_ids"][:tokens]
    if len(ids) < tokens:
        raise DataError(
            f"--data {text.name}: {len(ids)} tokens, shorter than one window of {tokens}: give "
            "more text or a smaller --window-tokens."
        )
    return Window(f"text {text.name}", ids)
