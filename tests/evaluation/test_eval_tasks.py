"""Generators: exact lengths, the same for the same seed, and the answer stands in the context."""

from __future__ import annotations

import pytest

from vllm_sparsek.evaluation.tasks import SPLITS, TASKS, Generator, TaskError
from vllm_sparsek.evaluation.tasks.sample import hide, recall, split_sentences

LENGTHS = (512, 1088)
COUNT = 3


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="session")
def generator(tokenizer, long_text):
    return Generator(tokenizer, long_text, "manual")


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_context_has_exactly_the_tokens_asked_for(generator, task, split, length):
    for sample in generator.samples(task, length, COUNT, split=split):
        assert len(sample.context) == length
        assert sample.question
        assert sample.references


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_in_the_context_and_not_in_the_question(generator, tokenizer, task, split):
    for sample in generator.samples(task, 1088, COUNT, split=split):
        context = tokenizer.decode(sample.context)
        question = tokenizer.decode(sample.question)
        assert recall(context, sample.references) == 1
        assert recall(question, sample.references) == 0


def test_needles_are_the_spans_that_hold_the_answer(generator, tokenizer, task):
    for sample in generator.samples(task, 1088, COUNT):
        spans = [tokenizer.decode(sample.context[start:stop]) for start, stop in sample.needles]
        assert bool(spans) is TASKS[task].has_needles
        if spans:
            assert recall(" ".join(spans), sample.references) == 1


def test_samples_follow_from_the_seed_alone(tokenizer, long_text, generator, task):
    again = Generator(tokenizer, long_text, "manual")
    first = generator.samples(task, 512, COUNT, seed=7)
    assert again.samples(task, 512, COUNT, seed=7) == first
    # more samples begin with the same ones
    assert again.samples(task, 512, COUNT + 1, seed=7)[:COUNT] == first
    assert again.samples(task, 512, COUNT, seed=8) != first
    assert len({sample.references for sample in first}) == COUNT


def test_splits_differ_in_wording_and_in_what_is_hidden(generator, tokenizer, task):
    (test,), (tune,) = (generator.samples(task, 512, 1, split=split) for split in SPLITS)
    assert test.references != tune.references
    questions = [tokenizer.decode(sample.question) for sample in (test, tune)]
    words = [set(question.lower().split()) for question in questions]
    assert len(words[0] & words[1]) < 0.6 * min(map(len, words))


def test_a_context_too_short_for_its_needles_is_refused(generator):
    with pytest.raises(TaskError, match="task multi-value: a context of 64 tokens is too short"):
        generator.samples("multi-value", 64, 1)


def test_the_conversation_needs_a_chat_template_and_the_others_do_not(tokenizer, long_text):
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = None
    generator = Generator(plain, long_text, "manual")
    with pytest.raises(TaskError, match=r"conversation: .*no chat template"):
        generator.samples("conversation", 512, 1)
    (sample,) = generator.samples("passkey", 512, 1)
    assert len(sample.context) == 512


def test_a_text_without_sentences_is_refused(tokenizer):
    with pytest.raises(TaskError, match="numbers has no sentences"):
        Generator(tokenizer, "1 2 3", "numbers")


def test_frequent_words_are_more_frequent_than_all_others(generator, tokenizer):
    from collections import Counter

    for sample in generator.samples("frequent-words", 1088, COUNT):
        counts = Counter(tokenizer.decode(sample.context).split())
        wanted = [counts[word] for word in sample.references]
        others = [
            count for word, count in counts.items()
            if word not in sample.references and word != "...."
        ]  # fmt: skip
        assert min(wanted) > max(others)


def test_variables_stand_in_the_order_of_their_chain(generator):
    (sample,) = generator.samples("variable-tracking", 512, 1)
    assert sorted(sample.needles) == list(sample.needles)


# --- parts -----------------------------------------------------------------------------------


def sentences(width):
    token = 100
    while True:
        yield [token] * width
        token += 1


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0], ids=["start", "middle", "end"])
@pytest.mark.parametrize("length", [13, 14, 40])
def test_pieces_are_whole_and_stand_between_sentences(depth, length):
    context, (span,) = hide([1, 2], [(depth, [7, 8, 9])], sentences(4), length)
    start, stop = span
    assert len(context) == length
    assert context[start:stop] == [7, 8, 9]
    assert context[:2] == [1, 2]
    # a sentence that ends before the piece is whole
    assert (start - 2) % 4 == 0 or stop == length


def test_spans_come_in_the_order_of_the_pieces():
    context, spans = hide([], [(0.9, [7]), (0.1, [8]), (0.5, [9])], sentences(3), 60)
    assert [context[start] for start, _ in spans] == [7, 8, 9]
    assert spans[1] < spans[2] < spans[0]


def test_pieces_that_leave_no_room_for_filler_are_still_hidden():
    assert hide([1], [(0.3, [7, 8])], sentences(5), 3)[0] == [1, 7, 8]
    with pytest.raises(TaskError, match="3 are needed"):
        hide([1], [(0.3, [7, 8])], sentences(5), 2)


def test_recall_is_the_share_of_references_named_whatever_their_case():
    assert recall("It is ABC and 17.", ["abc", "17"]) == 1
    assert recall("It is ABC.", ["abc", "17"]) == 0.5
    assert recall("", ["x"]) == 0


def test_sentences_keep_their_quotes_and_scraps_drop_out():
    text = '"Where were you\n  all day?" he asked her again. Yes. 1.\n\nAnd so it went on and on.'
    assert split_sentences(text) == ['"Where were you all day?"', "And so it went on and on."]
