"""Functions that check whether a backend supports an attention, and functions that run an attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError, Refusal, Stage
from attnzoo.refusal_cache import availability
from attnzoo.registry import registry
from attnzoo.spec.autocast import active_autocast
from attnzoo.spec.bias import Bias, DenseBias
from attnzoo.spec.global_keys import find_global_keys
from attnzoo.spec.patterns import Full, Pattern
from attnzoo.spec.segments import Attention, Request, Result, Segment, check_heads_tensors, describe
from attnzoo.spec.transforms import holds

PROBABILITIES_REMEDY = (
    'to get attention probabilities, use backend="eager". If the model\'s own code returns them (e.g. with '
    'attn_implementation="eager"), patch(..., fallback="native") is enough'
)


def refusals_of(backend: Backend, requests: Sequence[Request], anywhere: bool = False) -> tuple[Refusal, ...]:
    """Return every reason why a backend cannot run the requests. Empty means no reason.

    For the requests of a site, pass the backend that :meth:`Backend.bind_to_site` returned. Without requests, the
    result contains only reasons why the backend is unavailable on this machine. With ``anywhere``, the result omits
    reasons that depend on the machine, such as a missing package.
    """
    if anywhere:
        answers = [backend.refusals_anywhere(request) for request in requests]
    else:
        answers = [registry.refusals(backend, request) for request in requests] or [availability(backend)]
    if not any(answers):
        return ()
    return tuple(dict.fromkeys(reason for reasons in answers for reason in reasons))


def alternatives_to(backend: Backend, requests: Sequence[Request]) -> tuple[str, ...] | None:
    """Return the names of exact backends that support all requests, or None for ``auto``, which has tried them all."""
    if isinstance(backend, AutoBackend):
        return None
    return tuple(other.name for other in registry.exact_backends() if not any(map(other.refusals, requests)))


def check_requests(backend: Backend, requests: Sequence[Request], place: str, stage: Stage) -> None:
    """Raise unless a backend supports all requests.

    Raises:
        BackendRefusedError: the message contains ``place``, every reason, and the backends that support the requests.
    """
    reasons = refusals_of(backend, requests)
    if reasons:
        names = alternatives_to(backend, requests)
        remedy = PROBABILITIES_REMEDY if any(request.probabilities for request in requests) else ""
        alternatives = {} if names is None else {place: names}
        raise BackendRefusedError(backend.name, {place: reasons}, alternatives, remedy, stage)


def execute(backend: Backend, attention: Attention, probabilities: bool = False, place: str = "attention") -> Result:
    """Run an attention on a backend, with autocast off and in the dtype of the attention's tensors.

    Raises:
        BackendRefusedError: the backend does not support the attention. attnzoo tries no other backend.
    """
    request = attention.request(probabilities)
    if registry.refusals(backend, request):
        check_requests(backend, (request,), place, "in the call")
    device = request.device
    try:
        if not torch.is_autocast_enabled(device):
            return backend.run(attention, probabilities)
        with torch.autocast(device, enabled=False):
            return backend.run(attention, probabilities)
    except BackendRefusedError as error:  # the backend has refused tensor values, and does not know the place
        raise error.at(place, "in the call").with_traceback(error.__traceback__) from error.__cause__


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return autocast's dtype if autocast is on and the tensor is not float64, else the dtype of the tensor.

    Example:
        >>> compute_dtype(torch.ones(2, dtype=torch.float16))
        torch.float16
    """
    return autocast_dtype(tensor.dtype, tensor.device.type)


