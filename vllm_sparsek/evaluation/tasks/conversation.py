"""A conversation of several turns whose last question is about the first."""

from __future__ import annotations

from vllm_sparsek.evaluation.tasks.sample import MARK, Sample, Setting, TaskError, hide

TURNS = 4
_MAX_TOKENS = 16

WORDINGS = {
    "test": {
        "fact": "Hello! Before we start: I parked the car in space {value} of the airport. I "
        "tend to forget such things, so please keep it for me.",
        "promise": "Of course. I will remember your parking space.",
        "turn": "Please read this passage:",
        "reply": "Thank you, I have read the passage. What comes next?",
        "question": "That was the last passage. At the beginning I told you where I parked the "
        "car. What is the number of my parking space?",
        "prefix": "Your parking space is number",
    },
    "tune": {
        "fact": "Good morning. My train leaves at platform {value} today, remind me of that later.",
        "promise": "I will remind you of your platform.",
        "turn": "Here is something to pass the time:",
        "reply": "An interesting piece. Is there more of it?",
        "question": "I have to go now. From which platform does my train leave?",
        "prefix": "Your train leaves at platform",
    },
}


def conversation(setting: Setting) -> Sample:
    """A fact in the first turn, passages of real text in the next ones, then the question.

    Raises:
        TaskError: the model has no chat template.
    """
    encoder, wording = setting.encoder, WORDINGS[setting.split]
    if not encoder.has_chat:
        raise TaskError("the model has no chat template: leave this task out with --tasks")
    value = str(setting.rng.randrange(1_000, 10_000))
    fact = wording["fact"].format(value=value)
    passages = [("user", f"{wording['turn']}{MARK}"), ("assistant", wording["reply"])] * TURNS
    first, *between, last = encoder.turns(
        [("user", fact), ("assistant", wording["promise"]), *passages, ("user", MARK)]
    )
    # what follows the last passage belongs to the context, up to the question
    *boundaries, final = [encoder.ids(text) for text in between]
    said = encoder.ids(first[: first.index(fact)])
    stated = encoder.ids(first[: first.index(fact) + len(fact)])
    context, _ = hide(
        encoder.ids(first),
        [((turn + 1) / TURNS, ids) for turn, ids in enumerate(boundaries)],
        setting.essay.stream_from_anywhere(setting.rng),
        setting.length - len(final),
    )
    return Sample(
        context=context + final,
        question=encoder.ids(wording["question"] + last) + encoder.ids(wording["prefix"]),
        references=(value,),
        max_tokens=_MAX_TOKENS,
        needles=((len(said), len(stated)),),
    )
