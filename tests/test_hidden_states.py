"""Hidden states on their way from a projection to the scorer, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vllm_sparsek import compat
from vllm_sparsek.attention import support
from vllm_sparsek.attention.hidden import keep_input

SIZE, TOKENS = 8, 10


class Layer(nn.Module):
    """A layer that changes its input before it projects it; ``tuple`` as vLLM's layers do."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(SIZE, 12)
        self.as_tuple = as_tuple
        if as_tuple:
            self.qkv_proj.register_forward_hook(lambda module, inputs, output: (output, None))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = self.qkv_proj(2 * x + 1)
        return (projected[0] if self.as_tuple else projected).relu().sum(-1)


def kept(projection):
    return keep_input(projection, TOKENS, SIZE, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize("as_tuple", [False, True], ids=["tensor", "tuple"])
def test_a_projection_keeps_its_input_and_changes_nothing_else(as_tuple, backend):
    layer = Layer(as_tuple)
    x = torch.randn(5, SIZE)
    run = layer
    with torch.no_grad():
        expected = layer(x)
        states = kept(layer.qkv_proj)
        states.rows.fill_(-7.0)
        if backend is not None:
            run = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
        torch.testing.assert_close(run(x), expected)
        torch.testing.assert_close(states.rows[:5], 2 * x + 1)
        assert (states.rows[5:] == -7.0).all()
        # another number of tokens
        run(x[:3] - 1)
        torch.testing.assert_close(states.rows[:3], 2 * x[:3] - 1)


def test_layers_share_one_buffer():
    a, b = nn.Linear(SIZE, 4), nn.Linear(SIZE, 4)
    first, second = kept(a), kept(b)
    assert first is second
    a(torch.ones(2, SIZE))
    assert (first.rows[:2] == 1).all()
    b(torch.zeros(2, SIZE))
    assert (first.rows[:2] == 0).all()


def test_hidden_states_that_do_not_arrive_are_an_error_that_names_the_layer():
    projection = nn.Linear(SIZE, 4)
    states = kept(projection)
    states.kept = False
    projection(torch.ones(1, SIZE))
    states.require_kept("model.layers.3.attn")
    with pytest.raises(RuntimeError, match=r"model\.layers\.3\.attn.*DISABLE_COMPILE_CACHE"):
        states.require_kept("model.layers.3.attn")


def attention(impl):
    found = nn.Module()
    found.impl = impl
    return found


@pytest.mark.parametrize("name", ["q_proj", "kv_proj"])
def test_the_projection_is_found_beside_the_attention_layer(name):
    impl = object()
    watch = compat.ParentWatch(impl)
    around = nn.Module()
    around.add_module(name, nn.Linear(SIZE, 4))
    around.other = attention(object())
    assert watch.parent is None
    around.attn = attention(impl)
    assert watch.stop() is around
    found = compat.query_projection(around)
    assert found is (around.q_proj if name == "q_proj" else None)
    # nothing is watched any more
    nn.Module().attn = attention(impl)
    assert watch.parent is around


def test_a_model_without_such_a_projection_is_refused_naming_the_layer():
    with pytest.raises(support.UnsupportedError, match=r"model\.layers\.0\.attn.*qkv_proj"):
        support.refuse_without_projection("model.layers.0.attn")


def test_lora_is_refused_with_a_scorer_of_hidden_states():
    support.refuse_unsupported_with_hidden(SimpleNamespace(lora_config=None))
    with pytest.raises(support.UnsupportedError, match=r"LoRA.*drop --enable-lora"):
        support.refuse_unsupported_with_hidden(SimpleNamespace(lora_config=object()))


def test_graphs_compiled_for_another_kind_of_scorer_are_not_used():
    given = {"sparsek": {"k": 5}}
    config = SimpleNamespace(additional_config=given)
    compat.mark_compiled_graphs(config, "hidden")
    assert config.additional_config == {**given, "sparsek_graph": "hidden"}
    assert given == {"sparsek": {"k": 5}}
