"""Tiny models with random weights: every head shape through the real engine in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from processes import engine_memory, run_driver

MANY_DRIVER = Path(__file__).with_name("many_driver.py")
VOCABULARY = 512
# large enough that attention prefers some tokens and the next token depends on what is read
SPREAD = 0.08


def write_model(
    folder: Path, model_type: str = "llama", weights: bool = True, **changes: Any
) -> str:
    """Write a two-layer model of hidden size 256; returns the folder for ``LLM(model=...)``.

    Args:
        folder: where to.
        model_type: as in config.json, e.g. llama, mistral, gemma3_text.
        weights: without them, whoever loads weights fails.
        changes: keys of config.json.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    settings = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": SPREAD,
    }
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if weights:
        torch.manual_seed(0)
        model_class._from_config(config, dtype=torch.float32).save_pretrained(folder)
    else:
        config.architectures = [model_class.__name__]
        config.save_pretrained(folder)
    return str(folder)


def tiny_llm(model: str, **changes: Any) -> dict[str, Any]:
    """Engine arguments of such a model: no tokenizer, and float32 on the CPU."""
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "float16" if torch.cuda.is_available() else "float32",
        "max_model_len": 1024,
        "max_num_seqs": 4,
        **engine_memory(),
        "enforce_eager": True,
        "seed": 0,
        **changes,
    }


def random_prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    """Token ids drawn with a fixed seed."""
    draw = random.Random(0)
    return [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths]


def run_many(specs: list[dict[str, Any]], folder: Path, **env: str) -> list[dict[str, Any]]:
    """Answers of several engines, started one after another in one process."""
    path = folder / "specifications.json"
    path.write_text(json.dumps(specs))
    return run_driver(MANY_DRIVER, str(path), **env)
