"""Refinement: attention with gradients for scores, and what is trained with it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.kernels.prefill.reference import brute_force
from vllm_sparsek.training import refine, soft
from vllm_sparsek.training.capture import attention_hook, load_model
from vllm_sparsek.training.data import Text, Window, refinement_window
from vllm_sparsek.training.divergence import ANSWER_WEIGHT, STRIDE
from vllm_sparsek.training.operator import sparsek
from vllm_sparsek.training.refine import LogitsRefinement, Sampled, refine_outputs
from vllm_sparsek.training.soft import gates, soft_attention, soft_causal
from vllm_sparsek.training.solve import LayerScorer
from vllm_sparsek.training.sparse import sparse_attention

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
from tiny import write_model

BUDGET = Budget(k=12, window=9, sinks=3, refresh=8)
N, WIDTH = 96, 5


def attention(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [4, n, 16], key, value [2, n, 16] and scores [2, n] with gradients."""
    g = torch.Generator().manual_seed(n)
    key, value = torch.randn(2, 2, n, 16, generator=g)
    query, scores = torch.randn(4, n, 16, generator=g), torch.randn(2, n, generator=g)
    return query, key, value, scores.requires_grad_()


def new_scorer(heads: int, width: int, seed: int = 0) -> LayerScorer:
    """A scorer of features that are normal already, with scores near one another."""
    scorer = LayerScorer(torch.zeros(heads, width), torch.ones(heads, width), 0, 0)
    g = torch.Generator().manual_seed(seed)
    scorer.weight.data = torch.randn(heads, width, generator=g) * 0.1
    return scorer


@pytest.mark.parametrize("n", [20, 63])
def test_with_gradients_or_without_attention_is_what_serves(n, monkeypatch):
    query, key, value, scores = attention(n)
    expected = brute_force(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), scores.detach().T,
        BUDGET, 0.25,
    ).transpose(0, 1)  # fmt: skip
    for chunk in (soft.CHUNK, 17):
        monkeypatch.setattr(soft, "CHUNK", chunk)
        out = soft_causal(query, key, value, scores, BUDGET, 0.25)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_some_queries_get_what_all_of_them_get():
    query, key, value, scores = attention(130)
    at = torch.tensor([1, 30, 31, 64, 101, 129])
    found = soft_attention(query[:, at], at, key, value, scores, BUDGET, 0.25)
    expected = sparse_attention(query, key, value, scores.detach(), BUDGET, 0.25)[:, at]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gates_have_the_gradient_of_the_operator_over_what_has_left_the_window():
    n, at = 130, torch.tensor([40, 77, 129])
    scores = attention(n)[3].detach().double().requires_grad_()
    weight = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(1)).double()
    (found,) = torch.autograd.grad((gates(scores, at, BUDGET) * weight).sum(), scores)
    total = scores.new_zeros(())
    for row, position in enumerate(at.tolist()):
        start = position // BUDGET.refresh * BUDGET.refresh
        competing = slice(BUDGET.sinks, start - BUDGET.window + 1)
        total = total + (sparsek(scores[:, competing], BUDGET.k) * weight[:, row, competing]).sum()
    (expected,) = torch.autograd.grad(total, scores)
    assert (expected != 0).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_where_the_selection_is_certain_soft_gates_are_hard_and_pass_nothing_on():
    n = 130
    scores = (attention(n)[3].argsort(-1).argsort(-1) * 2.0).requires_grad_()
    at = torch.arange(n)
    found = gates(scores, at, BUDGET)
    for position in (50, 129):
        start = position // BUDGET.refresh * BUDGET.refresh
        competing = slice(BUDGET.sinks, start - BUDGET.window + 1)
        expected = sparsek(scores[:, competing], BUDGET.k)
        assert torch.equal(found[:, position, competing], expected)
    found.pow(2).sum().backward()
    assert (scores.grad == 0).all()


def test_what_comes_after_a_query_changes_neither_its_output_nor_its_gradient():
    at = torch.arange(100)
    found = []
    for tail in (0.0, 5.0):
        query, key, value, scores = (t.detach().clone() for t in attention(130))
        for t in (key, value, scores[..., None]):
            t[:, 100:] += tail
        scores.requires_grad_()
        out = soft_attention(query[:, at], at, key, value, scores, BUDGET, 0.25)
        out.pow(2).sum().backward()
        found.append((out.detach(), scores.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][1] != 0).any()


