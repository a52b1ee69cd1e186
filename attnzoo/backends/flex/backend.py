"""``flex_attention``: all segments in one call of compiled FlexAttention (Dong et al. 2024, arXiv:2412.05496).

The keys of all segments stand side by side; masks and biases are the patterns' own ``mask_mod`` and ``score_mod``, and
blocks that nobody sees are left out by structure (:mod:`attnzoo.backends.flex.block_lists`).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends.common.blocks import live_rows
from attnzoo.backends.flex.block_lists import BLOCKS, block_indices, real_keys, starts_of
from attnzoo.backends.flex.kernel import Form, Terms, in_rows, kernel, numbers
from attnzoo.errors import BackendRefusedError, Refusal
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, Window
from attnzoo.spec.segments import Attention, Request, Result

_FAR = 1 << 40  # beyond any distance between two tokens
_LEAST_DIM = 16  # of a matrix product in Triton, which PyTorch's CUDA kernels of FlexAttention are written in


@dataclass(frozen=True)
class FlexBackend(Backend):
    """Compiled FlexAttention: forward on the CPU, forward and backward on CUDA."""

    name: ClassVar[str] = "flex_attention"
    aliases: ClassVar[tuple[str, ...]] = ("flex",)
    priority: ClassVar[int] = 5
    compiles: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16}),
        patterns=frozenset({Full, Causal, Window, Chunks}),
        segments=1 << 16,
        key_mask=True,
        bias=frozenset({"relative"}),
        bias_grad=True,
        gqa=True,
        uneven_value_dim=True,
        grad=True,
    )

    @classmethod
    def unavailable(cls) -> str | None:
        if os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1":
            return "torch.compile is off (TORCHDYNAMO_DISABLE=1), and FlexAttention is of use compiled only"
        return None

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        found = self.refusals_anywhere(request)
        if request.device == "cpu" and not _compiles_on_cpu():
            found += (Refusal("device", "cpu without AVX2 or a C++ compiler", "cpu with both, or cuda"),)
        return found

    def refusals_anywhere(self, request: Request) -> tuple[Refusal, ...]:
        found = self.capabilities.refusals(request)
        if request.device == "cpu" and request.grad:
            found += (Refusal("grad", "requested on cpu", "torch.no_grad() on cpu, or cuda"),)
        narrow = min(request.head_dim, request.value_dim)
        if request.device == "cuda" and narrow < _LEAST_DIM:
            found += (Refusal("head_dim", str(narrow), f"at least {_LEAST_DIM} on cuda"),)
        return found

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        _check_biases(attention)
        # One layout, so that one kernel does: that of models for queries, which is the output's too; keys next to each
        # other, which is a sixth faster on the CPU than in the layout of models.
        query = in_rows(attention.query)
        key, value = _side_by_side(attention)
        form, terms = _form(attention, query, key, value), _terms(attention)
        with torch.set_grad_enabled(any(form.trained)):
            output = kernel(form)(query, key, value, block_indices(attention), terms)
        # Rows that see nothing are zero already.
        live = None if attention.empty is None else live_rows(attention)
        return Result(attention.fill(output, live), f"flex_{query.device.type}")


def _check_biases(attention: Attention) -> None:
    """Raise unless all biases are looked up in a table, as the kernel does: a subclass may have a truth of its own."""
    for segment in attention.segments:
        if segment.bias is not None and type(segment.bias) is not RelativeBias:
            reason = Refusal("bias", type(segment.bias).__name__, "RelativeBias itself, not another class of its kind")
            raise BackendRefusedError(FlexBackend.name, {"attention": (reason,)}, {})


def _compiles_on_cpu() -> bool:
    # PyTorch tells neither in public; these are the two conditions its CPU kernels of FlexAttention state.
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT" and any(
        name and shutil.which(name) for name in compilers
    )


def _side_by_side(attention: Attention) -> tuple[Tensor, Tensor]:
    """Keys and values of all segments."""
    segments = attention.segments
    alike = len({segment.key.shape[1] for segment in segments}) == 1
    heads = segments[0].key.shape[1] if alike else attention.heads
    key = torch.cat([expand_heads(segment.key, heads) for segment in segments], dim=2)
    value = torch.cat([expand_heads(segment.value, heads) for segment in segments], dim=2)
    return key.contiguous(), value.contiguous()


def _form(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Form:
    biases = [segment.bias for segment in attention.segments]
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    values = [bias.values for bias in biases if bias is not None]
    trains = torch.is_grad_enabled()
    return Form(
        chunked=tuple(isinstance(segment.pattern, Chunks) for segment in attention.segments),
        biased=bool(values),
        placed=tuple(isinstance(bias, RelativeBias) and bias.positions is not None for bias in biases),
        scale=float(attention.scale),
        blocks=BLOCKS[query.device.type],
        dtype=query.dtype,
        device=query.device,
        threads=torch.get_num_threads(),
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        single=tuple(size == 1 for size in sizes),
        trained=(
            *(trains and tensor.requires_grad for tensor in (query, key, value)),
            trains and any(one.requires_grad for one in values),
        ),
    )


def _terms(attention: Attention) -> Terms:
    """What the kernel computes masks and biases from."""
    starts, device = starts_of(attention), attention.query.device
    patterns, biases, tables, positions, entries = [], [], [], [], 0
    for segment, start in zip(attention.segments, starts, strict=False):
        own = _numbers(segment.pattern, attention.q_len, segment.kv_len)
        patterns.append(numbers(start, start + segment.kv_len, *own, device=device))
        bias, zero, shift = segment.bias, 0, 0
        values = attention.query.new_zeros((1, 1), dtype=torch.float32) if bias is None else bias.values.float()
        placed = torch.zeros(17, dtype=torch.long, device=device)
        if isinstance(bias, RelativeBias):
            zero, shift = bias.zero, segment.kv_len - attention.q_len if bias.offset is None else bias.offset
            placed = placed if bias.positions is None else bias.positions.flatten().contiguous()
        biases.append(numbers(zero, shift, entries, entries + values.shape[1] - 1, device=device))
        tables.append(values.expand(attention.heads, -1))
        positions.append(placed)
        entries += values.shape[1]
    real = real_keys(attention).expand(attention.batch, -1).flatten().contiguous()  # of one key it is a repeated one
    sizes = numbers(starts[-1], entries, attention.q_len, device=device)
    return Terms(sizes, tuple(patterns), real, tuple(biases), torch.cat(tables, dim=1).flatten(), tuple(positions))


def _numbers(pattern: Pattern, q_len: int, kv_len: int) -> list[int]:
    """A pattern in the numbers of :class:`~attnzoo.backends.flex.kernel.Terms`."""
    if isinstance(pattern, Chunks):
        count = -(-kv_len // pattern.length)
        return [pattern.length, pattern.before, pattern.before + pattern.after, count, int(pattern.causal)]
    lowest, highest = -_FAR, _FAR
    if isinstance(pattern, (Causal, Window)):
        highest = pattern.shift(q_len, kv_len)
    if isinstance(pattern, Window):
        lowest, highest = highest - pattern.left, highest + pattern.right
    return [lowest, highest, 0, 0, 0]
