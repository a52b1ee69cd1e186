"""``sdpa``: everything on ``torch.nn.functional.scaled_dot_product_attention`` and the kernels behind it.

A dense pattern is one call. A local pattern, or several segments, go in blocks of queries that see only their span of
keys: on the CPU through the FlashAttention kernel and log-sum-exp unions (:mod:`attnzoo.backends.sdpa.flash_cpu`),
elsewhere, and where dropout or a trained bias is asked for, through one public call per block on concatenated keys.
The kernel is chosen here and then enforced, so that what is reported is what ran.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends.common.blocks import DENSE_ROWS, Masks, additive, block_size, blocks, positive_scale, sees_all
from attnzoo.backends.sdpa import flash_cpu, math_blocks
from attnzoo.backends.sdpa.pieces import Pieces, join_masks
from attnzoo.errors import Refusal
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Result
from attnzoo.spec.transforms import TRANSFORMS, transforms_around


@dataclass(frozen=True)
class SdpaBackend(Backend):
    """Scaled dot-product attention of PyTorch, blocked where the pattern is local."""

    name: ClassVar[str] = "sdpa"
    priority: ClassVar[int] = 10
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        patterns=frozenset({Full, Causal, Window, Chunks, SortedChunks, HashedChunks}),
        segments=1 << 16,
        key_mask=True,
        mask=True,
        bias=frozenset({"relative", "dense"}),
        bias_grad=True,
        gqa=True,
        uneven_value_dim=True,
        dropout=True,
        grad=True,
        transforms=TRANSFORMS,
    )

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        in_order = (SortedChunks, HashedChunks)
        sorted_with_bias = any(s.bias is not None and isinstance(s.pattern, in_order) for s in request.segments)
        allowed = "SortedChunks and HashedChunks without a bias"
        more = (Refusal("bias", "a bias on sorted keys", allowed),) if sorted_with_bias else ()
        return (*super().refusals(request), *more)

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        # The kernels behind read rows as if they were contiguous, checked or not.
        attention = positive_scale(attention.with_tensors(tuple(map(_contiguous_rows, attention.tensors()))))
        causal = _is_single_causal(attention)
        if causal or _is_single_whole(attention):
            (segment,) = attention.segments
            seen = None if segment.key_mask is None else segment.key_mask[:, None, None, :]
            output, live, kernel = _call(attention, attention.query, segment.key, segment.value, seen, None, causal)
            return Result(attention.fill(output, live), kernel)
        if _lse_kernel_takes(attention):
            return Result(flash_cpu.attend(attention), flash_cpu.KERNEL)
        if any(segment.pattern.query_order is not None for segment in attention.segments):
            return Result(math_blocks.attend(attention), math_blocks.KERNEL)
        # Concatenated keys are copied for every block: larger blocks copy less, as long as masks stay small.
        size = block_size(attention)
        return _concatenated(attention, min(attention.q_len, max(size, min(4 * size, DENSE_ROWS))))


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 0 or tensor.stride(-1) == 1 else tensor.contiguous()


def _is_single_whole(attention: Attention) -> bool:
    """One segment of which every query sees every key but for padding: one call, and no mask beyond a row of keys."""
    segment = attention.segments[0]
    return (
        len(attention.segments) == 1 and segment.mask is None and segment.bias is None and sees_all(attention, segment)
    )


def _is_single_causal(attention: Attention) -> bool:
    """One segment that torch's own ``is_causal`` says exactly; it aligns query 0 with key 0."""
    segment = attention.segments[0]
    return (
        len(attention.segments) == 1
        and isinstance(segment.pattern, Causal)
        and not sees_all(attention, segment)
        and segment.pattern.shift(attention.q_len, segment.kv_len) == 0
        and segment.key_mask is None
        and segment.mask is None
        and segment.bias is None
    )


def _lse_kernel_takes(attention: Attention) -> bool:
    return (
        attention.query.device.type == "cpu"
        and attention.dropout == 0.0
        and attention.value_dim == attention.head_dim
        and not transforms_around(attention.tensors())  # an autograd.Function of private operators: no rules for those
        and flash_cpu.unavailable() is None
    )


