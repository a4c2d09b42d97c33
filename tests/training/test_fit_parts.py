"""Data, objective, solver and budget split of a fit, each by itself."""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

from vllm_sparsek.kernels.common.budget import Budget
from vllm_sparsek.scorers.learned import LearnedScorer
from vllm_sparsek.training.budgets import (
    LEAST_SHARE,
    MOST_SHARE,
    PARTS,
    POINTS,
    STEPS,
    allocate,
    allocate_measured,
    convex,
    curve,
    measure_damage,
    measure_splits,
)
from vllm_sparsek.training.capture import attention_hook, load_model
from vllm_sparsek.training.data import (
    DataError,
    Text,
    Window,
    probe_windows,
    read_texts,
    training_windows,
)
from vllm_sparsek.training.divergence import ANSWER_WEIGHT, STRIDE
from vllm_sparsek.training.objective import Split, Targets, competitions, dropped, kept_share
from vllm_sparsek.training.retrieval import FAMILIES, retrieval_window
from vllm_sparsek.training.solve import SolveSettings, fit_layer, normalised
from vllm_sparsek.training.sparse import sparse_attention
from vllm_sparsek.training.store import Store

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))
from tiny import write_model

SPLIT = Split(window=8, sinks=2)
HEADS, WINDOWS, N, SEGMENT = 2, 4, 256, 32


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def planted(width: int = 6, seed: int = 0) -> tuple[torch.Tensor, Targets, torch.Tensor]:
    """Features, and attention that a linear function of them governs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(HEADS, WINDOWS, N, width, generator=g) * 3 + 1
    weight = torch.randn(HEADS, width, generator=g)
    truth = torch.einsum("hwnf,hf->hwn", x, weight)
    mass = torch.zeros(WINDOWS, N // SEGMENT, HEADS, N)
    for s in range(1, N // SEGMENT):
        mass[:, s, :, : s * SEGMENT] = truth[..., : s * SEGMENT].softmax(-1).transpose(0, 1)
    return x, Targets(mass, torch.zeros(WINDOWS, HEADS, N), SEGMENT), truth


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_retrieval_window_has_its_length_and_every_answer_twice(tokenizer, long_text, chat):
    made = retrieval_window(tokenizer, long_text, 1500, 7, facts=6, chat=chat)
    assert len(made.ids) == 1500
    assert len(made.answer_queries) == 6
    body = tokenizer.decode(made.ids[: made.answer_queries[0][0] - 20])
    for first, end in made.answer_queries:
        answer = tokenizer.decode(made.ids[first + 1 : end + 1]).strip()
        assert answer
        assert answer.split(",")[0] in body, "the fact stands in the text before the questions"


def test_retrieval_windows_follow_from_their_seed(tokenizer, long_text):
    one, same, other = (retrieval_window(tokenizer, long_text, 900, s, 4) for s in (1, 1, 2))
    assert one == same
    assert one.ids != other.ids


def test_too_many_facts_are_refused(tokenizer, long_text):
    with pytest.raises(ValueError, match="do not fit into 400 tokens"):
        retrieval_window(tokenizer, long_text, 400, 0, facts=40)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.strip("_"))
def test_a_fact_states_its_answer(family):
    fact = family(random.Random(3))
    assert fact.answer.split(",")[0] in fact.statement
    assert fact.answer not in fact.question


def test_windows_come_from_all_texts_and_40_percent_ask(tokenizer, long_text):
    texts = [Text("a", long_text), Text("b", long_text[::-1])]
    windows = training_windows(tokenizer, texts, 512, 10, 0)
    assert [len(w.ids) for w in windows] == [512] * 10
    assert sum(bool(w.answers) for w in windows) == 4
    assert {w.name for w in windows} >= {"text a", "text b", "chat over b", "questions over a"}
    assert windows == training_windows(tokenizer, texts, 512, 10, 0)


def test_unusable_texts_are_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.txt: no such file"):
        read_texts([tmp_path / "nowhere.txt"])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary.txt: not UTF-8"):
        read_texts([tmp_path / "binary.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text in it"):
        read_texts([tmp_path / "empty"])
    with pytest.raises(DataError, match=r"short: .* shorter than one window of 512"):
        training_windows(tokenizer, [Text("short", "a few words")], 512, 4, 0)


def test_hard_scores_drop_exactly_what_top_k_leaves():
    _, targets, truth = planted()
    # far apart, the operator's gates are 0 or 1: its loss is that of top-k
    scores = truth.argsort(-1).argsort(-1).float() * 10
    loss, count = 0.0, 0
    for c in competitions(N // SEGMENT, SEGMENT, (0.25,), SPLIT):
        z = scores[..., c.first : c.end]
        out = z < z.topk(c.k, -1).values[..., -1:]
        paid = targets.mass[:, c.segment, :, c.first : c.end].transpose(0, 1)
        loss, count = loss + (out * paid).sum(-1).mean().item(), count + 1
    assert count > 2
    assert dropped(scores, targets, (0.25,), SPLIT).item() == pytest.approx(loss / count, abs=1e-5)


def test_competitions_keep_the_budget():
    for c in competitions(8, 1024, (0.12, 0.25, 0.5), Split()):
        context = c.segment * 1024 + 512
        window = c.segment * 1024 - c.end
        assert c.k + window + c.first == int(c.share * context)
        assert 1 <= c.k < c.end - c.first


def test_recall_is_one_for_the_truth_of_a_peaked_attention_and_low_for_its_opposite():
    _, targets, truth = planted()
    best, _ = kept_share(truth, targets, 0.5, SPLIT)
    worst, _ = kept_share(-truth, targets, 0.5, SPLIT)
    assert best > 0.95
    assert worst < 0.1


def test_the_closed_form_finds_a_planted_scorer_and_steps_do_not_lose_it():
    x, targets, truth = planted()
    best, _ = kept_share(truth, targets, 0.25, SPLIT)
    for steps in (0, 20):
        settings = SolveSettings(shares=(0.25,), split=SPLIT, steps=steps)
        scorer, losses = fit_layer(x, targets, 8, settings)
        found, _ = kept_share(scorer(normalised(x)[0]).detach(), targets, 0.25, SPLIT)
        assert found > 0.97 * best
        assert len(losses) == steps


def test_steps_lower_the_loss_where_the_closed_form_cannot_fit():
    x, targets, _ = planted()
    # what counts is not linear in the features
    x = x.clone()
    x[..., 0] = x[..., 0].abs()
    settings = SolveSettings(shares=(0.25,), split=SPLIT, steps=60)
    _, losses = fit_layer(x, targets, 8, settings)
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("hidden_units", [0, 5], ids=["linear", "mlp"])
def test_the_files_tensors_score_like_the_fitted_scorer(hidden_units):
    g = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, N, HEADS, 3, generator=g) * 2 + 1
    x = torch.cat([key, value], -1).transpose(0, 1)[:, None].expand(-1, WINDOWS, -1, -1)
    _, targets, _ = planted()
    settings = SolveSettings((0.25,), SPLIT, hidden_units=hidden_units, steps=3)
    scorer, _ = fit_layer(x, targets, 8, settings)
    t = scorer.tensors()
    if hidden_units:
        served = LearnedScorer(t["w2"], t["b2"], t["w1"].double(), t["b1"].double(),
                               slope=t["slope"])  # fmt: skip
    else:
        served = LearnedScorer(t["weight"], t["bias"], slope=t["slope"])
    expected = scorer(normalised(x)[0])[:, 0].T
    found = served.score(key, value, torch.arange(N))
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)


def test_a_fit_follows_from_its_seed():
    x, targets, _ = planted()
    settings = SolveSettings((0.25,), SPLIT, hidden_units=4, steps=5, seed=3)
    (one, _), (same, _) = (fit_layer(x, targets, 8, settings) for _ in range(2))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, same.tensors()[name]), name


def test_a_curve_falls_from_everything_to_what_most_places_leave():
    _, targets, truth = planted()
    found = curve(truth, targets, 0.25, SPLIT)
    assert found.shape == (HEADS, POINTS)
    assert (found.diff() <= 1e-6).all()
    even = POINTS // int(MOST_SHARE)
    for head in range(HEADS):
        own = Targets(targets.mass[:, :, head : head + 1], targets.answers[:, head : head + 1],
                      SEGMENT)  # fmt: skip
        recall, _ = kept_share(truth[head : head + 1], own, 0.25, SPLIT)
        left = found[head, even] / found[head, 0]
        assert left.item() == pytest.approx(1 - recall.item(), abs=0.02)


def test_budgets_keep_their_total_and_go_where_damage_is():
    shape = 1 / torch.arange(1, POINTS + 1).double()
    given = allocate(shape.repeat(4, 2, 1), torch.tensor([1.0, 1.0, 1.0, 20.0]))
    assert given.shape == (4, 2)
    assert given.mean() == pytest.approx(1)
    assert (given[3] == given.max()).all()
    assert given.max() > 1.5
    assert given.min() >= LEAST_SHARE
    even = allocate(shape.repeat(4, 2, 1), torch.ones(4))
    assert (even - 1).abs().max() <= 0.05


def test_a_head_that_drops_more_gets_more_of_its_layer():
    shape = 1 / torch.arange(1, POINTS + 1).double()
    dropped = torch.stack([torch.stack([shape, 5 * shape, 0 * shape]), torch.stack([shape] * 3)])
    given = allocate(dropped, torch.ones(2))
    assert given.mean() == pytest.approx(1)
    assert given[0, 1] > given[0, 0] > given[0, 2] == LEAST_SHARE
    assert given.max() <= MOST_SHARE
    # no other split of the total does less harm: a step less here and one more there
    at = torch.linspace(0, MOST_SHARE, POINTS, dtype=torch.float64)
    step = 1 / STEPS

    def harm(shares):
        right = torch.searchsorted(at, shares).clamp(1, POINTS - 1)
        weight = (shares - at[right - 1]) / (at[right] - at[right - 1])
        low, high = (dropped.gather(-1, i[..., None])[..., 0] for i in (right - 1, right))
        per_layer = dropped[..., POINTS // int(MOST_SHARE)].sum(1)
        return ((low * (1 - weight) + high * weight).sum(1) / per_layer).sum().item()

    best = harm(given.double())
    for giver, taker in itertools.permutations(range(6), 2):
        other = given.double().flatten().clone()
        other[giver] -= step
        other[taker] += step
        if other[giver] >= LEAST_SHARE and other[taker] <= MOST_SHARE:
            assert harm(other.view(2, 3)) >= best - 1e-12


def test_damage_is_the_divergence_of_running_with_one_sparse_layer(tmp_path):
    folder = write_model(tmp_path / "model", num_hidden_layers=3)
    model = load_model(folder, torch.device("cpu"), torch.float32)
    ids = torch.randint(3, 500, (200,), generator=torch.Generator().manual_seed(0))
    window = Window("probe", ids.tolist(), [(180, 184)])
    budget = Budget(k=16, window=8, sinks=2, refresh=8)

    def score(layer, key, value, hidden):
        return key.norm(dim=-1)

    ticks = []
    damage = measure_damage(
        model, [window], score, False, [0, 1, 2], [budget], False, lambda: ticks.append(1)
    )
    assert damage.shape == (3, 1, 1)
    damage = damage[:, 0, 0]
    assert len(ticks) == 3

    def logits(sparse_layer):
        def only(layer, query, key, value, scale):
            if layer != sparse_layer:
                return None
            return sparse_attention(query, key, value, key.norm(dim=-1), budget, scale)

        with attention_hook(only), torch.inference_mode():
            return model(input_ids=ids[None]).logits[0].log_softmax(-1)

    dense = logits(None)
    first = budget.first_sparse_position(200)
    for layer in range(3):
        kl = (dense.exp() * (dense - logits(layer))).sum(-1)
        expected = kl[first::STRIDE].mean() + ANSWER_WEIGHT * kl[180:184].mean()
        assert damage[layer] == pytest.approx(expected.item(), rel=1e-3, abs=1e-7)
        assert damage[layer] > 0


def test_a_store_goes_on_with_the_same_settings_only(tmp_path):
    store = Store(tmp_path / "work", {"seed": 1, "shares": (0.1, 0.2)})
    assert not store.resumed
    store.write("a", {"x.y": torch.ones(2), "z": torch.zeros(1)}, {"loss": 0.5})
    again = Store(tmp_path / "work", {"seed": 1, "shares": (0.1, 0.2)})
    assert again.resumed
    assert again.has("a")
    assert list(again.read("a", "x.")) == ["y"]
    assert again.record("a") == {"loss": 0.5}
    other = Store(tmp_path / "work", {"seed": 2})
    assert not other.resumed
    assert not other.has("a")
    other.remove()
    assert not (tmp_path / "work").exists()


def test_a_full_disk_leaves_the_finished_steps(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from vllm_sparsek.training import store as module

    store = Store(tmp_path / "work", {})
    store.write("a", {"x": torch.ones(2)})

    def full(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match=r"b.safetensors cannot be written: No space left"):
        store.write("b", {"x": torch.ones(2)})
    assert not store.has("b")
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "a.safetensors", "settings.json",
    ]  # fmt: skip


def test_one_window_to_measure_on_reads_all_texts_and_asks(tokenizer, long_text):
    marked = [Text("a", "alpha words here\n" * 3000), Text("b", "beta words there\n" * 3000)]
    (window,) = probe_windows(tokenizer, marked, 1024, 1, 5)
    body = tokenizer.decode(window.ids)
    assert len(window.ids) == 1024
    assert window.answers
    assert body.count("alpha") > 20
    assert body.count("beta") > 20
    assert [window] == probe_windows(tokenizer, marked, 1024, 1, 5)
    several = probe_windows(tokenizer, [Text("a", long_text), Text("b", long_text)], 512, 4, 5)
    assert [w.name for w in several] == [
        "text a", "questions over a", "text b", "chat over b",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def three_layers(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=3)
    model = load_model(folder, torch.device("cpu"), torch.float32)
    ids = torch.randint(3, 500, (200,), generator=torch.Generator().manual_seed(0))
    return model, Window("probe", ids.tolist(), [(180, 184)])


def by_norm(layer, key, value, hidden):
    return key.norm(dim=-1)


def test_the_damage_of_a_head_falls_with_its_budget_and_all_heads_make_the_layers(three_layers):
    model, window = three_layers
    budgets = [Budget(k=k, window=8, sinks=2, refresh=8) for k in (4, 16, 64, 200)]
    found = measure_damage(
        model, [window, window], by_norm, False, [0, 2], budgets, True, lambda: None
    )
    heads = model.config.num_key_value_heads
    assert found.shape == (2, heads, 4)
    assert (found[..., 0] > found[..., 2]).all()
    assert found[..., 3].max() < 1e-6, "nothing is dropped"
    # one head with the rest dense is a split that gives the rest everything
    split = [(16, None)] + [(200, None)] * (heads - 1)
    one_head = {0: budgets[1].with_heads(split)}
    assert measure_splits(model, [window], by_norm, False, [[one_head]], lambda: None)[0][
        0
    ] == pytest.approx(damage_of(model, window, one_head), rel=1e-3, abs=1e-7)


def damage_of(model, window, budgets):
    """By the definition, over every head's attention."""

    def attend(layer, query, key, value, scale):
        if layer not in budgets:
            return None
        group = query.shape[0] // key.shape[0]
        parts = [
            sparse_attention(query[h * group : (h + 1) * group], key[h : h + 1], value[h : h + 1],
                             key[h : h + 1].norm(dim=-1), Budget(k, 8, 2, 8), scale)
            for h, (k, _) in enumerate(budgets[layer].heads)
        ]  # fmt: skip
        return torch.cat(parts)

    def logits():
        return model(input_ids=torch.tensor(window.ids)[None]).logits[0].log_softmax(-1)

    with torch.inference_mode():
        dense = logits()
        with attention_hook(attend):
            kl = (dense.exp() * (dense - logits())).sum(-1)
    least = min(k for heads in budgets.values() for k, _ in heads.heads)
    first = Budget(least, 8, 2, 8).first_sparse_position(200)
    return (kl[first::STRIDE].mean() + ANSWER_WEIGHT * kl[180:184].mean()).item()


