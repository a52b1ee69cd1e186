"""The rule by which ``auto`` decides between the model's code and a backend while nothing has been measured.

A backend runs only where measurements of attnzoo's authors have shown that it is faster. Everywhere else, the model's
code runs. ``docs/decisions.md`` shows the measurements behind the table and the command that repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo.auto.calls import DECODING, ModuleCall
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Request

FORWARD, TRAINING = "forward", "forward+backward"
NEVER = 1 << 40

# kind -> device type -> mode -> the smallest number of queries from which a backend runs. Missing entries mean never.
FROM: dict[str, dict[str, dict[str, int]]] = {
    "window": {"cpu": {FORWARD: 1024, TRAINING: 1024}},
    "window and global keys": {"cpu": {FORWARD: 1024, TRAINING: 1024}},
    "window with bias": {"cpu": {FORWARD: 1024, TRAINING: 1024}},
    "window and side keys with bias": {"cpu": {FORWARD: 1024, TRAINING: 1024}},
    "chunks": {"cpu": {FORWARD: 1024, TRAINING: 1024}},
    "sorted chunks": {"cpu": {FORWARD: 1024, TRAINING: 1024}},
    "dense in eager": {"cpu": {FORWARD: 1024, TRAINING: 1024}},
    "dense in sdpa": {},
}


def kind_of(requests: Sequence[Request], original_kernel: str) -> str:
    """Return the kind of a module: a key of :data:`FROM`, or ``"unknown"``.

    Args:
        requests: the expected requests of the module (:meth:`PatchPoint.requests`).
        original_kernel: the attention function of the original code (:meth:`PatchPoint.original_kernel`).
    """
    segments = requests[0].segments if requests else ()
    patterns = {type(segment.pattern) for request in requests for segment in request.segments}
    has_bias = any(segment.bias is not None for segment in segments)
    for pattern, kind in ((SortedChunks, "sorted chunks"), (Chunks, "chunks")):
        if pattern in patterns:
            return kind
    if segments and type(segments[0].pattern) is Window:
        if len(segments) == 1:
            return "window with bias" if has_bias else "window"
        return "window and side keys with bias" if has_bias else "window and global keys"
    if patterns and patterns <= {Causal, Full}:
        return f"dense in {original_kernel}"
    return "unknown"


def first_length(kind: str, device: str, mode: str) -> int:
    """Return the number of queries from which a backend runs instead of the model's code."""
    return FROM.get(kind, {}).get(device, {}).get(mode, NEVER)


def native_because(kind: str, call: ModuleCall) -> str | None:
    """Return why the model's code runs, or None if a backend runs."""
    first = first_length(kind, call.device, call.mode)
    if call.mode != DECODING and call.q_len >= first:
        return None
    what = f"{call.mode} of {kind} on {call.device}"
    if first >= NEVER:
        return f"by rule: {what} uses the model's code; to measure, run attnzoo tune"
    return f"by rule: {what} uses the model's code below {first} queries; to measure, run attnzoo tune"
