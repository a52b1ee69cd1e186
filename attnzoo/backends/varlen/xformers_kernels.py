"""The kernels of ``xformers.ops.memory_efficient_attention`` (Lefaudeux et al. 2022).

The arguments are tensors ``(batch, rows, heads, dim)`` and a bias object, which describes the sequences and the visible
keys within each sequence. Every call names an operator, so the reported kernel is always the kernel that ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import groupby
from textwrap import shorten
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from attnzoo.backends.common.union import Grads
from attnzoo.backends.varlen.calls import NO_LIMIT, Sequences, rows_of
from attnzoo.backends.varlen.kernels import Inputs, PackedKernel, changed_signature, example_device, import_package
from attnzoo.errors import Refusal, raise_interrupts
from attnzoo.spec.patterns import Window
from attnzoo.spec.segments import Request

_INPUTS = ("query", "key", "value", "attn_bias", "p", "scale", "op")
_FUNCTIONS = {
    "memory_efficient_attention": _INPUTS,
    "memory_efficient_attention_forward_requires_grad": _INPUTS,
    "memory_efficient_attention_backward": ("grad", "output", "lse", *_INPUTS),
}
_LSE_ALIGNMENT = 32
_LONGEST_REASON = 120  # characters per operator, because one message contains the reasons of two operators


@cache
def _package() -> tuple[ModuleType | None, str]:
    module, why = import_package("xformers.ops.fmha", "xformers")
    if module is not None and (changed := changed_signature(module, _FUNCTIONS, "xformers")):
        return None, changed
    return module, why


@cache
def _operator_unavailable(name: str, deterministic: bool) -> str | None:
    """Return why an operator (a module of xformers with ``FwOp`` and ``BwOp``) cannot be used, or None.

    ``is_available()`` is True even if the compiled extension of xformers does not load, for example with a wheel for
    another CUDA version. So this function also asks ``not_supported_reasons`` of ``FwOp`` and ``BwOp`` about a small
    example. The answer depends on PyTorch's switch for deterministic algorithms. The cache needs the state of this
    switch as an argument, ``deterministic``.
    """
    fmha, why = _package()
    if fmha is None:
        return why
    reasons: list[str] = []
    try:
        operators: list[Any] = [getattr(getattr(fmha, name, None), half, None) for half in ("FwOp", "BwOp")]
        if not all(operator is not None and operator.is_available() for operator in operators):
            return f"xformers has no working operator {name!r}: run python -m xformers.info"
        example = _example(fmha)
        for operator in operators if example is not None else ():
            reasons += operator.not_supported_reasons(example)
    except BaseException as error:
        raise_interrupts(error)
        return f"xformers' operator {name!r} fails its check: {type(error).__name__}: {error}"
    if not reasons:
        return None
    short = shorten("; ".join(dict.fromkeys(reasons)), _LONGEST_REASON, placeholder=" ...")
    return f"xformers' operator {name!r} does not run here: {short}: run python -m xformers.info"


def _example(fmha: Any) -> Any:
    """Return inputs for a test of an operator: one sequence of 8 tokens. Return None if no device is usable."""
    device = example_device()
    if device is None:
        return None
    query = torch.zeros((1, 8, 1, 32), dtype=torch.float16, device=device)
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens([8], [8], device=device)
    return fmha.Inputs(query, query, query, attn_bias=bias, scale=1.0)


class _Bias(NamedTuple):
    """A bias object of xformers, and the rows of the packed queries and keys that the object describes."""

    bias: Any
    q_rows: slice
    k_rows: slice
    samples: int  # the rows are divided into this number of samples of equal length


class _XformersKernel(PackedKernel):
    """Base class of :class:`XformersFlashKernel` and :class:`XformersCutlassKernel`. Each calls one operator."""

    operator: ClassVar[str]

    @classmethod
    def unavailable(cls) -> str | None:
        return _operator_unavailable(cls.operator, torch.are_deterministic_algorithms_enabled())

    @classmethod
    def attend(cls, inputs: Inputs) -> Tensor:
        operators = getattr(_fmha(), cls.operator)
        outputs = []
        for bias in _biases(inputs.sequences):
            output = _fmha().memory_efficient_attention(
                *_rows(bias, inputs), attn_bias=bias.bias, scale=inputs.scale, op=(operators.FwOp, operators.BwOp)
            )
            if output.requires_grad:  # sum() passes an expanded gradient, and the flash operator needs contiguous rows
                output.register_hook(torch.Tensor.contiguous)
            outputs.append(output.flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @classmethod
    def forward(cls, inputs: Inputs) -> tuple[Tensor, Tensor, Any]:
        operator = getattr(_fmha(), cls.operator).FwOp
        outputs, lses = [], []
        for bias in _biases(inputs.sequences):
            output, lse = _fmha().memory_efficient_attention_forward_requires_grad(
                *_rows(bias, inputs), attn_bias=bias.bias, scale=inputs.scale, op=operator
            )
            outputs.append(output.flatten(0, 1))
            lses.append(cls.from_lse(lse, inputs.sequences))
        return torch.cat(outputs), torch.cat(lses, dim=1), None

    @classmethod
    def backward(cls, inputs: Inputs, grad_out: Tensor, out: Tensor, lse: Tensor, state: Any) -> Grads:
        operator = getattr(_fmha(), cls.operator).BwOp
        parts = []
        for bias in _biases(inputs.sequences):
            results = [tensor[bias.q_rows].unflatten(0, (bias.samples, -1)) for tensor in (grad_out, out)]
            results.append(cls.to_lse(lse[:, bias.q_rows], bias.samples, inputs.sequences))
            grads = _fmha().memory_efficient_attention_backward(
                *results, *_rows(bias, inputs), attn_bias=bias.bias, scale=inputs.scale, op=operator
            )
            parts.append([grad.flatten(0, 1) for grad in grads])
        grad_q, grad_k, grad_v = (torch.cat(grads) for grads in zip(*parts, strict=True))
        kv_heads = inputs.key.shape[1]
        return grad_q, _sum_groups(grad_k, kv_heads), _sum_groups(grad_v, kv_heads)

    @classmethod
    def from_lse(cls, lse: Tensor, sequences: Sequences) -> Tensor:
        """Convert lse from the layout of the operator to ``(heads, rows)``."""
        return lse.transpose(0, 1).flatten(1)

    @classmethod
    def to_lse(cls, lse: Tensor, samples: int, sequences: Sequences) -> Tensor:
        """Convert lse from ``(heads, rows)`` to the layout of the operator. ``samples`` is from :class:`_Bias`."""
        return lse.unflatten(1, (samples, -1)).transpose(0, 1).contiguous()


class XformersFlashKernel(_XformersKernel):
    """FlashAttention 2 through xformers, which calls the package ``flash_attn`` or PyTorch."""

    name: ClassVar[str] = "xformers_flash"
    operator: ClassVar[str] = "flash"


class XformersCutlassKernel(_XformersKernel):
    """The cutlass kernel of xformers, which supports float32 and a large ``head_dim``.

    This class refuses windows, because the backward cannot align the last query with the last key in a window. The
    operator returns lse as ``(sequences, heads, width)``. ``width`` is at least the length of the longest sequence.
    """

    name: ClassVar[str] = "xformers_cutlass"
    operator: ClassVar[str] = "cutlass"
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.bfloat16, torch.float16})
    max_dim: ClassVar[int] = 65536
    windows: ClassVar[bool] = False

    @classmethod
    def refusals(cls, request: Request) -> tuple[Refusal, ...]:
        windows = [segment.pattern for segment in request.segments if isinstance(segment.pattern, Window)]
        allowed = f"a pattern other than Window with kernel {cls.name}"
        return (*super().refusals(request), *(Refusal("pattern", str(window), allowed) for window in windows))

    @classmethod
    def from_lse(cls, lse: Tensor, sequences: Sequences) -> Tensor:
        return super().from_lse(lse, sequences).index_select(1, _padded_rows(sequences, lse.shape[2]))

    @classmethod
    def to_lse(cls, lse: Tensor, samples: int, sequences: Sequences) -> Tensor:
        width = -(-max(sequences.q_lens) // _LSE_ALIGNMENT) * _LSE_ALIGNMENT
        count = len(sequences.q_lens)
        padded = lse.new_full((lse.shape[0], count * width), torch.inf)
        padded.index_copy_(1, _padded_rows(sequences, width), lse)
        return padded.unflatten(1, (count, width)).transpose(0, 1).contiguous()


def _fmha() -> Any:
    return _package()[0]


def _padded_rows(sequences: Sequences, width: int) -> Tensor:
    """Return the row index that each query has after every sequence is padded to ``width`` rows.

    For example, lengths 2 and 3 and width 4 give 0, 1, 4, 5, 6.
    """
    starts = range(0, len(sequences.q_lens) * width, width)
    return rows_of(starts, sequences.q_lens, sequences.device)


def _biases(sequences: Sequences) -> Iterator[_Bias]:
    """Yield bias objects that together describe all sequences.

    With ``right=0``, or if ``left`` and ``right`` are ``NO_LIMIT``, one object is enough. Otherwise, consecutive
    sequences share an object only if they have equal lengths.
    """
    masks, (left, right) = _fmha().attn_bias, (sequences.left, sequences.right)
    q_lens, k_lens = list(sequences.q_lens), list(sequences.k_lens)
    if (left, right) == (NO_LIMIT, NO_LIMIT) or right == 0:
        bias = masks.BlockDiagonalMask.from_seqlens(q_lens, k_lens, device=sequences.device)
        if right == 0 and left == NO_LIMIT:
            bias = bias.make_causal_from_bottomright()
        elif right == 0:
            bias = bias.make_local_attention_from_bottomright(left + 1)
        yield _Bias(bias, slice(None), slice(None), 1)
        return
    q_start = k_start = 0
    for (q_len, k_len), run in groupby(zip(q_lens, k_lens, strict=True)):
        samples = len(list(run))
        reach = [q_len + k_len if extent == NO_LIMIT else extent for extent in (left, right)]
        bias = masks.LocalAttentionFromBottomRightMask(window_left=reach[0], window_right=reach[1])
        q_stop, k_stop = q_start + samples * q_len, k_start + samples * k_len
        yield _Bias(bias, slice(q_start, q_stop), slice(k_start, k_stop), samples)
        q_start, k_start = q_stop, k_stop


def _rows(bias: _Bias, inputs: Inputs) -> list[Tensor]:
    """Return the rows of a bias object in query, key and value, ``(samples, rows, heads, dim)``.

    Key heads are repeated, because the backward does not support fewer key heads than query heads.
    """
    heads = inputs.query.shape[1]
    keys_values = (_expand(tensor[bias.k_rows], heads) for tensor in (inputs.key, inputs.value))
    return [tensor.unflatten(0, (bias.samples, -1)) for tensor in (inputs.query[bias.q_rows], *keys_values)]


def _expand(tensor: Tensor, heads: int) -> Tensor:
    rows, kv_heads, dim = tensor.shape
    return tensor[:, :, None].expand(rows, kv_heads, heads // kv_heads, dim).flatten(1, 2)


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    return grad if grad.shape[1] == kv_heads else grad.unflatten(1, (kv_heads, -1)).float().sum(2).to(grad.dtype)
