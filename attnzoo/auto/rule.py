"""The rule by which ``auto`` decides between the model's code and a backend while nothing has been measured.

A backend runs only where measurements of attnzoo's authors have shown that it is faster. Everywhere else, the model's
code runs. A score belongs to a pair of a query and a visible key. A backend needs less time per score than the model's
code, but more time per call and, in local attention, per block of queries. So the rule counts the scores of a call, and
the keys that a query sees. ``docs/decisions.md`` shows the measurements and the command.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from attnzoo.auto.calls import DECODING, FORWARD, TRAINING, ModuleCall
from attnzoo.registry import registry
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, SortedChunks, Window, power_of_two
from attnzoo.spec.segments import Request


class Limit(NamedTuple):
    """The numbers from which on a backend runs instead of the model's code.

    Attributes:
        keys: number of keys that a query of local attention sees.
        scores: number of scores of the call.
        backend: the only backend for which the limit holds. Empty means that the limit holds for every backend.
    """

    keys: int
    scores: int
    backend: str = ""


# (kind, device type, mode) -> limit. A missing entry means that the model's code always runs.
LIMITS: dict[tuple[str, str, str], Limit] = {
    ("window and other keys", "cpu", FORWARD): Limit(512, 3_000_000),
    ("window and other keys", "cpu", TRAINING): Limit(512, 3_000_000),
    ("window with bias", "cpu", FORWARD): Limit(255, 6_000_000),
    ("window with bias", "cpu", TRAINING): Limit(255, 12_000_000),
    ("window and other keys with bias", "cpu", FORWARD): Limit(0, 60_000_000),
    ("window and other keys with bias", "cpu", TRAINING): Limit(0, 200_000_000),
    ("chunks", "cpu", FORWARD): Limit(256, 500_000),
    ("chunks", "cpu", TRAINING): Limit(256, 500_000),
    ("sorted chunks", "cpu", FORWARD): Limit(1024, 500_000),
    ("sorted chunks", "cpu", TRAINING): Limit(1024, 500_000),
    ("dense in eager", "cpu", FORWARD): Limit(0, 4_000_000),
    ("dense in eager", "cpu", TRAINING): Limit(0, 4_000_000),
    ("dense in eager with bias", "cpu", FORWARD): Limit(0, 4_000_000),
    ("dense in eager with bias", "cpu", TRAINING): Limit(0, 4_000_000),
    ("window and other keys", "cuda", FORWARD): Limit(1024, 200_000_000, "flash_attention_2"),
}


def kind_of(requests: Sequence[Request], original_kernel: str) -> str:
    """Return the kind of a module, as used in :data:`LIMITS`, or ``"unknown"``.

    Args:
        requests: the expected requests of the module (:meth:`PatchPoint.requests`).
        original_kernel: the attention function of the original code (:meth:`PatchPoint.original_kernel`).
    """
    segments = requests[0].segments if requests else ()
    patterns = {type(segment.pattern) for segment in segments}
    if SortedChunks in patterns:
        return "sorted chunks"
    if Chunks in patterns:
        return "chunks"
    if len(segments) > 1 and segments[-1].kv_heads == 1 and segments[-1].bias is not None:
        return "unknown"  # attention sinks: there are no measurements with them
    with_bias = " with bias" if any(segment.bias is not None for segment in segments) else ""
    if Window in patterns:
        return f"window{' and other keys' if len(segments) > 1 else ''}{with_bias}"
    return f"dense in {original_kernel}{with_bias}" if patterns and patterns <= {Causal, Full} else "unknown"


def count_scores(requests: Sequence[Request], call: ModuleCall) -> int:
    """Return roughly how many scores a call computes. Every key counts if the visible keys grow with the length.

    The few keys that all queries of a local attention see, such as global tokens, are not counted.
    """
    keys = min(call.kv_len, keys_per_query(requests) or call.kv_len)
    return call.batch * requests[0].heads * call.q_len * keys


def keys_per_query(requests: Sequence[Request]) -> int:
    """Return how many keys a query of local attention sees, or 0 if the number grows with the length."""
    segments = requests[0].segments
    if any(isinstance(segment.pattern, Full) and segment.bias is not None for segment in segments):
        return 0  # one key per block of tokens, with a bias by block distance
    return sum(_span(segment.pattern) for segment in segments)


def holds(limit: Limit, requests: Sequence[Request]) -> bool:
    """Whether a limit holds for a module: a query sees enough keys, and ``auto`` selects the measured backend."""
    if (keys_per_query(requests) or limit.keys) < limit.keys:
        return False
    first = next(iter(registry.supporting_backends(requests[0])), None)
    return limit.backend in ("", first.name if first else "")


def _span(pattern: Pattern) -> int:
    if isinstance(pattern, Window):
        return pattern.left + pattern.right + 1
    return pattern.length * (pattern.before + pattern.after + 1) if isinstance(pattern, (Chunks, SortedChunks)) else 0


def native_because(
    requests: Sequence[Request], original_kernel: str, call: ModuleCall, dropout: bool = False
) -> str | None:
    """Return why the model's code runs, or None if a backend runs.

    ``dropout`` says whether the call drops softmax weights. The limits are measured without dropout. With dropout,
    ``sdpa`` runs another kernel on the CPU.
    """
    kind = kind_of(requests, original_kernel)
    if dropout:
        return f"by rule: {call.mode} of {kind} with dropout on {call.device}; to measure, run attnzoo tune --train"
    limit = LIMITS.get((kind, call.device, call.mode))
    if limit is not None and holds(limit, requests) and count_scores(requests, call) >= limit.scores:
        return None
    # Sites keep all reasons. Rounding the number of scores avoids a new reason for each length.
    size = f" with about {power_of_two(count_scores(requests, call))} scores (limit {limit.scores})" if limit else ""
    return f"by rule: {call.mode} of {kind}{size} on {call.device}; to measure, run attnzoo tune"


def native_by_rule(requests: Sequence[Request], original_kernel: str, device: str, dropout: bool = False) -> str:
    """Return text that says for which calls of a module the rule selects the model's code.

    ``dropout`` says whether the module drops softmax weights in training.
    """
    kind, parts = kind_of(requests, original_kernel), [DECODING]
    for mode in (FORWARD, TRAINING):
        limit = LIMITS.get((kind, device, mode))
        if limit is None or not holds(limit, requests):
            parts.append(mode)
        else:
            with_dropout = "with dropout or " if dropout and mode == TRAINING else ""
            parts.append(f"{mode} {with_dropout}below {_queries(requests, limit.scores)} queries")
    return f"{kind} on {device}: {', '.join(parts)}"


def _queries(requests: Sequence[Request], scores: int) -> int:
    """Return with how many queries a call of batch size 1 reaches a number of scores."""
    heads, keys = requests[0].heads, keys_per_query(requests)
    return max(math.isqrt(scores // heads), math.ceil(scores / (heads * keys)) if keys else 0)
