"""Synthetic retrieval prompts: facts strewn over a text, then questions about all of them.

Plain text rarely looks back at one sentence, so scorers fitted to it alone drop what a question
will ask for. The families and wordings here are for fitting only: the evaluation uses others.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Marta Jonas Priya Kwame Elena Tobias Yuki Omar Ingrid Felix Leila Bruno Sofia Anders Mei "
    "Rafael Nadia Igor Clara Dmitri Amara Henrik Lucia Pavel Zainab Oscar Freya Mateo Hana "
    "Viktor"
)
LAST_NAMES = _words(
    "Ellison Okafor Lindgren Petrov Castillo Nakamura Brandt Haddad Moreau Kowalski Osei Varga "
    "Romano Fischer Silva Dahl Ivanova Tanaka Weber Novak Reyes Larsen Mbeki Rossi Sato Keller"
)
ADJECTIVES = _words(
    "amber quiet northern broken velvet copper hollow silver crooked frozen crimson distant "
    "gentle rusty narrow sunken golden marble ancient wooden"
)
NOUNS = _words(
    "lantern harbor compass orchard violin saddle anchor teapot ladder mirror kettle bridge "
    "parcel garden window wagon basket chapel statue river"
)
CITIES = _words(
    "Lisbon Oslo Nairobi Quito Hanoi Dublin Tbilisi Riga Accra Lima Cairo Porto Bergen Kyoto "
    "Tunis Salvador Leeds Turin Ghent Malmo"
)


@dataclass(frozen=True)
class Fact:
    """A statement to hide, the question that asks for it, and the answer."""

    statement: str
    question: str
    answer: str


@dataclass(frozen=True)
class RetrievalWindow:
    """Token ids of a text with facts and questions.

    Attributes:
        ids: the whole window; answers are given after every question.
        answer_queries: (first, end) positions of the queries that predict each answer.
    """

    ids: list[int]
    answer_queries: list[tuple[int, int]]


def _person(r: random.Random) -> str:
    return f"{r.choice(FIRST_NAMES)} {r.choice(LAST_NAMES)}"


def _thing(r: random.Random) -> str:
    return f"{r.choice(ADJECTIVES)} {r.choice(NOUNS)}"


def _number(r: random.Random) -> str:
    digits = r.randint(4, 7)
    return str(r.randrange(10 ** (digits - 1), 10**digits))


def _code(r: random.Random) -> Fact:
    who, number = _person(r), _number(r)
    return Fact(f"The locker of {who} opens with the code {number}.",
                f"Which code opens the locker of {who}?", number)  # fmt: skip


def _move(r: random.Random) -> Fact:
    who, city = _person(r), r.choice(CITIES)
    return Fact(f"By the way, {who} moved to {city} last spring.",
                f"Where did {who} move last spring?", city)  # fmt: skip


def _ticket(r: random.Random) -> Fact:
    thing, ticket = _thing(r), f"{r.randrange(1 << 16):04x}-{r.randrange(1 << 16):04x}"
    return Fact(f"Ticket {ticket} is about the {thing}.",
                f"Which ticket is about the {thing}?", ticket)  # fmt: skip


def _serial(r: random.Random) -> Fact:
    thing, number = _thing(r), _number(r)
    return Fact(f"Remember: the serial of the {thing} is {number}.",
                f"What is the serial of the {thing}?", number)  # fmt: skip


def _variable(r: random.Random) -> Fact:
    name, number = "".join(r.choices("abcdefghijklmnopqrstuvwxyz", k=r.randint(3, 6))), _number(r)
    return Fact(f"let {name} = {number}", f"print {name}", number)


def _sale(r: random.Random) -> Fact:
    thing, who = _thing(r), _person(r)
    day = f"{r.choice(['January', 'March', 'May', 'June', 'October'])} {r.randint(1, 28)}"
    return Fact(f"The {thing} was sold to {who} on {day}.",
                f"To whom was the {thing} sold, and when?", f"{who}, on {day}")  # fmt: skip


def _password(r: random.Random) -> Fact:
    city, word = r.choice(CITIES), f"{r.choice(ADJECTIVES)}-{r.choice(NOUNS)}-{r.randrange(100)}"
    place = r.choice(["vault", "server room", "archive", "lab"])
    return Fact(f"To enter the {place} in {city}, say {word}.",
                f"What does one say to enter the {place} in {city}?", word)  # fmt: skip


def _things(r: random.Random) -> Fact:
    who, things = _person(r), ", ".join(r.sample(NOUNS, 3))
    return Fact(f"{who} keeps three things at home: {things}.",
                f"Which three things does {who} keep at home?", things)  # fmt: skip


FAMILIES: tuple[Callable[[random.Random], Fact], ...] = (
    _code, _move, _ticket, _serial, _variable, _sale, _password, _things,
)  # fmt: skip


def retrieval_window(
    tokenizer: Any, filler: str, tokens: int, seed: int, facts: int = 28, chat: bool = False
) -> RetrievalWindow:
    """A window of exactly ``tokens`` tokens: filler with facts between its lines, then questions.

    Args:
        tokenizer: of the model.
        filler: text to take lines from; it is repeated if it is too short.
        tokens: length of the window.
        seed: everything random follows from it.
        facts: facts hidden, each asked for once.
        chat: lay it out as turns of the model's chat template.

    Raises:
        ValueError: the questions alone do not fit.
    """
    r = random.Random(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    hidden = [r.choice(FAMILIES)(r) for _ in range(facts)]
    opening, before_answer, after_answer = (
        _turn_marks(tokenizer) if chat else ("", "\nAnswer:", "\nQuestion: ")
    )
    tail = encode("\n" if chat else "\nQuestion: ")
    answers = []
    for fact in r.sample(hidden, facts):
        tail += encode(fact.question + before_answer)
        answer = encode(fact.answer if chat else f" {fact.answer}")
        answers.append((len(tail) - 1, len(tail) - 1 + len(answer)))
        tail += answer + encode(after_answer)
    head = encode(opening)
    statements = [encode(fact.statement + "\n") for fact in hidden]
    room = tokens - len(head) - len(tail) - sum(map(len, statements))
    if room < tokens // 4:
        raise ValueError(f"{facts} facts and questions do not fit into {tokens} tokens")
    lines = [encode(line + "\n") for line in _lines(filler, r, room)]
    while sum(map(len, lines)) - len(lines[-1]) >= room:
        lines.pop()
    surplus = sum(map(len, lines)) - room
    lines[-1] = lines[-1][: len(lines[-1]) - surplus]
    ids = list(head)
    places = sorted(r.randrange(len(lines)) for _ in statements)
    waiting = list(zip(places, statements, strict=True))
    for place, line in enumerate(lines):
        while waiting and waiting[0][0] == place:
            ids += waiting.pop(0)[1]
        ids += line
    offset = len(ids)
    return RetrievalWindow(ids + tail, [(a + offset, b + offset) for a, b in answers])


def _lines(filler: str, r: random.Random, tokens: int) -> list[str]:
    """Lines of the filler from a random place on, certainly more than ``tokens`` tokens."""
    lines = [line for line in filler.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the text to hide facts in is empty")
    start = r.randrange(len(lines))
    out: list[str] = []
    size = 0
    # a token is rarely longer than eight characters on average
    while size < 8 * tokens:
        line = lines[(start + len(out)) % len(lines)]
        out.append(line)
        size += len(line) + 1
    return out


def _turn_marks(tokenizer: Any) -> tuple[str, str, str]:
    """What the chat template writes before the first turn, before a reply and after one.

    Raises:
        ValueError: there is no template, or it does not keep the texts as they are.
    """
    turns = [{"role": "user", "content": "<<u>>"}, {"role": "assistant", "content": "<<a>>"}]
    text = tokenizer.apply_chat_template([*turns, *turns], tokenize=False)
    parts = text.replace("<<a>>", "<<u>>").split("<<u>>")
    if len(parts) != 5:
        raise ValueError("the chat template does not keep messages as they are")
    return parts[0], parts[1], parts[2]
