"""What the strategies of softmax attention ask of their arguments."""

from __future__ import annotations

from typing import Any


def attention(op: str, q: Any, k: Any, v: Any, segments: Any) -> None:
    """ValueError unless the arrays are those of one shard's tokens."""
    fits = k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{op}: q {q.shape}, k {k.shape} and v {v.shape} must be (B, l, H, K) and twice "
            "(B, l, G, K) with G a divisor of H"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"{op}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    same_tokens(op, "segments", segments, "q", q)


def same_tokens(op: str, name: str, x: Any, like_name: str, like: Any) -> None:
    """ValueError unless ``x`` is None or ``(B, l)``, as ``like`` begins."""
    if x is not None and x.shape != like.shape[:2]:
        raise ValueError(
            f"{op}: {name} must be (B, l) = {like.shape[:2]}, as {like_name} has them, "
            f"got {x.shape}"
        )


def window(op: str, causal: bool, window: int | None, sinks: int, positions: Any) -> None:
    """ValueError unless the window is one that ``attend`` knows."""
    if window is not None and (not causal or window < 1):
        raise ValueError(f"{op}: window={window} must be positive, with causal=True")
    if sinks < 0:
        raise ValueError(f"{op}: sinks={sinks} must be at least 0")
    if sinks and (window is None or positions is None):
        raise ValueError(f"{op}: sinks={sinks} needs a window and positions")
