"""The backend ``sdpa``: ``torch.nn.functional.scaled_dot_product_attention`` and the kernels that it calls.

A call of this function is a *public call* below. One public call is enough in two cases. Either there is one segment
with neither bias nor dense mask, and its pattern hides no key or is ``is_causal``. Or there are one query and one
segment. Any other attention is computed in blocks, by the first of these methods that supports the attention:

- On the CPU, with neither dropout nor function transforms, and with ``value_dim == head_dim``: PyTorch's CPU
  FlashAttention kernel. The results for the parts are merged by log-sum-exp (:mod:`attnzoo.backends.sdpa.flash_cpu`).
- With segments that reorder the queries: plain PyTorch operations (:mod:`attnzoo.backends.sdpa.math_blocks`).
- Otherwise: one public call per block, on the concatenated keys of all parts of the block.

This module chooses the kernel of a public call and forces PyTorch to use this kernel. So ``Result.kernel`` is correct.
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
from attnzoo.backends.sdpa.pieces import KeyPieces, join_masks, join_parts
from attnzoo.errors import Refusal
from attnzoo.spec.chosen_blocks import ChosenBlocks
from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Attention, Request, Result, Segment
from attnzoo.spec.transforms import TRANSFORMS, transforms_around


@dataclass(frozen=True)
class SdpaBackend(Backend):
    """PyTorch's scaled dot-product attention, computed in blocks if the pattern is local."""

    name: ClassVar[str] = "sdpa"
    priority: ClassVar[int] = 10
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        patterns=frozenset({Full, Causal, Window, Chunks, SortedChunks, HashedChunks, ChosenBlocks}),
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
        refusals = super().refusals(request)
        without_bias = SortedChunks | HashedChunks | ChosenBlocks
        if any(s.bias is not None and isinstance(s.pattern, without_bias) for s in request.segments):
            got = "a bias with SortedChunks, HashedChunks or ChosenBlocks"
            refusals += (Refusal("bias", got, "no bias with these patterns"),)
        return refusals

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        if attention.scale <= 0.0:
            attention = positive_scale(attention)
        segment = attention.segments[0]
        terms = _terms_of_one_call(attention, segment) if len(attention.segments) == 1 else None
        if terms is not None:
            query, key, value = map(_contiguous_rows, (attention.query, segment.key, segment.value))
            output, visible_rows, kernel = _call(attention, query, (key, value), *terms)
            if visible_rows is not None or attention.query_mask is not None:
                output = attention.fill(output, visible_rows)
            return Result(output, kernel)
        attention = attention.with_tensors(tuple(map(_contiguous_rows, attention.tensors())))
        if _can_use_cpu_kernel(attention):
            return Result(flash_cpu.attend(attention), flash_cpu.KERNEL)
        if any(segment.pattern.query_order is not None for segment in attention.segments):
            return Result(math_blocks.attend(attention), math_blocks.KERNEL)
        # Every block copies the keys of its parts. Larger blocks copy fewer keys in total, but need larger masks.
        size = block_size(attention)
        return _concatenated(attention, min(attention.q_len, max(size, min(4 * size, DENSE_ROWS))))


def _contiguous_rows(tensor: Tensor) -> Tensor:
    # The kernels read each row as contiguous memory, and some kernels do not check this.
    return tensor if tensor.ndim == 0 or tensor.stride(-1) == 1 else tensor.contiguous()


def _terms_of_one_call(attention: Attention, segment: Segment) -> tuple[Tensor | None, Tensor | None, bool] | None:
    """Return mask, bias and ``is_causal`` of a public call that computes an attention over one segment.

    None means that the attention must be computed in blocks. A dense mask or a bias needs blocks, because several
    queries would need a copy as large as the scores. For one query, as in a decoding step, this copy is small.
    """
    sees_every_key = type(segment.pattern) is Full or sees_all(attention, segment)
    visible = None if segment.key_mask is None else segment.key_mask[:, None, None]
    if segment.mask is None and segment.bias is None:
        return (visible, None, not sees_every_key) if sees_every_key or _is_causal(attention, segment) else None
    if attention.q_len > 1 or not sees_every_key:
        return None
    if segment.mask is not None:
        visible = segment.mask if visible is None else segment.mask & visible
    if segment.bias is None:
        return visible, None, False
    bias = segment.bias.of_query(0, attention.q_len, segment.kv_len)
    return None if bias is None else (visible, bias, False)


