"""Peers that are kernels of PyTorch: what a user without attnzoo would call on a GPU for a similar attention.

Like all peers, they compute a function that is similar to the family's attention, on random tensors, without a gate:

- ``FA2 window`` is FlashAttention 2 (``varlen_attn``), with the window alone: no bias, no global keys.
- ``cuDNN`` is ``scaled_dot_product_attention`` on cuDNN's kernel, for causal attention.
- ``FlexAttention`` is written by hand for the pattern: constants in the mask, a block mask made by arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attnzoo.benchmarks.cases import Case, module_subject, random_normal
from attnzoo.benchmarks.contenders import Contender, PreparedContender
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.peers import SCOPE
from attnzoo.benchmarks.workload import SEED, Shape
from attnzoo.spec.patterns import Causal, Window

BLOCK = 128
Flex = Callable[..., Tensor]


@dataclass(frozen=True)
class KernelPeer(Contender):
    """A kernel of PyTorch. Subclasses define :meth:`attend`, and whether the kernel knows a pattern."""

    peer: ClassVar[bool] = True

    def has_row(self, case: Case) -> bool:
        shape = find_workload(case.family).shape
        return case.device == "cuda" and case.scope == SCOPE and shape is not None and self.suits(shape)

    def suits(self, shape: Shape) -> bool:
        """Whether the kernel computes an attention that is similar to the family's."""
        raise NotImplementedError

    def attend(self, inputs: list[Tensor], shape: Shape) -> Callable[[], Tensor]:
        """Return a function that runs the kernel. ``inputs`` are query, key, value and, with a bias, its table.

        Query, key and value have the shape ``(batch, heads, S, head_dim)``, and the table ``(heads, distances)``.
        """
        raise NotImplementedError

    def prepare(self, case: Case) -> PreparedContender:
        workload = find_workload(case.family)
        assert workload.shape is not None
        inputs = random_inputs(case, workload.heads, workload.shape)
        module = nn.Module()
        subject = module_subject(case, module, module, "", self.attend(inputs, workload.shape), inputs)
        return PreparedContender(subject, f"torch {torch.__version__}")


def random_inputs(case: Case, heads: int, shape: Shape) -> list[Tensor]:
    """Return random query, key, value, and the table of the bias if the shape has a bias."""
    generator = torch.Generator().manual_seed(SEED)
    sizes = [(case.batch, count, case.seq_len, shape.head_dim) for count in (heads, shape.kv_heads, shape.kv_heads)]
    if shape.has_bias:
        left, right = sides(shape, case.seq_len)
        sizes.append((heads, left + right + 1))  # type: ignore[arg-type]
    return [random_normal(case, size, generator).requires_grad_(case.train) for size in sizes]


def sides(shape: Shape, seq_len: int) -> tuple[int, int]:
    """Return how many keys before and after its position a query sees."""
    low, high = shape.pattern.band(seq_len, seq_len)
    return min(-low, seq_len), min(high, seq_len)


class WindowedFlash(KernelPeer):
    """FlashAttention 2 with a window, in packed sequences."""

    def suits(self, shape: Shape) -> bool:
        return isinstance(shape.pattern, Window)

    def attend(self, inputs: list[Tensor], shape: Shape) -> Callable[[], Tensor]:
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = inputs[:3]
        batch, _, length, _ = query.shape
        ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)

        def call() -> Tensor:
            q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
            out: Any = varlen_attn(q, k, v, ends, ends, length, length, window_size=sides(shape, length))
            rows: Tensor = out.view(batch, length, *out.shape[1:])
            return rows.transpose(1, 2)

        return call


class CudnnSdpa(KernelPeer):
    """PyTorch's attention on cuDNN's kernel."""

    def suits(self, shape: Shape) -> bool:
        return isinstance(shape.pattern, Causal)

    def attend(self, inputs: list[Tensor], shape: Shape) -> Callable[[], Tensor]:
        query, key, value = inputs

        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
                )

        return call


class HandWrittenFlex(KernelPeer):
    """FlexAttention with a mask, a bias and a block mask that are written for the pattern of the family."""

    def suits(self, shape: Shape) -> bool:
        return True

    def attend(self, inputs: list[Tensor], shape: Shape) -> Callable[[], Tensor]:
        return hand_written(inputs, shape, torch.compile(flex_attention, dynamic=False))


def hand_written(inputs: list[Tensor], shape: Shape, flex: Flex) -> Callable[[], Tensor]:
    """Return a function that calls ``flex`` for the shape. ``flex`` is ``flex_attention``, compiled or not."""
    query, key, value, *tables = inputs
    length, global_keys = query.shape[2], shape.global_keys
    left, right = sides(shape, length)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        near = (q - kv <= left) & (kv - q <= right)
        return near | (kv < global_keys) if global_keys else near

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return score + tables[0][h, (kv - q + left).clamp(0, left + right)]

    mask = block_mask(length, left, right, global_keys, mask_mod, query.device)
    options: dict[str, Any] = dict(block_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
    if tables:
        # Without smaller tiles, the compiled kernel asked for 245 KiB of shared memory; an H200 has 227 KiB.
        options["score_mod"] = score_mod
        options["kernel_options"] = dict(BLOCK_M=64, BLOCK_N=64, num_stages=2)
    return partial(flex, query, key, value, **options)


def block_mask(
    length: int, left: int, right: int, global_keys: int, mask_mod: Callable[..., Tensor], device: torch.device
) -> BlockMask:
    """Return the block mask of a window and of global keys at the start, without evaluating all pairs."""
    queries = torch.arange(0, length, BLOCK, device=device)[:, None]
    keys = torch.arange(0, length, BLOCK, device=device)[None, :]
    some = (keys + BLOCK - 1 >= queries - left) & (keys <= queries + BLOCK - 1 + right) | (keys < global_keys)
    every = (keys >= queries + BLOCK - 1 - left) & (keys + BLOCK - 1 <= queries + right) & (keys + BLOCK <= length)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=1, descending=True, stable=True).int()
        return blocks.sum(1, dtype=torch.int32)[None, None].contiguous(), order[None, None].contiguous()

    lists = (*listed(some & ~every), *listed(every))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(length, length))


KERNEL_PEERS = (WindowedFlash("FA2 window"), CudnnSdpa("cuDNN"), HandWrittenFlex("FlexAttention"))
