"""The sizes of tiles, by kernel, compute capability and width of a head.

Larger tiles need fewer loads and more registers and shared memory. ``tests/backends/triton/test_compiled.py`` compiles
the forms of the model families, and dropout, dense masks, dense biases, softcap and hash rounds, with these sizes for
compute capability 8.0, 8.9 and 9.0. It checks that no register spills and the shared memory suffices.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The number of queries and keys of a tile, and how Triton compiles the kernel."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


# Triton's interpreter runs each operation of a tile in numpy: large tiles are fast, small tiles test more.
_INTERPRETED_SHORT, _INTERPRETED_LONG = Tile(16, 16), Tile(128, 64)
_SHORT = 64


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU. Triton reads this variable at its import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def tile(kernel: str, dim: int, dtype: torch.dtype, device: torch.device, length: int, needs_more: bool) -> Tile:
    """Return the sizes for a kernel: ``forward``, ``query``, ``key``, ``distance``, ``position`` or ``dense``.

    ``dim`` is the larger of ``head_dim`` and ``value_dim``, rounded up to a power of two. ``length`` is the number of
    queries, also rounded up. Only the sizes for the interpreter depend on ``length``. ``needs_more`` is whether a tile
    of scores needs more registers than usual, for dropout, a softcap, a dense bias or hash rounds.
    """
    if is_interpreted():
        sizes = _INTERPRETED_SHORT if length <= _SHORT else _INTERPRETED_LONG
        return sizes._replace(queries=16) if kernel == "position" else sizes
    sizes = compiled_tile(kernel, dim, dtype, torch.cuda.get_device_capability(device))
    return sizes._replace(keys=max(16, sizes.keys // 2)) if needs_more else sizes


_NARROWEST = 64
_NEWEST = (9, 10)  # major compute capabilities whose matrix products read shared memory and need fewer registers

# For each width of a head, the tiles of the kernels. A sketch on an H200 was fastest with 64 x 64 tiles, 4 warps and 2
# stages at width 64. The others are the largest without spilled registers. In float32, products are exact and use no
# tensor cores. With 1 stage, Triton keeps their operands in registers, and spills them.
_HALF_ON_NEWEST = {
    64: {"dense": Tile(64, 64, 8, 2), "": Tile(64, 64, 4, 2)},
    128: {"": Tile(64, 64, 8, 2)},
    256: {"": Tile(32, 32, 8, 2)},
}
_HALF = {
    64: {"forward": Tile(64, 64, 4, 2), "query": Tile(32, 64, 4, 2), "": Tile(64, 32, 4, 2)},
    128: {"key": Tile(64, 32, 8, 2), "": Tile(64, 64, 8, 2)},
    256: {"": Tile(32, 32, 8, 1)},
}
_FLOAT32 = {
    64: {"distance": Tile(32, 32, 4, 2), "": Tile(32, 16, 4, 2)},
    128: {"": Tile(32, 16, 4, 2)},
    256: {"": Tile(16, 16, 8, 2)},
}


def compiled_tile(kernel: str, dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """Return the sizes on a card of a compute capability, e.g. ``(9, 0)``."""
    half = _HALF_ON_NEWEST if capability[0] in _NEWEST else _HALF
    table = (_FLOAT32 if dtype == torch.float32 else half)[max(_NARROWEST, dim)]
    sizes = table.get(kernel, table[""])
    # Only few neighbouring queries have equal positions.
    return sizes._replace(queries=16, warps=4) if kernel == "position" else sizes


@lru_cache
def programs_at_once(device: torch.device) -> int:
    """Return about how many programs the device runs at once. Fewer programs leave a part of the device idle."""
    if is_interpreted():
        return 24
    return 3 * torch.cuda.get_device_properties(device).multi_processor_count
