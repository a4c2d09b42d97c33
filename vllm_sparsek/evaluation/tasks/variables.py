"""Variable tracking: which names hold a value after a chain of assignments.

After RULER (arXiv 2404.06654): one chain of four hops, so five names, in noise; the statements
stand in the order of the chain. A worked example precedes the text, as there.
"""

from __future__ import annotations

import string
from itertools import pairwise

from vllm_sparsek.evaluation.tasks.sample import Sample, Setting

HOPS = 4
NAME_LETTERS = 5
_MAX_TOKENS = 48

WORDINGS = {
    "test": {
        "intro": "Memorize and track the chain of variable assignments hidden in the text. For "
        "example, after VAR AAB = 50721. and VAR CDE = VAR AAB. the variables assigned the value "
        "50721 are AAB and CDE. Here is the text.",
        "first": "VAR {name} = {value}.",
        "next": "VAR {name} = VAR {previous}.",
        "question": "Find all variables that are assigned the value {value} in the text above.",
        "prefix": "According to the chain of variable assignments in the text above, {count} "
        "variables are assigned the value {value}, they are:",
    },
    "tune": {
        "intro": "Parcels are handed from one depot to the next in the text below. For example, "
        "if depot AAB receives parcel 50721 and depot CDE takes over from depot AAB, then AAB and "
        "CDE have held parcel 50721.",
        "first": "Depot {name} receives parcel {value}.",
        "next": "Depot {name} takes over from depot {previous}.",
        "question": "Name all depots that have held parcel {value}.",
        "prefix": "The {count} depots that have held parcel {value} are:",
    },
}


def variable_tracking(setting: Setting) -> Sample:
    """One chain in noise; the answer is every name on it."""
    rng, wording = setting.rng, WORDINGS[setting.split]
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=NAME_LETTERS))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10_000, 100_000))
    statements = [wording["first"].format(name=names[0], value=value)]
    for previous, name in pairwise(names):
        statements.append(wording["next"].format(name=name, previous=previous))
    words = {"value": value, "count": len(names)}
    return setting.prompt(
        intro=wording["intro"],
        pieces=statements,
        filler=setting.noise,
        question=wording["question"].format(**words),
        answer_prefix=wording["prefix"].format(**words),
        references=names,
        max_tokens=_MAX_TOKENS,
        in_order=True,
    )
