"""Startup compiles what sparse prefill will launch: nothing less, nothing more, once a setting."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import run_driver

from vllm_sparsek import compat
from vllm_sparsek.attention import warmup
from vllm_sparsek.config import SparseKConfig
from vllm_sparsek.kernels.common.budget import Budget

SCRIPT = Path(__file__).with_name("launch_keys.py")
SETTINGS = {
    "scorer": "knorm", "prefill": "sparse", "window": 128, "sinks": 4, "dense_until": 0, "k": 384,
    "refresh": 32,
}  # fmt: skip
CASES = {
    "hopper": ("hopper", {}),
    "large k": ("hopper", {"k": 1536, "refresh": 64}),
    "triton": ("triton", {"k": 1000, "refresh": 16}),
    "share": ("triton", {"k": 0.25}),
    "soft": ("triton", {"mode": "soft_v"}),
    "heads": ("fa3", {"heads": [300, 700]}),
    "fp8": ("fa3", {"fp8": True}),
    "pages": ("hopper", {"granularity": "page"}),
    "share of pages": ("triton", {"granularity": "page", "k": 0.1}),
}


@pytest.fixture(scope="module")
def keys():
    """Of every case, what serving and startup compile; see ``launch_keys``."""
    cases = []
    for engine, changes in CASES.values():
        settings = {**SETTINGS, **changes}
        heads, fp8 = settings.pop("heads", []), settings.pop("fp8", False)
        cases.append({"engine": engine, "settings": settings, "heads": heads, "fp8": fp8})
    found = run_driver(SCRIPT, json.dumps(cases), timeout=600)
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_serving_compiles_nothing_that_startup_did_not_and_startup_nothing_more(keys, case):
    kernels = {key.split()[0] for key in keys[case]["serving"]}
    assert len(kernels) >= 3
    assert keys[case]["missed"] == []
    assert keys[case]["vain"] == []


def make_impl(**changes):
    """What ``register`` looks at, in one layer."""
    attributes = {
        "config": SparseKConfig(scorer="knorm", prefill="sparse"),
        "vllm_config": SimpleNamespace(cache_config=SimpleNamespace(block_size=16)),
        "num_heads": 8, "num_kv_heads": 2, "head_size": 64, "kv_cache_dtype": "auto",
        "budget": lambda page: Budget(k=512, window=64, sinks=4, refresh=16),
    }  # fmt: skip
    return SimpleNamespace(**{**attributes, **changes})


def registered(impls, device="cuda"):
    """What vLLM's registry holds after these layers, as the runner collects it."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    registry = JitWarmupRegistry(None)
    with registry.activate():
        for impl in impls:
            warmup.register(impl, SimpleNamespace(), torch.float16, torch.device(device))
    return registry


def test_layers_with_equal_settings_are_warmed_once_and_others_by_themselves(monkeypatch):
    ran = []
    monkeypatch.setattr(warmup.PrefillWarmup, "run", lambda self: ran.append(self.impl))
    other = Budget(k=700, window=64, sinks=4, refresh=16)
    impls = [
        make_impl(), make_impl(), make_impl(budget=lambda page: other), make_impl(num_kv_heads=4),
        make_impl(kv_cache_dtype="fp8"), make_impl(kv_cache_dtype="fp8"),
    ]  # fmt: skip
    registry = registered(impls)
    assert ran == []
    monkeypatch.setattr("vllm.distributed.is_global_first_rank", lambda: False)
    registry.warmup()
    assert ran == [impls[0], *impls[2:5]]


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        ({"scorer": "knorm", "prefill": "sparse"}, "cpu"),
        ({"scorer": "knorm", "prefill": "dense"}, "cuda"),
        ({"scorer": "quest"}, "cuda"),
    ],
)
def test_nothing_is_warmed_where_no_prompt_is_read_sparsely_or_nothing_compiles(settings, device):
    assert len(registered([make_impl(config=SparseKConfig(**settings))], device)) == 0


def test_without_a_runner_that_collects_it_a_registration_does_nothing():
    warmup.register(make_impl(), SimpleNamespace(), torch.float16, torch.device("cuda"))


def test_a_warmup_that_fails_is_one_warning_and_not_the_end(monkeypatch):
    said = []
    monkeypatch.setattr(warmup.logger, "warning", lambda text, *args: said.append(text % args))
    impl = make_impl(fp8=False, max_model_len=1024)
    budget = impl.budget(16)
    # a layer without a cache
    call = warmup.PrefillWarmup(
        budget, 8, 2, 64, "auto", torch.float16, impl, SimpleNamespace(kv_cache=torch.tensor([]))
    )
    call()
    (text,) = said
    assert "the first long prompt will wait" in text
    assert "IndexError" in text


def test_a_model_whose_contexts_are_all_read_densely_has_no_kernels_to_compile(monkeypatch):
    launched = []
    impl = make_impl(
        fp8=False, max_model_len=512, _prefill=lambda *arguments: launched.append(arguments)
    )
    layer = SimpleNamespace(kv_cache=torch.zeros(1, 2, 16, 128))
    call = warmup.PrefillWarmup(
        impl.budget(16), 8, 2, 64, "auto", torch.float16, impl, layer
    )  # fmt: skip
    call.run()
    assert launched == []


def test_the_registry_takes_calls_as_its_keys():
    kernel = compat.warmup._warmups()
    assert kernel is compat.warmup._warmups()
    made = []

    def call():
        made.append(1)

    kernel.compile_many(kernel.get_warmup_keys(call))
    assert made == [1]
