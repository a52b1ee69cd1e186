"""Running an attention on a backend: whether the backend supports it, autocast, and the function users call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, Refusal, Stage
from attnzoo.registry import registry
from attnzoo.spec.bias import Bias, DenseBias
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.patterns import Full, Pattern
from attnzoo.spec.segments import Attention, Request, Result, Segment, check_heads_tensor, describe
from attnzoo.spec.transforms import holds

PROBABILITIES_REMEDY = (
    'to get attention probabilities: backend="eager", or patch(..., fallback="native") where the model\'s own code '
    'returns them (attn_implementation="eager")'
)


def refusals_of(backend: Backend, requests: Sequence[Request], anywhere: bool = False) -> tuple[Refusal, ...]:
    """Return every reason why a backend, bound to its site, cannot run the requests; empty if it runs all of them.

    Without requests, only this machine can be a reason. ``anywhere`` leaves out the reasons that only this machine has
    (a missing package or device).
    """
    if anywhere:
        answers = [backend.refusals_anywhere(request) for request in requests]
    else:
        answers = [registry.refusals(backend, request) for request in requests] or [registry.availability(backend)]
    return tuple(dict.fromkeys(reason for reasons in answers for reason in reasons))


def alternatives_to(backend: Backend, requests: Sequence[Request]) -> tuple[str, ...] | None:
    """Return the names of the exact backends that run all requests; None for ``auto``, which has asked all of them."""
    if isinstance(backend, AutoBackend):
        return None
    return tuple(other.name for other in registry.exact_backends() if not any(map(other.refusals, requests)))


def check_requests(backend: Backend, requests: Sequence[Request], place: str, stage: Stage) -> None:
    """Raise unless a backend runs the requests.

    Raises:
        BackendRefusedError: lists every reason, and the backends that run the requests.
    """
    reasons = refusals_of(backend, requests)
    if reasons:
        names = alternatives_to(backend, requests)
        remedy = PROBABILITIES_REMEDY if any(request.probabilities for request in requests) else ""
        alternatives = {} if names is None else {place: names}
        raise BackendRefusedError(backend.name, {place: reasons}, alternatives, remedy, stage)


def execute(backend: Backend, attention: Attention, probabilities: bool = False, place: str = "attention") -> Result:
    """Run an attention on a backend, in the dtype of its tensors: autocast is off inside.

    Raises:
        BackendRefusedError: the backend does not support the attention; no other backend is tried.
    """
    check_requests(backend, (attention.request(probabilities),), place, "in the call")
    device = attention.query.device.type
    try:
        if not torch.is_autocast_enabled(device):
            return backend.run(attention, probabilities)
        with torch.autocast(device, enabled=False):
            return backend.run(attention, probabilities)
    except BackendRefusedError as error:  # a backend may refuse values of tensors, and does not know its place
        raise error.at(place, "in the call").with_traceback(error.__traceback__) from error.__cause__


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype attention is computed in: autocast's where autocast is on (not for float64), else the tensor's.

    Example:
        >>> compute_dtype(torch.ones(2, dtype=torch.float16))
        torch.float16
    """
    return autocast_dtype(tensor.dtype, tensor.device.type)