def sampled(windows: int) -> tuple[torch.Tensor, list[Sampled]]:
    """Features [2, W, N, WIDTH] and attention whose keys follow from the first of them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, windows, N, WIDTH, generator=g)
    at = torch.arange(0, N, 2)
    found = []
    for w in range(windows):
        query = torch.ones(4, N, 16)
        key, value = torch.randn(2, 2, N, 16, generator=g)
        key = key / 8 + x[:, w, :, :1] / 4
        everything = Budget(k=N, window=N, sinks=0, refresh=8)
        output = soft_causal(query, key, value, torch.zeros(2, N), everything, 1.0)
        asks = at > N - 8 if w % 2 else torch.zeros(len(at), dtype=torch.bool)
        found.append(Sampled(query[:, at], at, output[:, at], asks, key, value))
    return x, found


def test_output_reconstruction_finds_what_the_output_depends_on():
    x, windows = sampled(4)
    scorer = new_scorer(2, WIDTH)
    before = {name: t.clone() for name, t in scorer.state_dict().items()}
    project = torch.nn.Linear(64, 24, bias=False).requires_grad_(False)
    small = Budget(k=6, window=5, sinks=1, refresh=8)
    losses = refine_outputs(scorer, x, windows, project, [BUDGET, small], 1.0, 120, 0)
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    # the first feature is what keys follow from
    assert (scorer.weight[:, 0] > before["weight"][:, 0]).all()
    assert torch.equal(scorer.mean, before["mean"])
    assert project.weight.grad is None
    again = new_scorer(2, WIDTH)
    assert refine_outputs(again, x, windows, project, [BUDGET, small], 1.0, 120, 0) == losses


def test_budgets_that_leave_nothing_to_choose_are_left_out():
    x, windows = sampled(1)
    scorer = new_scorer(2, WIDTH)
    useless = [Budget(k=N, window=5, sinks=1, refresh=8), Budget(k=0, window=5, sinks=1, refresh=8)]
    assert refine_outputs(scorer, x, windows, torch.nn.Identity(), useless, 1.0, 5, 0) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("tiny"), num_hidden_layers=3)
    return load_model(folder, torch.device("cpu"), torch.float32)


def window(seed: int) -> Window:
    ids = torch.randint(3, 500, (N,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Window("random", ids, [(90, 94)] if seed % 2 else [])


def features(key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    assert hidden is None
    return torch.cat([key, value], -1)


def training(model, steps: int, layers: tuple[int, ...] = (0, 1, 2)) -> LogitsRefinement:
    scorers = {layer: new_scorer(2, 128, layer) for layer in layers}
    return LogitsRefinement(model, scorers, features, False, [BUDGET], steps)


def test_the_loss_is_the_divergence_of_sparse_logits_and_falls(model):
    run = training(model, 30, layers=(1, 2))
    start = window(1)

    def only(layer, query, key, value, scale):
        if layer == 0:
            return None
        scorer = new_scorer(2, 128, layer)
        scores = scorer(features(key, value, None)[:, None])[:, 0].detach()
        return sparse_attention(query, key, value, scores, BUDGET, scale)

    with torch.no_grad():
        ids = torch.tensor(start.ids)[None]
        dense = model(input_ids=ids).logits[0].log_softmax(-1)
        with attention_hook(only):
            sparse = model(input_ids=ids).logits[0].log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    first = BUDGET.first_sparse_position(N)
    expected = kl[first::STRIDE].mean() + ANSWER_WEIGHT * kl[90:94].mean()
    for _ in range(30):
        run.step(start)
    assert run.losses[0] == pytest.approx(expected.item(), rel=1e-3)
    assert sum(run.losses[-5:]) < 0.8 * sum(run.losses[:5])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layers_that_run_again_give_the_gradient_of_layers_that_do_not(model, monkeypatch):
    found = []
    for recomputed in (True, False):
        if not recomputed:
            monkeypatch.setattr(refine, "layers_recomputed", lambda model: nullcontext())
        run = training(model, 1)
        run._backward(window(1))
        found.append([parameter.grad for parameter in run.parameters])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert all((scorer.weight.grad != 0).any() for scorer in run.scorers.values())
    assert all("forward" not in vars(layer) for layer in model.get_decoder().layers)


def test_a_refinement_goes_on_as_if_it_had_not_been_interrupted(model):
    whole, part = training(model, 6), training(model, 6)
    for step in range(6):
        whole.step(window(step))
    for step in range(3):
        part.step(window(step))
    rest = training(model, 6)
    rest.load({name: t.clone() for name, t in part.state().items()}, part.losses)
    for step in range(3, 6):
        rest.step(window(step))
    assert rest.losses == whole.losses
    for one, other in zip(whole.parameters, rest.parameters, strict=True):
        assert torch.equal(one, other)


def test_refinement_reads_text_and_questions_by_turns(model_dir, long_text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [Text("a", long_text), Text("b", long_text[::-1])]
    windows = [refinement_window(tokenizer, texts, 512, 0, step) for step in range(4)]
    assert [bool(w.answers) for w in windows] == [False, True, False, True]
    assert [w.name.split()[-1] for w in windows] == ["a", "a", "b", "b"]
    assert all(len(w.ids) == 512 for w in windows)
    assert windows[1] == refinement_window(tokenizer, texts, 512, 0, 1)
    assert windows[1] != refinement_window(tokenizer, texts, 512, 1, 1)
