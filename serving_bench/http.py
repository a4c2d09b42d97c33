"""The few HTTP requests the benchmark makes itself, by the standard library."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any

ERROR_BYTES = 500

# what an HTTP request may raise when the other side is absent, dying or not HTTP
HTTP_ERRORS = (OSError, http.client.HTTPException, ValueError)


def _open(request: urllib.request.Request, timeout: float) -> bytes:
    key = os.environ.get("OPENAI_API_KEY")
    if key:
        # the same variable that vLLM's client reads
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            body: bytes = response.read()
    except urllib.error.HTTPError as error:
        # the status alone does not say what was wrong
        said = error.read(ERROR_BYTES).decode("utf-8", errors="replace").strip()
        raise OSError(f"{error}: {said}" if said else str(error)) from error
    return body


def get(url: str, timeout: float = 5.0) -> str:
    """GET a URL as text. Raises one of HTTP_ERRORS; timeout in seconds."""
    return _open(urllib.request.Request(url), timeout).decode("utf-8", errors="replace")


def post(url: str, body: Any, timeout: float) -> str:
    """POST JSON, return the answer as text. Raises one of HTTP_ERRORS; timeout in seconds."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return _open(request, timeout).decode("utf-8", errors="replace")


def models(base_url: str, timeout: float = 5.0) -> list[dict[str, Any]]:
    """Return the model cards of `/v1/models`. Raises one of HTTP_ERRORS."""
    answer = json.loads(get(f"{base_url}/v1/models", timeout))
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise ValueError("not an OpenAI-compatible list of models")
    return cards