def autocast_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return what :func:`compute_dtype` returns for a tensor of this dtype and device type."""
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Full(),
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | Backend = "auto",
    *,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    global_keys: Tensor | None = None,
) -> Tensor:
    """Compute ``softmax(scale * q @ k.T + bias) @ v`` over the keys that the pattern and the masks show.

    Scaled dot-product attention of Vaswani et al. 2017 (arXiv:1706.03762). The output of a query that sees no key is
    zero, and so is its gradient.

    Args:
        q: queries ``(batch, heads, q_len, head_dim)``.
        k: keys ``(batch, kv_heads, kv_len, head_dim)``; ``heads % kv_heads == 0``, neighbouring query heads share a
            key head.
        v: values ``(batch, kv_heads, kv_len, value_dim)``.
        pattern: which keys a query sees: ``Full()``, ``Causal()``, ``Window(left, right)``,
            ``Chunks(length, before, after)``. Positions count tokens; with more keys than queries the last query is
            aligned with the last key.
        bias: added to the scores: a :class:`RelativeBias`, or a finite ``(batch or 1, heads or 1, q_len, kv_len)``.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        dropout: probability in ``[0, 1)`` of dropping a softmax weight; applied in every call, as there is no model
            that could be in eval mode.
        backend: a registered name or alias, ``"auto"``, or a configured backend (:func:`attnzoo.configure`).
        mask: bool ``(batch or 1, heads or 1, q_len, kv_len)``, True where visible.
        key_mask: bool ``(batch, kv_len)``, False for padding keys.
        query_mask: bool ``(batch, q_len)``, False for queries whose output shall be zero.
        global_keys: bool ``(batch, kv_len)``, True for keys that every query sees whatever the pattern is.

    Returns:
        ``(batch, heads, q_len, value_dim)`` in the dtype of ``q`` (under autocast: the autocast dtype).

    Raises:
        InvalidArgumentError: wrong rank, empty, or shapes, dtypes, devices or values that do not fit together.
        UnknownNameError: no backend has this name.
        BackendRefusedError: the backend cannot compute this attention; the error lists every reason.

    Example:
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> attention(q, k, v, Full(), backend="sdpa").shape
        torch.Size([1, 2, 8, 16])
    """
    if not isinstance(backend, Backend):
        backend = AutoBackend() if isinstance(backend, str) and backend == "auto" else registry.configure(backend)
    for name, tensor in dict(q=q, k=k, v=v).items():
        check_heads_tensor(name, tensor)
    if not isinstance(pattern, Pattern):
        raise InvalidArgumentError("pattern", repr(pattern), "a pattern, e.g. attnzoo.Causal()")
    if bias is not None and not isinstance(bias, Bias):
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            allowed = "a RelativeBias, or a floating-point tensor; to hide keys, mask="
            raise InvalidArgumentError("bias", describe(bias), allowed)
        bias = DenseBias(bias)
    q, k, v = (tensor.to(compute_dtype(tensor)) for tensor in (q, k, v))
    segments: tuple[Segment, ...] = (Segment(k, v, pattern, key_mask, mask, bias),)
    if global_keys is not None:
        segments = _split_globals(Attention(q, segments, 1.0), global_keys)
    whole = Attention(q, segments, q.shape[-1] ** -0.5 if scale is None else scale, dropout, query_mask)
    if bias is not None and not holds(bias.values.to(q.dtype).isfinite().all(), unknown=True):
        got = f"{describe(bias.values)} with NaN, Inf, or more than {q.dtype} can hold"
        raise InvalidArgumentError("bias", got, f"finite values of {q.dtype}, the query's; hide keys with mask=")
    return execute(backend, whole).output


def _split_globals(attention: Attention, global_keys: Tensor) -> tuple[Segment, ...]:
    (segment,) = attention.segments
    shape = (attention.batch, segment.kv_len)
    if not isinstance(global_keys, Tensor) or global_keys.dtype != torch.bool or tuple(global_keys.shape) != shape:
        raise InvalidArgumentError("global_keys", describe(global_keys), f"bool {shape}, True for global keys")
    if global_keys.device != attention.query.device:
        raise InvalidArgumentError("global_keys device", global_keys.device, f"{attention.query.device}, the query's")
    if segment.mask is not None or segment.bias is not None:
        raise InvalidArgumentError("global_keys", "together with mask or bias", "global_keys without mask and bias")
    visible = global_keys if segment.key_mask is None else global_keys & segment.key_mask
    selected = find_global_keys(visible)
    if selected is None:
        return (segment,)
    ordinary = ~global_keys if segment.key_mask is None else segment.key_mask & ~global_keys
    for_all = Segment(selected.take(segment.key), selected.take(segment.value), key_mask=selected.valid)
    return replace(segment, key_mask=ordinary), for_all