def autocast_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the result of :func:`compute_dtype` for a tensor of this dtype and device type."""
    return dtype if dtype == torch.float64 else active_autocast(device) or dtype


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
    """Compute ``softmax(scale * q @ k.T + bias) @ v`` over the keys that the pattern and the masks allow.

    This is scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762). The output and the gradient of a query
    that sees no key are zero.

    Args:
        q: queries ``(batch, heads, q_len, head_dim)``.
        k: keys ``(batch, kv_heads, kv_len, head_dim)`` with ``heads % kv_heads == 0``. Neighbouring query heads share a
            key head.
        v: values ``(batch, kv_heads, kv_len, value_dim)``.
        pattern: the keys that a query sees: ``Full()``, ``Causal()``, ``Window(left, right)`` or ``Chunks(length,
            before, after)``. If there are more keys than queries, the last query has the position of the last key.
        bias: values added to the scores, as a :class:`RelativeBias` or a finite tensor
            ``(batch or 1, heads or 1, q_len, kv_len)``.
        scale: the factor on the scores. None means ``head_dim ** -0.5``.
        dropout: the probability in ``[0, 1)`` of dropping a softmax weight, also outside training.
        backend: a registered name or alias, ``"auto"``, or a configured backend (:func:`attnzoo.configure`).
        mask: bool ``(batch or 1, heads or 1, q_len, kv_len)``, True if the query sees the key.
        key_mask: bool ``(batch, kv_len)``, False for padding keys.
        query_mask: bool ``(batch, q_len)``, False for queries whose output must be zero.
        global_keys: bool ``(batch, kv_len)``, True for keys that every query sees, even if the pattern hides them.

    Returns:
        The output ``(batch, heads, q_len, value_dim)`` in the dtype that :func:`compute_dtype` returns for ``q``.

    Raises:
        InvalidArgumentError: a tensor is empty, has the wrong rank, or does not fit the other tensors.
        UnknownNameError: no backend has this name.
        BackendRefusedError: the backend cannot compute this attention. The message lists every reason.

    Example:
        >>> q = k = v = torch.randn(1, 2, 8, 16)
        >>> attention(q, k, v, Full(), backend="sdpa").shape
        torch.Size([1, 2, 8, 16])
    """
    if not isinstance(backend, Backend):
        backend = AutoBackend() if isinstance(backend, str) and backend == "auto" else registry.configure(backend)
    check_heads_tensors(q=q, k=k, v=v)
    if not isinstance(pattern, Pattern):
        raise InvalidArgumentError("pattern", repr(pattern), "a pattern, e.g. attnzoo.Causal()")
    if bias is not None and not isinstance(bias, Bias):
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            allowed = "a RelativeBias, or a floating-point tensor (to hide keys, use mask=)"
            raise InvalidArgumentError("bias", describe(bias), allowed)
        bias = DenseBias(bias)
    q, k, v = (tensor.to(compute_dtype(tensor)) for tensor in (q, k, v))
    segments: tuple[Segment, ...] = (Segment(k, v, pattern, key_mask, mask, bias),)
    if global_keys is not None:
        segments = _split_globals(Attention(q, segments, 1.0), global_keys)
    whole = Attention(q, segments, q.shape[-1] ** -0.5 if scale is None else scale, dropout, query_mask)
    if bias is not None and not holds(bias.values.to(q.dtype).isfinite().all(), unknown=True):
        got = f"{describe(bias.values)}, with NaN, Inf, or numbers outside the range of {q.dtype}"
        raise InvalidArgumentError("bias", got, f"finite values of {q.dtype}, like the query (to hide keys, use mask=)")
    return execute(backend, whole).output


def _split_globals(attention: Attention, global_keys: Tensor) -> tuple[Segment, ...]:
    (segment,) = attention.segments
    shape = (attention.batch, segment.kv_len)
    if not isinstance(global_keys, Tensor) or global_keys.dtype != torch.bool or tuple(global_keys.shape) != shape:
        raise InvalidArgumentError(
            "global_keys", describe(global_keys), f"a bool tensor of shape {shape} (True: global key)"
        )
    if global_keys.device != attention.query.device:
        raise InvalidArgumentError("global_keys device", global_keys.device, f"{attention.query.device}, like q")
    if segment.mask is not None or segment.bias is not None:
        raise InvalidArgumentError("global_keys", "a tensor together with mask or bias", "None, or no mask and no bias")
    visible = global_keys if segment.key_mask is None else global_keys & segment.key_mask
    selected = find_global_keys(visible)
    if selected is None:
        return (segment,)
    ordinary = ~global_keys if segment.key_mask is None else segment.key_mask & ~global_keys
    for_all = Segment(selected.take(segment.key), selected.take(segment.value), key_mask=selected.valid)
    return replace(segment, key_mask=ordinary), for_all