def test_budgets_by_layer_are_the_same_for_all_its_heads():
    shape = 1 / torch.arange(1, POINTS + 1).double()
    dropped = torch.stack([torch.stack([shape, 5 * shape])] * 3)
    given = allocate(dropped, torch.tensor([1.0, 2.0, 20.0]), by_head=False)
    assert (given[:, 0] == given[:, 1]).all()
    assert given.mean() == pytest.approx(1)
    assert given[2, 0] > given[1, 0] > given[0, 0] >= LEAST_SHARE


def test_a_convex_curve_lies_below_and_keeps_what_is_convex():
    curves = torch.tensor([[8.0, 8.0, 2.0, 2.0, 0.0], [9.0, 4.0, 1.0, 0.0, 0.0]]).double()
    found = convex(curves)
    assert (found <= curves + 1e-12).all()
    assert (found.diff(n=2) >= -1e-9).all()
    assert torch.equal(found[1], curves[1])
    assert found[0].tolist() == pytest.approx([8, 5, 2, 1, 0])


def test_measured_heads_get_what_their_damage_asks_for():
    parts = torch.tensor(PARTS)
    even = (1e-3 / parts).repeat(3, 2, 1)
    given = allocate_measured(even, PARTS, 5.0, [1.0, 0.5], 4.0)
    assert (given - 1).abs().max() <= 0.05
    even[1, 1] *= 9
    even[2, 0] *= 0
    given = allocate_measured(even, PARTS, 5.0, [1.0, 0.5], 4.0)
    assert given.mean() == pytest.approx(1)
    assert given[1, 1] == given.max() > 1.8
    assert given[2, 0] == given.min() == 0.25
    wide = allocate_measured(even, PARTS, 5.0, [1.0, 0.5], 8.0)
    assert wide[2, 0] == 0.125
