"""Comparing what two engines answered."""

from __future__ import annotations

from typing import Any

# log-probability gap below which 16-bit rounding may decide between two tokens
ROUNDING_GAP = 0.15


def assert_same_tokens(answer: dict[str, Any], other: dict[str, Any], exact: bool) -> None:
    """Two answers to the same prompts agree.

    Args:
        answer, other: answers of the driver.
        exact: every token is equal (float32). Otherwise (16 bits: kernels of other shapes
            round differently) sequences may part where the first answer's choice was a toss-up.
    """
    for index, (ours, theirs) in enumerate(zip(answer["tokens"], other["tokens"], strict=True)):
        if ours == theirs:
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        gap = answer["gaps"][index][at]
        assert not exact, f"prompt {index} parts at token {at} (gap {gap:.4f})"
        assert gap <= ROUNDING_GAP, f"prompt {index} parts at token {at}: gap {gap:.3f}"
