"""FlexAttention without a compiler, because the compilation of a form takes many seconds.

The block lists decide as in the compiled kernels: a full block needs no mask, and an absent block is not read.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch

from attnzoo.backends.flex import backend, kernel
from attnzoo.spec.heads import expand_heads


class _Torch:
    """The module ``torch`` with a compiler that changes nothing."""

    compiler = SimpleNamespace(is_compiling=lambda: True)

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def compile(function, **options):
        return function


def _listed(count, numbers, blocks):
    """Return which blocks of keys a list names, bool ``(batch, heads, blocks of queries, blocks)``."""
    named = torch.arange(numbers.shape[-1]) < count[..., None]
    grid = torch.zeros((*numbers.shape[:-1], blocks), dtype=torch.int32)
    return grid.scatter_add(-1, numbers.long(), named.int()).bool()


def _flex_attention(query, key, value, score_mod, block_mask, scale, enable_gqa):
    """Compute FlexAttention in plain torch operations, in float32."""
    (batch, heads, q_len, _), kv_len = query.shape, key.shape[2]
    b, h, q, kv = (torch.arange(size) for size in (batch, heads, q_len, kv_len))
    index = (b[:, None, None, None], h[:, None, None], q[:, None], kv)
    rows, columns = block_mask.BLOCK_SIZE
    partial, full = (
        _listed(count, numbers, max(numbers.shape[-1], -(-kv_len // columns)))[:, :, q // rows][..., kv // columns]
        for count, numbers in (
            (block_mask.kv_num_blocks, block_mask.kv_indices),
            (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        )
    )
    seen = (full | (partial & block_mask.mask_mod(*index))).expand(batch, heads, -1, -1)
    scores = query.float() @ expand_heads(key, heads).float().mT * scale
    if score_mod is not None:
        scores = score_mod(scores, *index)
    weights = scores.masked_fill(~seen & seen.any(-1, keepdim=True), float("-inf")).softmax(-1)
    weights = weights * seen.any(-1, keepdim=True)
    return (weights @ expand_heads(value, heads).float()).to(query.dtype)


@contextlib.contextmanager
def uncompiled_flex():
    """Run the backend ``flex_attention`` without a compiler."""
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (kernel, "torch", _Torch()),
            (kernel, "flex_attention", _flex_attention),
            (backend, "compiled_kernel", kernel.compiled_kernel.__wrapped__),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield
