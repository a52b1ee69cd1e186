"""Running an attention on a backend: negotiation, autocast, and the function users call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnzoo.auto import selection
from attnzoo.backend import Backend
from attnzoo.errors import BackendRefusedError, InvalidArgumentError
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


def negotiate(backend: Backend, request: Request, where: str) -> None:
    """Return if the backend takes the request.

    Raises:
        BackendRefusedError: every reason it has not to, and who would take the request.
    """
    reasons = registry.refusals(backend, request)
    if reasons:
        remedy = PROBABILITIES_REMEDY if request.probabilities else ""
        raise BackendRefusedError(
            backend.name,
            {where: reasons},
            {where: tuple(other.name for other in registry.supporting_backends(request))},
            remedy,
        )


def execute(backend: Backend, attention: Attention, probabilities: bool = False, where: str = "attention") -> Result:
    """Run an attention on a backend, in the dtype of its tensors: autocast is off inside.

    Raises:
        BackendRefusedError: the backend does not take it; nothing else is tried.
    """
    negotiate(backend, attention.request(probabilities), where)
    device = attention.query.device.type
    try:
        if not torch.is_autocast_enabled(device):
            return backend.run(attention, probabilities)
        with torch.autocast(device, enabled=False):
            return backend.run(attention, probabilities)
    except BackendRefusedError as error:  # what only the tensors show; a backend does not know where it runs
        raise error.at(where).with_traceback(error.__traceback__) from error.__cause__


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype attention is computed in: that of autocast where it is on (not for float64), else the tensor's."""
    return autocast_dtype(tensor.dtype, tensor.device.type)


def autocast_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The same by dtype and device type."""
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
    """Attention by any backend: ``softmax(scale * q @ k.T + bias) @ v`` over the keys the pattern and masks show.

    Scaled dot-product attention of Vaswani et al. 2017 (arXiv:1706.03762); rows that see no key are zero, and so are
    their gradients.

    Args:
        q: queries ``(batch, heads, q_len, head_dim)``.
        k: keys ``(batch, kv_heads, kv_len, head_dim)``; ``heads % kv_heads == 0``, neighbouring query heads share one.
        v: values ``(batch, kv_heads, kv_len, value_dim)``.
        pattern: who sees whom: ``Full()``, ``Causal()``, ``Window(left, right)``, ``Chunks(length, before, after)``.
            Positions are tokens; with more keys than queries the last query is aligned with the last key.
        bias: added to the scores: a :class:`RelativeBias`, or a finite ``(batch or 1, heads or 1, q_len, kv_len)``.
        scale: factor on the scores; None means ``head_dim ** -0.5``.
        dropout: probability in ``[0, 1)`` of dropping a softmax weight; it is applied whenever it is not 0.
        backend: a registered name or alias, ``"auto"``, or a configured backend (:func:`attnzoo.configure`).
        mask: bool ``(batch or 1, heads or 1, q_len, kv_len)``, True where visible.
        key_mask: bool ``(batch, kv_len)``, False for padding keys.
        query_mask: bool ``(batch, q_len)``, False for rows to leave zero.
        global_keys: bool ``(batch, kv_len)``, True for keys that every query sees, whatever the pattern says.

    Returns:
        ``(batch, heads, q_len, value_dim)`` in the dtype of ``q`` (under autocast: the autocast dtype).

    Raises:
        InvalidArgumentError: wrong rank, empty, or shapes, dtypes, devices or values that do not fit.
        UnknownNameError: no such backend.
        BackendRefusedError: the named backend cannot do this; every reason is listed.
    """
    if not isinstance(backend, Backend) and not (isinstance(backend, str) and backend == "auto"):
        backend = registry.configure(backend)
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
    segment = Segment(k, v, pattern, key_mask, mask, bias)
    segments: tuple[Segment, ...] = (segment,)
    if global_keys is not None:
        segments = _split_globals(Attention(q, (segment,), 1.0), global_keys)
    whole = Attention(q, segments, q.shape[-1] ** -0.5 if scale is None else scale, dropout, query_mask)
    if bias is not None and not holds(bias.values.to(q.dtype).isfinite().all(), unknown=True):
        got = f"{describe(bias.values)} with NaN, Inf, or more than {q.dtype} can hold"
        raise InvalidArgumentError("bias", got, f"finite values of {q.dtype}, the query's; hide keys with mask=")
    return execute(backend if isinstance(backend, Backend) else selection.choose_for(whole).backend, whole).output


def _split_globals(checked: Attention, global_keys: Tensor) -> tuple[Segment, ...]:
    (segment,) = checked.segments
    shape = (checked.batch, segment.kv_len)
    if not isinstance(global_keys, Tensor) or global_keys.dtype != torch.bool or tuple(global_keys.shape) != shape:
        raise InvalidArgumentError("global_keys", describe(global_keys), f"bool {shape}, True for global keys")
    if global_keys.device != checked.query.device:
        raise InvalidArgumentError("global_keys device", global_keys.device, f"{checked.query.device}, the query's")
    if segment.mask is not None or segment.bias is not None:
        raise InvalidArgumentError("global_keys", "together with mask or bias", "global_keys without mask and bias")
    visible = global_keys if segment.key_mask is None else global_keys & segment.key_mask
    found = find_global_keys(visible)
    if found is None:
        return (segment,)
    ordinary = ~global_keys if segment.key_mask is None else segment.key_mask & ~global_keys
    return (
        replace(segment, key_mask=ordinary),
        Segment(found.take(segment.key), found.take(segment.value), key_mask=found.valid),
    )
