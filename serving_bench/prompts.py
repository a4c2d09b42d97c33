"""Text made of common English words: filler prompts and multi-turn conversations.

A common word with its leading space is one token in nearly every vocabulary, so lengths in words
are lengths in tokens, without loading a tokenizer.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from vllm_sparsek.serving_bench.config import MultiTurnSize

WORDS = """
    the of and to in that was his he it with is for as had you not be her on at by which have or
    from this him but all she they were my are me one their so an said them we who would been
    will no when there if more out up into do any your what has man could other than our some
    very time upon about may its only now like little then can should made did us such great
    before must two these see know over much down after first good men own never most old day
    where those came come himself way work life without go make well through being long say
    might how am too even again many back here think every people went same last thought away
    under take found hand eyes still place while just also young yet though against things get
    nothing ever right three house years another put love world off always night seen each part
    new face because heart light head left water white door side room name far few small once
""".split()  # noqa: SIM905 - words are easier to read than a list of strings


def text(words: int, rng: random.Random) -> str:
    """Return `words` random words."""
    return " ".join(rng.choices(WORDS, k=words))


def conversations(size: MultiTurnSize, seed: int) -> list[str]:
    """Return the prompts of all conversations, [turns * conversations], turn by turn.

    The prompt of turn t extends that of the turn before by a synthetic reply and the next question.
    Prompt t · conversations + c belongs to conversation c.
    """
    rng = random.Random(seed)
    # distinct from the first word on, so that only a conversation's own turns share a prefix
    history = [
        f"{text(max(1, size.system_words), rng)}\n" if size.system_words else ""
        for _ in range(size.conversations)
    ]
    prompts = []
    for _ in range(size.turns):
        for c in range(size.conversations):
            prompt = f"{history[c]}User: {text(size.turn_words, rng)}\nAssistant:"
            prompts.append(prompt)
            history[c] = f"{prompt} {text(size.reply_words, rng)}\n"
    return prompts


def write_jsonl(prompts: list[str], output_len: int, path: Path) -> None:
    """Write prompts as a file of vLLM's dataset `custom`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        for prompt in prompts:
            stream.write(json.dumps({"prompt": prompt, "output_tokens": output_len}) + "\n")
