"""Read the masks of LongT5's encoder, convert its weights to and from blocks, and sum the tokens of global blocks.

The model computes local attention in blocks of ``block_len = local_radius + 1`` tokens. A query gets scores for the
keys of its block and both neighbouring blocks. A global block is another kind of block: ``global_block_size`` tokens
with one key for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.segments import describe
from attnzoo.spec.transforms import hides_nothing, holds, readable

MODULE = "transformers.models.longt5.modeling_longt5"


class Tokens(NamedTuple):
    """The real tokens of a batch: all tokens except padding.

    Attributes:
        real: ``(batch, length)`` bool, True for real tokens.
        mask: ``real``, or None if there is no padding.
    """

    real: Tensor
    mask: Tensor | None


class GlobalBlocks(NamedTuple):
    """The global blocks of a batch. Each block has one key.

    Attributes:
        block_of: ``(batch, length)`` long, the index of each token's block. -1 stands for a token without a block.
        exists: ``(batch, blocks)`` bool, False for blocks that a sample does not have because of its padding.
        mask: ``exists``, or None if all blocks exist.
    """

    block_of: Tensor
    exists: Tensor
    mask: Tensor | None

    @property
    def number(self) -> int:
        """The number of global blocks in a sample without padding."""
        return self.exists.shape[1]


def check_is_given(mask: Tensor | None) -> Tensor:
    """Return the mask, or raise if it is no tensor. Without a mask, the original code would ignore the window."""
    if not isinstance(mask, Tensor):
        raise InvalidArgumentError("mask", describe(mask), "the mask from LongT5Stack")
    return mask


def read_blocked_mask(mask: Tensor, block_len: int, hidden_states: Tensor) -> Tokens:
    """Return the real tokens of a local attention mask, bool ``(batch, 1, blocks, block_len, 3 * block_len)``.

    A token is real if it sees itself. Raise unless each real token sees exactly the real tokens in its window.
    """
    batch, length = hidden_states.shape[:2]
    blocks = -(-length // block_len)
    shape = (batch, 1, blocks, block_len, 3 * block_len)
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise InvalidArgumentError("mask", describe(mask), f"bool of shape {shape}, the mask from LongT5Stack")
    real = mask[:, 0].diagonal(block_len, -2, -1)
    keys = torch.nn.functional.pad(real.flatten(1), (block_len, block_len)).unfold(1, 3 * block_len, block_len)
    position = torch.arange(3 * block_len, device=mask.device)
    near = (position - position[block_len : 2 * block_len, None]).abs() < block_len
    if readable(mask) and not _is_window_mask(mask[:, 0], real, keys, near):
        raise InvalidArgumentError(
            "mask",
            f"{describe(mask)}, which is not a window mask combined with a padding mask",
            "the mask from LongT5Stack",
        )
    return _tokens(real.flatten(1)[:, :length])


def _is_window_mask(mask: Tensor, real: Tensor, keys: Tensor, near: Tensor) -> bool:
    """Whether each real token of a mask ``(batch, blocks, block_len, 3 * block_len)`` sees the real tokens ``near`` it.

    Without padding, all blocks except the first and the last have the same mask. A comparison with this one mask takes
    a third of the time, because it makes no tensor of the size of the whole mask.
    """
    inner = keys[:, 1:-1]
    if bool(inner.all()):
        ends = [0, -1]
        expected = real[:, ends, :, None] & keys[:, ends, None] & near
        return torch.equal(mask[:, 1:-1], near.expand(*inner.shape[:2], -1, -1)) and torch.equal(
            mask[:, ends], expected
        )
    return torch.equal(real[..., None] & keys[:, :, None] & near, mask)


def read_flat_mask(mask: Tensor, hidden_states: Tensor) -> Tokens:
    """Return the real tokens of a mask ``(batch, length)``. The mask is 1 for real tokens and 0 for padding."""
    shape = tuple(hidden_states.shape[:2])
    if not mask.dtype.is_signed:  # the model's code writes -1 for padding
        raise InvalidArgumentError("attention_mask", describe(mask), "a signed dtype, e.g. torch.long")
    if tuple(mask.shape) != shape or not holds(((mask == 0) | (mask == 1)).all(), unknown=True):
        raise InvalidArgumentError("attention_mask", describe(mask), f"shape {shape}, 1 for tokens and 0 for padding")
    return _tokens(mask != 0)


def _tokens(real: Tensor) -> Tokens:
    return Tokens(real, None if hides_nothing(real) else real)


def to_blocked(weights: tuple[Tensor, ...], block_len: int) -> Tensor:
    """Return weights in the model's layout ``(batch, blocks, heads, block_len, 3 * block_len + globals)``.

    The first ``3 * block_len`` columns are the keys of the previous block, of the query's block and of the next block.
    The other columns are the global keys. ``weights`` has the dense weights of the local segment and, if there is one,
    of the global segment.
    """
    pad = torch.nn.functional.pad
    length = weights[0].shape[2]
    missing = -length % block_len
    rows = [pad(part, (0, 0, 0, missing)).unflatten(2, (-1, block_len)) for part in weights]
    local = pad(rows[0], (block_len, block_len + missing)).unfold(-1, 3 * block_len, block_len)
    # (batch, heads, block of query, block_len, block of keys, 3 * block_len): keep pairs of equal block indices
    local = local.diagonal(0, 2, 4).permute(0, 1, 4, 2, 3)
    return torch.cat([local, *rows[1:]], dim=-1).transpose(1, 2)


def from_blocked(blocked: Tensor, block_len: int, length: int) -> Tensor:
    """Return dense weights ``(batch, heads, length, length + globals)`` from the layout of :func:`to_blocked`."""
    rows = blocked.transpose(1, 2)  # (batch, heads, blocks, block_len, 3 * block_len + globals)
    batch, heads, blocks = rows.shape[:3]
    local, rest = rows.split([3 * block_len, rows.shape[4] - 3 * block_len], dim=-1)
    starts = block_len * torch.arange(blocks, device=blocked.device).view(-1, 1, 1)
    columns = torch.arange(3 * block_len, device=blocked.device) + starts
    wide = local.new_zeros((batch, heads, blocks, block_len, (blocks + 2) * block_len))
    dense = wide.scatter(4, columns.expand_as(local), local).flatten(2, 3)[..., block_len : block_len + length]
    return torch.cat([dense, rest.flatten(2, 3)], dim=-1)[:, :, :length]


def find_global_blocks(mask: Tensor, size: int) -> GlobalBlocks:
    """Divide the real tokens of a mask ``(batch, length)`` into global blocks of ``size`` tokens.

    A block is full if its last position is a real token. Real tokens after the last full block belong to this block.
    For example, 5 tokens and ``size=2`` give the block indices 0, 0, 1, 1, 1. To compute a block index, the model's
    code adds ``1 / size`` per token in torch's default dtype. In bfloat16, rounding makes the indices wrong from token
    256 on. In float32, if ``size`` is not a power of two, some indices are wrong at the ends of blocks. This function
    computes the indices exactly.
    """
    real, position = mask != 0, torch.arange(mask.shape[1], device=mask.device)
    full = (real & (position % size == size - 1)).sum(1, keepdim=True)
    block_of = torch.minimum(position // size, full - 1).masked_fill(~real, -1)
    exists = torch.arange(mask.shape[1] // size, device=mask.device) <= block_of.amax(1, keepdim=True)
    return GlobalBlocks(block_of, exists, None if hides_nothing(exists) else exists)


def sum_blocks(hidden_states: Tensor, blocks: GlobalBlocks) -> Tensor:
    """Return the sum of each block's tokens, ``(batch, blocks, d_model)``. Half precision is summed in float32."""
    batch, _, width = hidden_states.shape
    states = hidden_states.float() if hidden_states.dtype in (torch.bfloat16, torch.float16) else hidden_states
    sample = torch.arange(batch, device=states.device)[:, None].expand_as(blocks.block_of)
    block = torch.where(blocks.block_of < 0, blocks.number, blocks.block_of)  # an extra block, dropped below
    sums = states.new_zeros((batch, blocks.number + 1, width)).index_put((sample, block), states, accumulate=True)
    return sums[:, : blocks.number].to(hidden_states.dtype)
