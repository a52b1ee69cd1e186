"""Check the dropout of a backend: the kept weights, the share of dropped weights, their independence, the gradients.

With one-hot values, the output consists of the weights after dropout. So the output shows which weights were dropped,
and the oracle can compute the same attention with the same dropped weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.backend import Backend
from attnzoo.backends.eager import evaluate, joined_values
from attnzoo.conformance import error_rule
from attnzoo.conformance.attention_check import detached, gradient_vector
from attnzoo.conformance.recomputed import recomputed
from attnzoo.functional import execute
from attnzoo.spec.segments import Attention

_DEVIATIONS = 5.0  # accepted standard deviations of a share


def dropout_failure(backend: Backend, attention: Attention, probabilities: bool = False, seed: int = 0) -> str:
    """Return what is wrong with the dropout of a backend, or an empty string.

    Each weight must be either 0, or the softmax weight divided by ``1 - dropout``. The share of zeros must be close to
    ``dropout``. Weights of neighbouring samples, heads and queries, and weights of two calls, must be dropped
    independently. Gradients must be the gradients of the output, with the same dropped weights. With ``probabilities``,
    the returned weights after dropout must be the weights of the output.
    """
    grad, dropout = attention.request().grad, attention.dropout
    with_dropout = _with_one_hot_values(attention)
    without = replace(with_dropout, dropout=0.0)
    dtype, device = attention.query.dtype, attention.query.device
    copy = detached(with_dropout, dtype, grad)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        result, again = (execute(backend, copy, probabilities) for _ in range(2))
    output, other = result.output.detach(), again.output.detach()
    weights = evaluate(backend.rewrite(detached(without, torch.float64, False), backend.decisions(without))).output
    scaled = weights / (1.0 - dropout)
    kept, eps = output != 0.0, torch.finfo(dtype).eps
    error = (output.double() - scaled).abs().masked_fill(~kept, 0.0).max().item()
    if not error <= 16 * eps * scaled.max().item():
        return f"dropout: a kept weight differs by {error:.3g} from softmax weight / (1 - dropout)"
    counted = weights > eps
    failure = _share_failure(kept, counted, dropout) or _dependence_failure(kept, other != 0.0, counted, dropout)
    if probabilities and not failure:
        dropped = None if result.dropped is None else torch.cat(result.dropped, dim=-1)
        if dropped is None or not error_rule.check("dropped", dropped, output.double(), output, 2.0, dtype).ok:
            failure = "dropout: the returned weights after dropout are not the weights of the output"
    if grad and not failure:
        check = _gradient_check(backend, result.output, copy, without, kept.double() / (1.0 - dropout))
        failure = "" if check.ok else f"dropout: {check}"
    return failure


def _with_one_hot_values(attention: Attention) -> Attention:
    """Return the attention with a one-hot value for each key.

    ``head_dim`` and ``value_dim`` become the number of keys.
    """
    total = sum(segment.kv_len for segment in attention.segments)
    one_hot = torch.eye(total, dtype=attention.query.dtype, device=attention.query.device)
    missing = (0, total - attention.head_dim)
    segments, start = [], 0
    for segment in attention.segments:
        rows = one_hot[start : start + segment.kv_len].expand(*segment.value.shape[:2], -1, -1)
        padded = torch.nn.functional.pad(segment.key.detach(), missing)
        segments.append(replace(segment, key=padded, value=rows.contiguous()))
        start += segment.kv_len
    query = torch.nn.functional.pad(attention.query.detach(), missing)
    return replace(attention, query=query, segments=tuple(segments), empty=None)


def _share_failure(kept: Tensor, counted: Tensor, dropout: float) -> str:
    share, count = 1.0 - kept[counted].double().mean().item(), int(counted.sum())
    if abs(share - dropout) > _slack(dropout, count):
        return f"dropout: got a share of {share:.3f} dropped weights of {count}; allowed: about {dropout}"
    return ""


def _slack(share: float, count: int) -> float:
    return _DEVIATIONS * float((share * (1.0 - share) / count) ** 0.5)


def _dependence_failure(kept: Tensor, other: Tensor, counted: Tensor, dropout: float) -> str:
    """Return which weights are not dropped independently, or an empty string."""
    pairs = {"two calls": (kept, other, counted)}
    for dim, what in enumerate(("neighbouring samples", "neighbouring heads", "neighbouring queries")):
        last = kept.shape[dim] - 1
        first, second = kept.narrow(dim, 0, last), kept.narrow(dim, 1, last)
        pairs[what] = (first, second, counted.narrow(dim, 0, last) & counted.narrow(dim, 1, last))
    allowed = dropout**2 + (1.0 - dropout) ** 2  # the share of equal decisions if they are independent
    for what, (first, second, both) in pairs.items():
        count = int(both.sum())
        if count and (first == second)[both].double().mean().item() > allowed + _slack(allowed, count):
            return f"dropout: {what} drop the same weights; allowed: independent decisions"
    return ""


def _gradient_check(
    backend: Backend, output: Tensor, inputs: Attention, without: Attention, factors: Tensor
) -> error_rule.Check:
    """Compare gradients with the oracle, which multiplies the softmax weights by ``factors``."""
    dtype = inputs.query.dtype
    plain_dtype = error_rule.plain_dtype(dtype)
    random = torch.Generator().manual_seed(0)
    cotangent = torch.randn(output.shape, generator=random, dtype=torch.float64, device="cpu").to(output.device)
    decisions = backend.decisions(without)

    def plain(kind: torch.dtype, again: bool = False) -> Tensor:
        copy = detached(without, kind, True)
        constants = tuple(replace(segment, value=segment.value.detach()) for segment in copy.segments)
        changed = backend.rewrite(replace(copy, segments=constants), decisions)
        weights = recomputed(changed) if again else evaluate(changed).output  # as many columns as there are keys
        return gradient_vector((weights * factors.to(kind)) @ joined_values(copy), copy, cotangent)

    got = gradient_vector(output, inputs, cotangent)
    results = got, plain(torch.float64), plain(plain_dtype)
    others = (plain(plain_dtype, again=True),)
    return error_rule.check("gradient", *results, error_rule.GRADIENT, dtype, plain_dtype, others)