def _concatenated(attention: Attention, size: int) -> Result:
    """One call per block on the concatenated keys of all its parts."""
    plan = list(blocks(attention, list(range(len(attention.segments))), size))
    masks = Masks(attention)
    pieces = [Pieces(attention, index, plan) for index in range(len(attention.segments))]
    outputs, lives, kernels = [], [], set()
    for block, query in zip(plan, attention.query.split(size, dim=2), strict=True):
        rows = (attention.batch, 1, query.shape[2])
        if not block.parts:
            outputs.append(query.sum(-1, keepdim=True).expand(-1, -1, -1, attention.value_dim) * 0.0)
            lives.append(torch.zeros(rows, dtype=torch.bool, device=query.device))
            continue
        key = torch.cat([pieces[part.segment].key(part) for part in block.parts], dim=2)
        value = torch.cat([pieces[part.segment].value(part) for part in block.parts], dim=2)
        output, live, kernel = _call(attention, query, key, value, *join_masks(attention, masks, block), False)
        outputs.append(output)
        lives.append(torch.ones(rows, dtype=torch.bool, device=query.device) if live is None else live)
        kernels.add(kernel)
    heads = max(live.shape[1] for live in lives)
    live = torch.cat([live.expand(attention.batch, heads, -1) for live in lives], dim=2)
    return Result(attention.fill(torch.cat(outputs, dim=2), live), "+".join(sorted(kernels)) or "none")


def _call(
    attention: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    bias: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor | None, str]:
    """One ``scaled_dot_product_attention``: output, rows that see a key (None: all do), and the kernel."""
    live = None
    if seen is not None:
        # Kernels disagree on rows that see nothing. Let such rows see everything; what comes out is dropped later.
        live = seen.any(-1)
        seen = seen | ~live[..., None]
    # On the CPU PyTorch makes a bool mask additive, with a copy of each row that is expanded.
    mask = seen if bias is None and query.device.type != "cpu" else additive(seen, bias, query.dtype)
    mask = None if mask is None else mask.expand(-1, -1, query.shape[2], -1)
    key, value = expand_heads(key, attention.heads), expand_heads(value, attention.heads)
    kernel = _kernel(query, key, value, mask, attention.dropout, causal)
    terms: dict[str, Any] = dict(attn_mask=mask, dropout_p=attention.dropout, is_causal=causal, scale=attention.scale)
    with _enforced(kernel, query, key, value, terms):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, **terms)
    return output, live, _NAMES[kernel]


class _Switches:
    """PyTorch's switches of kernels, which are the process's: other threads' models meet them.

    Calls that rely on them as they are run side by side; who sets them waits for those, runs alone, and puts them back.
    """

    def __init__(self) -> None:
        self._free, self._relied_on = threading.Condition(), 0

    @contextmanager
    def as_they_are(self) -> Iterator[None]:
        with self._free:
            self._relied_on += 1
        try:
            yield
        finally:
            with self._free:
                self._relied_on -= 1
                self._free.notify_all()

    @contextmanager
    def set_to(self, kernel: SDPBackend) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: self._relied_on == 0)
            with sdpa_kernel(kernel):
                yield


_switches = _Switches()


@contextmanager
def _enforced(kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor, terms: dict[str, Any]) -> Iterator[None]:
    """Within, PyTorch takes this kernel for this call, or raises.

    Its switches are touched only where it would take another one of its own accord.
    """
    if torch.compiler.is_compiling():  # torch.compile traces neither a choice nor a lock; it sets the switches itself
        with sdpa_kernel(kernel):
            yield
        return
    with _switches.as_they_are():
        if _own_choice(query, key, value, terms) == kernel:
            yield
            return
    with _switches.set_to(kernel):
        yield


def _own_choice(query: Tensor, key: Tensor, value: Tensor, terms: dict[str, Any]) -> SDPBackend | None:
    """The kernel PyTorch would take of its own accord; None where it does not tell.

    Under ``torch.func`` it chooses anew at each level: a bias may need a gradient at one level and not at the next.
    """
    if transforms_around((query, key, value)):
        return None
    try:
        return SDPBackend(torch._fused_sdp_choice(query, key, value, **terms))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


_NAMES = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.MATH: "math",
}


def _kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> SDPBackend:
    """The fastest kernel that takes this call.

    Of PyTorch's kernels only the plain operations of ``MATH`` have batching rules, tangents and second derivatives. One
    level of ``torch.func.grad`` asks for none of those; but whether a mask gets a gradient shows at that level alone.
    """
    transforms = transforms_around((query, key, value))
    if transforms and (transforms != ("grad",) or mask is not None):
        return SDPBackend.MATH
    trained_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if query.device.type == "cpu":
        fused = dropout == 0.0 and not trained_mask and query.shape[-1] == value.shape[-1]
        return SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
    params = torch.backends.cuda.SDPAParams(query, key, value, mask, dropout, causal, False)
    if torch.backends.cuda.can_use_flash_attention(params):
        return SDPBackend.FLASH_ATTENTION
    if torch.backends.cuda.can_use_efficient_attention(params):
        return SDPBackend.EFFICIENT_ATTENTION
    if torch.backends.cuda.can_use_cudnn_attention(params):
        return SDPBackend.CUDNN_ATTENTION
    return SDPBackend.MATH
