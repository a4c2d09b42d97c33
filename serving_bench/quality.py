"""What sparsity costs: the perplexity of one long window of a real text, asked of each server.

Perplexity is measured while a prompt is read. Where prompts are read densely (``quest`` and other
training-free scorers, unless ``prefill: sparse``) it is the dense arm's and says nothing of decode.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_sparsek.serving_bench import http
from vllm_sparsek.serving_bench.client import DEATH_SECONDS
from vllm_sparsek.serving_bench.errors import BenchError
from vllm_sparsek.serving_bench.processes import Child, wait
from vllm_sparsek.serving_bench.server import Endpoint, died

# the longest window: 8k less what a chat template would need
MAX_TOKENS = 8192 - 64
# below, half a window says nothing
MIN_TOKENS = 256
# more text than any vocabulary fits into so many tokens
MAX_CHARACTERS = 16 * MAX_TOKENS
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class Window:
    """The window that all arms read. name and sha256: of the text it begins; tokens: their ids."""

    name: str
    sha256: str
    tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what tells one window from another."""
        return {"text": self.name, "sha256": self.sha256, "tokens": len(self.tokens)}


def read(path: Path) -> str:
    """Read the text. Raises BenchError if it is missing, not UTF-8 or empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--quality {path} cannot be read: {error}") from error
    if not text.strip():
        raise BenchError(f"--quality {path} is empty")
    return text


def window(path: Path, endpoint: Endpoint, server: Child | None) -> Window:
    """Cut the window out of the start of a text, in tokens of the endpoint's model.

    It is as long as the endpoint's context allows, at most ``MAX_TOKENS``.
    Raises BenchError if the text is too short, or the endpoint has no `/tokenize` as vLLM has.
    """
    text = read(path)
    answer = _post(endpoint, "/tokenize", {"prompt": text[:MAX_CHARACTERS]}, server)
    longest = MAX_TOKENS
    if endpoint.max_model_len is not None:
        # one token is generated
        longest = min(longest, endpoint.max_model_len - 1)
    try:
        tokens = tuple(int(token) for token in answer["tokens"][:longest])
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"the endpoint's /tokenize is not vLLM's: {error!r}") from error
    if len(tokens) < MIN_TOKENS:
        raise BenchError(
            f"--quality {path}: a window of {len(tokens)} tokens is too short, at least"
            f" {MIN_TOKENS} are needed; give a longer text or a server a longer context"
        )
    return Window(path.name, hashlib.sha256(text.encode()).hexdigest(), tokens)


def perplexity(window: Window, endpoint: Endpoint, server: Child | None) -> float:
    """Return the perplexity of the window's last half, given what stands before each token.

    One request, no other running. Raises BenchError if it fails or brings no log-probabilities.
    """
    tokens = list(window.tokens)
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = _post(endpoint, "/v1/completions", body, server)
    half = len(tokens) // 2
    try:
        steps = answer["choices"][0]["prompt_logprobs"]
        losses = [
            -step[str(token)]["logprob"]
            for token, step in zip(tokens[-half:], steps[-half:], strict=True)
        ]
        return math.exp(sum(losses) / half)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise BenchError(f"the endpoint gives no usable prompt_logprobs: {error!r}") from error


def _post(endpoint: Endpoint, path: str, body: dict[str, Any], server: Child | None) -> Any:
    url = f"{endpoint.base_url}{path}"
    try:
        return json.loads(http.post(url, {"model": endpoint.model, **body}, TIMEOUT_SECONDS))
    except http.HTTP_ERRORS as error:
        if server is not None and wait(server, DEATH_SECONDS):
            raise died(server, "the server died while its quality was measured") from error
        raise BenchError(f"the quality request to {path} failed: {error}") from error