def _is_causal(attention: Attention, segment: Segment) -> bool:
    """Whether a call with ``is_causal=True`` and without a mask computes the attention over this segment.

    PyTorch then places query 0 at key 0, and accepts no other mask.
    """
    return (
        isinstance(segment.pattern, Causal)
        and segment.key_mask is None
        and segment.pattern.shift(attention.q_len, segment.kv_len) == 0
    )


def _can_use_cpu_kernel(attention: Attention) -> bool:
    return (
        attention.query.device.type == "cpu"
        and attention.dropout == 0.0
        and attention.value_dim == attention.head_dim
        and not transforms_around(attention.tensors())  # the union supports no transforms
        and flash_cpu.unavailable() is None
    )


def _concatenated(attention: Attention, size: int) -> Result:
    """Compute each block by one public call on the concatenated keys of all parts of the block."""
    indices = list(range(len(attention.segments)))
    all_blocks = list(blocks(attention, indices, size))
    masks = Masks(attention)
    pieces = {index: KeyPieces(attention, index, all_blocks) for index in indices}
    outputs, visible_rows, kernels = [], [], set()
    for block, query in zip(all_blocks, attention.query.split(size, dim=2), strict=True):
        shape = (attention.batch, 1, query.shape[2])
        if not block.parts:
            outputs.append(query.sum(-1, keepdim=True).expand(-1, -1, -1, attention.value_dim) * 0.0)
            visible_rows.append(query.new_zeros(shape, dtype=torch.bool))
            continue
        terms = join_masks(attention, masks, block)
        output, some_rows, kernel = _call(attention, query, join_parts(pieces, block), *terms, False)
        outputs.append(output)
        visible_rows.append(query.new_ones(shape, dtype=torch.bool) if some_rows is None else some_rows)
        kernels.add(kernel)
    heads = max(rows.shape[1] for rows in visible_rows)
    joined = torch.cat([rows.expand(attention.batch, heads, -1) for rows in visible_rows], dim=2)
    return Result(attention.fill(torch.cat(outputs, dim=2), joined), "+".join(sorted(kernels)) or "none")


def _call(
    attention: Attention,
    query: Tensor,
    keys_values: tuple[Tensor, Tensor],
    visible: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None, str]:
    """Run one public call. Return the output, which queries see a key, and the kernel name.

    The second result is bool, broadcastable to ``(batch, heads, n)``, True for queries that see a key. None means that
    all queries see a key.
    """
    visible_rows = None
    if visible is not None:
        # Kernels disagree on rows that see no key. Let such rows see every key. The caller replaces their output.
        visible_rows = visible.any(-1)
        visible = visible | ~visible_rows[..., None]
    # On the CPU, make the mask additive: PyTorch would convert a bool mask, and copy each row of an expanded mask.
    mask = visible
    if bias is not None or (visible is not None and query.is_cpu):
        mask = additive(visible, bias, query.dtype)
    if mask is not None:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    shape, (key, value) = query.shape, keys_values
    if shape[2] == 1 and key.shape[1] != shape[1] and (mask is None or mask.shape[1] == 1):
        # A new token: the queries of the heads that share a key head become rows of one head. No key is copied.
        query = query.reshape(shape[0], key.shape[1], -1, shape[3])
        mask = None if mask is None else mask.expand(-1, -1, query.shape[2], -1)
    elif key.shape[1] != shape[1]:
        key, value = expand_heads(key, shape[1]), expand_heads(value, shape[1])
    transforms = transforms_around((query, key, value))
    kernel = _kernel(query, key, value, mask, attention.dropout, is_causal, transforms)
    terms: dict[str, Any] = {
        "attn_mask": mask, "dropout_p": attention.dropout, "is_causal": is_causal, "scale": attention.scale
    }  # fmt: skip
    if kernel is _FLASH and query.is_cpu and not transforms and _can_call_flash_cpu():
        # The operator is the kernel. A public call would choose the kernel by global switches, so this module would
        # have to ask for the choice and to lock the switches. In a decoding step, this takes as long as the kernel.
        output = flash_cpu.call(query, key, value, terms)
    else:
        with _enforced(kernel, query, key, value, terms):
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, **terms)
    if query.shape != shape:
        output = output.reshape(*shape[:3], -1)
    return output, visible_rows, _NAMES[kernel]


