"""What is not supported is one clear error: it names the feature and the remedy, before weights
load."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from processes import engine_env, engine_flags
from tiny import random_prompts, run_many, tiny_llm, write_model
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_sparsek import compat
from vllm_sparsek.attention.support import (
    FP8_CACHES,
    HEAD_SIZES,
    UnsupportedError,
    refuse_unsupported_impl,
    refuse_unsupported_layer,
)

WITHOUT = "serve without --attention-backend sparsek"

# --- one by one ------------------------------------------------------------------------------


def layer(**changes):
    """What vLLM's selector says about a layer that is supported."""
    values = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16}
    return AttentionSelectorConfig(**{**values, **changes})


LAYERS = {
    "MLA": ({"use_mla": True}, "MLA", WITHOUT),
    "cross attention": ({"attn_type": AttentionType.ENCODER_DECODER}, "cross attention", WITHOUT),
    "encoder": ({"attn_type": AttentionType.ENCODER}, "encoder attention", WITHOUT),
    "encoder only": ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder attention", WITHOUT),
    "all layers slide": (
        {"has_sliding_window": True}, "every layer has a sliding window",
        "--disable-sliding-window",
    ),
    "sinks": ({"has_sink": True}, "attention sinks", WITHOUT),
    "image prefixes": ({"use_mm_prefix": True}, "image prefixes", WITHOUT),
    "non-causal": ({"use_non_causal": True}, "non-causal", WITHOUT),
    "reference windows": ({"use_rswa": True}, "reference sliding windows", WITHOUT),
    "fp8_e5m2 cache": ({"kv_cache_dtype": "fp8_e5m2"}, "fp8_e5m2", "--kv-cache-dtype fp8"),
    "scales per token": (
        {"kv_cache_dtype": "fp8_per_token_head"}, "fp8_per_token_head KV", "--kv-cache-dtype fp8",
    ),
    "nvfp4 cache": ({"kv_cache_dtype": "nvfp4"}, "nvfp4 KV cache", "--kv-cache-dtype fp8"),
    "KV connector": ({"use_kv_connector": True}, "KV connectors", "--kv-transfer-config"),
    "prefill context parallelism": ({"use_pcp": True}, "context parallelism", "to 1"),
    "decode context parallelism": ({"use_dcp": True}, "context parallelism", "to 1"),
    "batch invariance": ({"use_batch_invariant": True}, "VLLM_BATCH_INVARIANT", "unset it"),
    "head size": ({"head_size": 48}, "head_dim 48", "64, 80, 96, 128, 256"),
    "block size": ({"block_size": 24}, "--block-size 24", "multiple of 16"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "feature", "remedy"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_is_refused_with_feature_and_remedy(changes, feature, remedy, device):
    with pytest.raises(UnsupportedError) as error:
        refuse_unsupported_layer(layer(**changes), device)
    assert str(error.value).startswith("sparsek attention does not support ")
    assert feature in str(error.value)
    assert remedy in str(error.value)


def test_float32_is_refused_on_cuda_alone():
    with pytest.raises(UnsupportedError, match=r"float32 on CUDA.*--dtype bfloat16"):
        refuse_unsupported_layer(layer(dtype=torch.float32), "cuda")
    refuse_unsupported_layer(layer(dtype=torch.float32), "cpu")


FP8_REFUSALS = {
    "cpu": ("cpu", True, {}, "KV cache on the CPU"),
    "another GPU": ("cuda", False, {}, "on this GPU.*compute capability 9.0 and 10.x"),
    "per head": ("cuda", True, {"use_per_head_quant_scales": True}, "KV cache scales per head"),
}


@pytest.mark.parametrize("kv_cache_dtype", FP8_CACHES)
@pytest.mark.parametrize("case", FP8_REFUSALS.values(), ids=FP8_REFUSALS.keys())
def test_an_fp8_cache_is_refused_where_something_cannot_read_it(case, kv_cache_dtype, monkeypatch):
    device, dense_takes_it, changes, message = case
    monkeypatch.setattr(compat, "dense_takes_fp8", lambda: dense_takes_it)
    with pytest.raises(UnsupportedError, match=f"{message}.*pass --kv-cache-dtype auto"):
        refuse_unsupported_layer(layer(kv_cache_dtype=kv_cache_dtype, **changes), device)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_supported_passes(head_size, dtype, monkeypatch):
    monkeypatch.setattr(compat, "dense_takes_fp8", lambda: True)
    for kv_cache_dtype in (None, "auto", "float16", "bfloat16", *FP8_CACHES):
        for block_size in (None, 16, 48, 128):
            supported = layer(
                head_size=head_size, dtype=dtype, kv_cache_dtype=kv_cache_dtype,
                block_size=block_size,
            )  # fmt: skip
            refuse_unsupported_layer(supported, "cuda")


def configuration(**changes):
    """The part of a VllmConfig that is looked at."""
    values = {"speculative_config": None, "kv_transfer_config": None, "enable_dbo": False,
              "is_hybrid": False, "decode_context_parallel_size": 1,
              "prefill_context_parallel_size": 1, "cache_dtype": "auto",
              "kv_cache_dtype_skip_layers": []}  # fmt: skip
    values |= changes
    return SimpleNamespace(
        speculative_config=values["speculative_config"],
        kv_transfer_config=values["kv_transfer_config"],
        parallel_config=SimpleNamespace(
            **{key: values[key] for key in values if key.endswith(("dbo", "parallel_size"))}
        ),
        model_config=SimpleNamespace(is_hybrid=values["is_hybrid"]),
        cache_config=SimpleNamespace(
            **{key: values[key] for key in ("cache_dtype", "kv_cache_dtype_skip_layers")}
        ),
    )


def check(alibi_slopes=None, soft_cap=None, attn_type=AttentionType.DECODER, sharing=None,
          extra=None, **config):  # fmt: skip
    refuse_unsupported_impl(
        configuration(**config), alibi_slopes, soft_cap, attn_type, sharing, extra or {}
    )


IMPLEMENTATIONS = {
    "ALiBi": ({"alibi_slopes": [0.5]}, "ALiBi", WITHOUT),
    "soft cap": ({"soft_cap": 50.0}, "logit soft caps", WITHOUT),
    "encoder": ({"attn_type": AttentionType.ENCODER}, "encoder attention", WITHOUT),
    "shared KV cache": (
        {"sharing": "model.layers.0.attn"}, "share another layer's KV cache", WITHOUT,
    ),
    "sinks": ({"extra": {"sinks": torch.zeros(4)}}, "attention with sinks", WITHOUT),
    "speculative decoding": (
        {"speculative_config": object()}, "speculative decoding", "drop --speculative-config",
    ),
    "KV connector": (
        {"kv_transfer_config": object()}, "KV connectors", "drop --kv-transfer-config",
    ),
    "dual batch overlap": ({"enable_dbo": True}, "dual batch overlap", "drop --enable-dbo"),
    "decode context parallelism": (
        {"decode_context_parallel_size": 2}, "context parallelism", "sizes to 1",
    ),
    "prefill context parallelism": (
        {"prefill_context_parallel_size": 2}, "context parallelism", "sizes to 1",
    ),
    "layers of two cache dtypes": (
        {"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
        "layers without an fp8 KV cache", "drop --kv-cache-dtype-skip-layers",
    ),
    "state-space layers": ({"is_hybrid": True}, "state-space layers", WITHOUT),
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "feature", "remedy"), IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys()
)
def test_an_implementation_is_refused_with_feature_and_remedy(arguments, feature, remedy):
    with pytest.raises(UnsupportedError) as error:
        check(**arguments)
    assert feature in str(error.value)
    assert remedy in str(error.value)


def test_arguments_without_a_value_are_no_reason_to_refuse():
    check(soft_cap=0.0, extra={"sinks": None})
    check(kv_cache_dtype_skip_layers=["0"])


# --- through the engine ----------------------------------------------------------------------

# these models have no weights: an engine that tried to load any would say so instead
MODELS = {
    "all layers slide": (
        "mistral", {"sliding_window": 128}, {}, ["sliding window", "--disable-sliding-window"],
    ),
    "head size": ("llama", {"head_dim": 48}, {}, ["head_dim 48", "64, 80, 96, 128, 256"]),
    "soft cap": (
        "gemma2", {"query_pre_attn_scalar": 64, "sliding_window": 64}, {},
        ["logit soft caps", WITHOUT],
    ),
    "ALiBi": ("bloom", {"n_head": 4, "n_layer": 2}, {}, ["ALiBi", WITHOUT]),
    "fp8_e5m2 cache": (
        "llama", {}, {"kv_cache_dtype": "fp8_e5m2"}, ["fp8_e5m2 KV cache", "--kv-cache-dtype"],
    ),
    "KV connector": (
        "llama", {}, {"kv_transfer_config": {
            "kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        ["KV connectors", "--kv-transfer-config"],
    ),
    "unknown scorer": (
        "llama", {}, {"additional_config": {"sparsek": {"scorer": "keydif"}}},
        ["scorer='keydif'", "'keydiff'"],
    ),
    # the last: what vLLM imports for it keeps other engines from starting in the same process
    "speculative decoding": (
        "llama", {}, {"speculative_config": {
            "method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        ["speculative decoding", "--speculative-config"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    specs = []
    for index, (model_type, changes, llm, _) in enumerate(MODELS.values()):
        path = write_model(folder / str(index), model_type, weights=False, **changes)
        arguments = tiny_llm(path, dtype="bfloat16", attention_backend="sparsek", **llm)
        specs.append({"llm": arguments, "calls": []})
    # with the remedy of the first; it has weights
    path = write_model(folder / "remedy", "mistral", sliding_window=256)
    remedy = tiny_llm(
        path, attention_backend="sparsek", disable_sliding_window=True, max_model_len=256
    )
    calls = [{"prompts": random_prompts((100,)), "max_tokens": 2}]
    specs.insert(0, {"llm": remedy, "calls": calls})
    return dict(zip(["remedy", *MODELS], run_many(specs, folder), strict=True))


@pytest.mark.engine
@pytest.mark.parametrize("case", MODELS)
def test_the_engine_refuses_before_weights_load(case, refusals):
    assert "error" in refusals[case]
    for word in MODELS[case][3]:
        assert word in refusals[case]["error"]


@pytest.mark.engine
def test_a_model_whose_layers_all_slide_runs_with_the_remedy(refusals):
    assert "error" not in refusals["remedy"], refusals["remedy"]["error"]
    assert "SPARSEK" in refusals["remedy"]["backends"].values()


COMMANDS = {
    "fp8_e5m2 cache": (
        ["--kv-cache-dtype", "fp8_e5m2"],
        "does not support a fp8_e5m2 KV cache yet: pass --kv-cache-dtype",
    ),
    "speculative decoding": (
        ["--speculative-config", json.dumps(
            {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2})],
        "does not support speculative decoding yet: drop --speculative-config",
    ),
    "unknown setting": (
        ["--additional-config", '{"sparsek": {"windw": 64}}'], "Did you mean 'window'?",
    ),
    "preset that is not there": (
        ["--additional-config", '{"sparsek": {"preset": "no/where.yaml"}}'],
        "preset='no/where.yaml' cannot be used: no such file",
    ),
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_line_ends_with_the_message(case, vllm_command, tmp_path):
    arguments, message = COMMANDS[case]
    model = write_model(tmp_path / "tiny", weights=False)
    done = subprocess.run(
        [*vllm_command, "bench", "latency", "--model", model, "--skip-tokenizer-init",
         "--enforce-eager", "--max-model-len", "512", *engine_flags(),
         "--attention-backend", "sparsek", *arguments],
        env=engine_env(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    out = done.stdout + done.stderr
    assert done.returncode != 0
    assert message in out, out[-6000:]
    assert "Avg latency" not in out
    # what the configuration tells is refused before there is an engine process
    assert ("(EngineCore" in out) == (case == "fp8_e5m2 cache")
