"""What is captured of a model's attention is what dense attention does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.prefill.reference import brute_force
from vllm_sparsek.training.capture import Capture, CaptureSettings, attention_hook, load_model
from vllm_sparsek.training.sparse import sparse_attention

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
from tiny import write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("tiny"))
    return load_model(folder, CPU, torch.float32)


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 500, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_mass_is_the_mean_attention_of_a_segments_queries_to_far_tokens(model):
    n, how = 96, CaptureSettings(segment=32, stride=4, gap=8)
    queries = {}

    def keep(layer, query, key, value, scale):
        queries[layer] = query.clone(), scale

    with attention_hook(keep):
        found = Capture(model, how).run(ids(n), [])
    assert sorted(found) == [0, 1]
    view, (query, scale) = found[1], queries[1]
    for s in range(3):
        for head in range(2):
            expected = torch.zeros(n)
            at = range(s * 32, (s + 1) * 32, 4)
            for i in at:
                for q_head in (2 * head, 2 * head + 1):
                    p = torch.softmax(view.key[head, : i + 1] @ query[q_head, i] * scale, 0)
                    far = p[: max(0, i - how.gap + 1)]
                    expected[: len(far)] += far / (2 * len(at))
            torch.testing.assert_close(view.mass[s, head], expected, atol=1e-5, rtol=1e-4)


def test_answers_hold_the_highest_attention_that_any_answer_pays(model):
    n, how = 96, CaptureSettings(segment=32, stride=4, gap=8)
    one = Capture(model, how).run(ids(n), [(80, 83)])[0].answers
    other = Capture(model, how).run(ids(n), [(90, 92)])[0].answers
    both = Capture(model, how).run(ids(n), [(80, 83), (90, 92)])[0].answers
    assert one.max() > 0
    torch.testing.assert_close(both, torch.maximum(one, other))
    assert (one[:, 80:] == 0).all(), "answers pay nothing to what comes later or is too near"


def test_sampled_queries_are_every_so_many_th_and_those_of_answers(model):
    n, how = 96, CaptureSettings(segment=32, stride=4, gap=8, queries=20)
    whole = {}

    def keep(layer, query, key, value, scale):
        whole[layer] = query.clone(), key.clone(), value.clone(), scale

    with attention_hook(keep):
        view = Capture(model, how).run(ids(n), [(59, 63)])[1]
    assert view.at.tolist() == [0, 20, 40, 59, 60, 61, 62, 80]
    query, key, value, scale = whole[1]
    assert torch.equal(view.query, query[:, view.at])
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0), is_causal=True,
        scale=scale,
    )  # fmt: skip
    torch.testing.assert_close(view.output, dense[:, view.at], atol=1e-5, rtol=1e-4)


def test_capturing_changes_nothing_that_the_model_computes(model):
    tokens = torch.tensor(ids(64))[None]
    plain = model(input_ids=tokens).logits
    with attention_hook(lambda *_: None):
        torch.testing.assert_close(model(input_ids=tokens).logits, plain)


def test_hidden_states_are_the_inputs_of_the_attention_layers(model):
    view = Capture(model, CaptureSettings(segment=32, stride=4, gap=8, hidden=True)).run(
        ids(40), []
    )
    states = model(input_ids=torch.tensor(ids(40))[None], output_hidden_states=True).hidden_states
    expected = model.model.layers[1].input_layernorm(states[1][0])
    torch.testing.assert_close(view[1].hidden, expected)


def test_layers_with_a_sliding_window_are_left_out(tmp_path):
    folder = write_model(tmp_path / "model", "mistral", sliding_window=16)
    sliding = load_model(folder, CPU, torch.float32)
    assert Capture(sliding, CaptureSettings(segment=32, stride=4, gap=8)).run(ids(64), []) == {}
    from transformers import AutoModelForCausalLM

    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.tensor(ids(64))[None]
    torch.testing.assert_close(sliding(input_ids=tokens).logits, eager(input_ids=tokens).logits,
                               atol=1e-4, rtol=1e-3)  # fmt: skip


@pytest.mark.parametrize("n", [20, 63, 130])
def test_sparse_attention_is_the_definition(n):
    g = torch.Generator().manual_seed(n)
    query = torch.randn(4, n, 16, generator=g)
    key, value = torch.randn(2, 2, n, 16, generator=g)
    scores = torch.randn(2, n, generator=g)
    budget = Budget(k=12, window=9, sinks=3, refresh=8)
    out = sparse_attention(query, key, value, scores, budget, 0.25)
    expected = brute_force(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), scores.T, budget, 0.25
    )
    torch.testing.assert_close(out.transpose(0, 1), expected, atol=1e-5, rtol=1e-4)