def _can_call_flash_cpu() -> bool:
    """Whether the operator of the CPU kernel can replace a public call that runs this kernel.

    torch.compile and function transforms have rules for the public call, but not for all operators that it calls.
    """
    return not torch.compiler.is_compiling() and flash_cpu.unavailable() is None


class _Switches:
    """Lock around PyTorch's global switches that enable and disable kernels. A change affects all threads.

    Calls that do not change the switches may run at the same time. A call that changes the switches first waits for
    all running calls, then runs alone, and finally restores the switches.
    """

    def __init__(self) -> None:
        self._free, self._users = threading.Condition(), 0

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        with self._free:
            self._users += 1
        try:
            yield
        finally:
            with self._free:
                self._users -= 1
                self._free.notify_all()

    @contextmanager
    def set_to(self, kernel: SDPBackend) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: self._users == 0)
            with sdpa_kernel(kernel):
                yield


_switches = _Switches()


@contextmanager
def _enforced(kernel: SDPBackend, query: Tensor, key: Tensor, value: Tensor, terms: dict[str, Any]) -> Iterator[None]:
    """Context in which PyTorch runs ``kernel`` or raises. Switches change only if PyTorch would run another kernel."""
    if torch.compiler.is_compiling():  # torch.compile cannot trace the choice or the lock
        with sdpa_kernel(kernel):
            yield
        return
    with _switches.unchanged():
        if _default_kernel(query, key, value, terms) == kernel:
            yield
            return
    with _switches.set_to(kernel):
        yield


def _default_kernel(query: Tensor, key: Tensor, value: Tensor, terms: dict[str, Any]) -> SDPBackend | None:
    """Return the kernel that PyTorch would choose, or None if this is unknown, e.g. under ``torch.func`` transforms."""
    if transforms_around((query, key, value)):
        return None
    try:
        return SDPBackend(torch._fused_sdp_choice(query, key, value, **terms))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


_FLASH = SDPBackend.FLASH_ATTENTION
_NAMES = {
    _FLASH: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.MATH: "math",
}


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    transforms: tuple[str, ...],
) -> SDPBackend:
    """Return the fastest kernel that can run this call. ``transforms`` are those around the call.

    ``MATH`` consists of plain operations. Only ``MATH`` supports ``vmap``, ``jvp`` and second derivatives. Under a
    single ``torch.func.grad``, a call with a mask also gets ``MATH``, because this function cannot see there whether
    the mask needs a gradient.
    """
    if transforms and (transforms != ("grad",) or mask is not None):
        return SDPBackend.MATH
    trained_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if query.is_cpu:
        fused = dropout == 0.0 and not trained_mask and query.shape[-1] == value.shape[-1]
        return _FLASH if fused else SDPBackend.MATH
    cuda = torch.backends.cuda
    params = cuda.SDPAParams(query, key, value, mask, dropout, causal, False)
    if cuda.can_use_flash_attention(params):
        return _FLASH
    if cuda.can_use_efficient_attention(params):
        return SDPBackend.EFFICIENT_ATTENTION
    return SDPBackend.CUDNN_ATTENTION if cuda.can_use_cudnn_attention(params) else SDPBackend.MATH
