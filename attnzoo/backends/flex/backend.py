"""``flex_attention``: one call of compiled FlexAttention for all segments (Dong et al. 2024, arXiv:2412.05496).

The keys of all segments are concatenated. The kernel computes masks and biases from the definitions of the patterns,
and skips blocks without visible keys (:mod:`attnzoo.backends.common.block_lists`).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnzoo.backend import Backend, Capabilities
from attnzoo.backends.common.block_lists import BlockShape, block_lists, segment_starts, unpadded_keys
from attnzoo.backends.common.blocks import visible_rows
from attnzoo.backends.flex.kernel import Form, Terms, compiled_kernel, in_rows, scalars
from attnzoo.errors import BackendRefusedError, Refusal
from attnzoo.spec.bias import RelativeBias
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, Window
from attnzoo.spec.segments import Attention, Request, Result

# CUDA kernels divide a block into tiles of at most 128 queries.
BLOCK_SHAPES = {"cpu": BlockShape(64, 64), "cuda": BlockShape(128, 128)}
_LEAST_DIM = 16  # the smallest dimension of a matrix product in Triton, which compiles the CUDA kernels


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
        softcap=True,
    )

    @classmethod
    def unavailable(cls) -> str | None:
        if os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1":
            return "TORCHDYNAMO_DISABLE=1 turns off torch.compile, which FlexAttention needs: unset TORCHDYNAMO_DISABLE"
        return None

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        refusals = self.refusals_anywhere(request)
        if request.device == "cpu" and not _compiles_on_cpu():
            refusals += (Refusal("device", "cpu without AVX2 or without a C++ compiler", "cuda, or a cpu with both"),)
        return refusals

    def refusals_anywhere(self, request: Request) -> tuple[Refusal, ...]:
        refusals = self.capabilities.refusals(request)
        if request.device == "cpu" and request.grad:
            refusals += (Refusal("grad", "True on cpu", "torch.no_grad() on cpu, or device cuda"),)
        dim = min(request.head_dim, request.value_dim)
        if request.device == "cuda" and dim < _LEAST_DIM:
            refusals += (Refusal("head_dim", str(dim), f"at least {_LEAST_DIM} on cuda"),)
        return refusals

    def run(self, attention: Attention, probabilities: bool = False) -> Result:
        _check_biases(attention)
        # A kernel is compiled for one memory layout. Queries and output have the layout of models. Keys and values are
        # contiguous per head instead: on the CPU, this is a sixth faster than the layout of models.
        query = in_rows(attention.query)
        key, value = _joined_keys_values(attention)
        form, terms = _form(attention, query, key, value), _terms(attention)
        with torch.set_grad_enabled(any(form.trained)):
            output = compiled_kernel(form)(query, key, value, block_lists(attention, form.block), terms)
        # The kernel returns zeros for rows that see no key.
        rows = None if attention.empty is None else visible_rows(attention)
        return Result(attention.fill(output, rows), f"flex_{query.device.type}")


def _check_biases(attention: Attention) -> None:
    """Raise if a bias has a subclass of ``RelativeBias``, because the kernel ignores overridden methods."""
    for segment in attention.segments:
        if segment.bias is not None and type(segment.bias) is not RelativeBias:
            reason = Refusal("bias", type(segment.bias).__name__, "RelativeBias itself, no subclass")
            raise BackendRefusedError(FlexBackend.name, {"attention": (reason,)}, {})


def _compiles_on_cpu() -> bool:
    # FlexAttention requires both on the CPU. PyTorch has no public function that checks these conditions.
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT" and any(
        name and shutil.which(name) for name in compilers
    )


def _joined_keys_values(attention: Attention) -> tuple[Tensor, Tensor]:
    segments = attention.segments
    equal = len({segment.key.shape[1] for segment in segments}) == 1
    heads = segments[0].key.shape[1] if equal else attention.heads
    key = torch.cat([expand_heads(segment.key, heads) for segment in segments], dim=2)
    value = torch.cat([expand_heads(segment.value, heads) for segment in segments], dim=2)
    return key.contiguous(), value.contiguous()


def _form(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Form:
    biases = [segment.bias for segment in attention.segments]
    sizes = (query.shape[0], query.shape[2], key.shape[2])
    tables = [bias.values for bias in biases if bias is not None]
    trains = torch.is_grad_enabled()
    return Form(
        is_chunked=tuple(isinstance(segment.pattern, Chunks) for segment in attention.segments),
        has_bias=bool(tables),
        has_positions=tuple(isinstance(bias, RelativeBias) and bias.positions is not None for bias in biases),
        scale=float(attention.scale),
        has_softcap=attention.softcap is not None,
        block=BLOCK_SHAPES[query.device.type],
        dtype=query.dtype,
        device=query.device,
        threads=torch.get_num_threads(),
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        is_single=tuple(size == 1 for size in sizes),
        trained=(
            *(trains and tensor.requires_grad for tensor in (query, key, value)),
            trains and any(table.requires_grad for table in tables),
        ),
    )


def _terms(attention: Attention) -> Terms:
    starts, device = segment_starts(attention), attention.query.device
    patterns, biases, tables, all_positions, entries = [], [], [], [], 0
    for segment, start in zip(attention.segments, starts, strict=False):
        numbers = _pattern_numbers(segment.pattern, attention.q_len, segment.kv_len)
        patterns.append(scalars(start, start + segment.kv_len, *numbers, device=device))
        bias, zero, shift = segment.bias, 0, 0
        table = attention.query.new_zeros((1, 1), dtype=torch.float32) if bias is None else bias.values.float()
        positions = torch.zeros(17, dtype=torch.long, device=device)
        if isinstance(bias, RelativeBias):
            zero, shift = bias.zero, segment.kv_len - attention.q_len if bias.offset is None else bias.offset
            positions = positions if bias.positions is None else bias.positions.flatten().contiguous()
        biases.append(scalars(zero, shift, entries, entries + table.shape[1] - 1, device=device))
        tables.append(table.expand(attention.heads, -1))
        all_positions.append(positions)
        entries += table.shape[1]
    # With a single key, the flattened mask is a view of one repeated element, so contiguous() is needed.
    unpadded = unpadded_keys(attention).expand(attention.batch, -1).flatten().contiguous()
    sizes = scalars(starts[-1], entries, attention.q_len, device=device)
    table = torch.cat(tables, dim=1).flatten()
    softcap = torch.full((), attention.softcap or 1.0, device=device)
    return Terms(sizes, tuple(patterns), unpadded, tuple(biases), table, tuple(all_positions), softcap)


def _pattern_numbers(pattern: Pattern, q_len: int, kv_len: int) -> list[int]:
    """Return the five numbers that describe a pattern (:class:`~attnzoo.backends.flex.kernel.Terms`)."""
    if isinstance(pattern, Chunks):
        count = -(-kv_len // pattern.length)
        return [pattern.length, pattern.before, pattern.before + pattern.after, count, int(pattern.causal)]
    band = pattern.band(q_len, kv_len)
    if band is None:
        raise NotImplementedError(f"got {pattern}, which is no band of keys; allowed: a pattern in the capabilities")
    return [*band, 0, 0, 0]
