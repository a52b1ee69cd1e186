"""What the Triton kernels compute and move: the tiles that they visit, from the arguments of their launches.

A kernel computes whole tiles, so the hidden scores of a visited tile count as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from attnzoo.backends.triton.kernels import arguments as kinds
from attnzoo.backends.triton.kernels.arguments import Keys, Numbers
from attnzoo.benchmarks.gpu.prediction.work import Work, size_of

Array: TypeAlias = "np.ndarray[Any, Any]"

# For each score of a visited tile: the products over ``head_dim`` and the products over ``value_dim``. All kernels
# compute the scores. Those of the backward also compute the gradients of the weights.
_PRODUCTS = {
    "forward_kernel": (1, 1),
    "query_kernel": (2, 1),
    "key_kernel": (2, 2),
    "distance_kernel": (1, 1),
    "position_kernel": (1, 1),
    "dense_bias_kernel": (1, 1),
}
# Sums over tiles that other kernels have written, without matrix products.
_SUMS = ("diagonals_kernel", "entries_kernel")


class Visits(NamedTuple):
    """The tiles of one head that a launch visits.

    Attributes:
        tiles: the number of pairs of a tile of queries and a tile of keys.
        keys: the share of the keys that are in a visited tile.
        queries: the share of the queries that are in a visited tile.
    """

    tiles: int
    keys: float
    queries: float


def work_of(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Work:
    """Return the work of one launch. The arguments are those of a launch."""
    name = kernel.fn.__name__
    if name in _SUMS:
        return Work(name, 0, sum(_sizes((args, kwargs)).values()), is_triton=True)
    segments = kwargs["segments"] if "segments" in kwargs else (kwargs["segment"],)
    numbers = kwargs["numbers"] if "segments" in kwargs else (kwargs["numbers"],)
    visits = [_visits(name, grid, kwargs, *pair) for pair in zip(segments, numbers, strict=True)]
    dims, value_dims = _PRODUCTS[name]
    per_score = 2 * (dims * kwargs["BLOCK_D"] + value_dims * kwargs["BLOCK_V"])
    batch, heads = kwargs["query"].data.shape[:2]
    scores = sum(visit.tiles for visit in visits) * kwargs["BLOCK_M"] * kwargs["BLOCK_N"] * batch * heads
    return Work(name, scores * per_score, _bytes(name, kwargs, segments, visits), is_triton=True)


def _bytes(name: str, kwargs: dict[str, Any], segments: tuple[Keys, ...], visits: list[Visits]) -> int:
    """Return the bytes of all tensors. Rows that several tiles read count once: the next time, a cache has them."""
    sizes = _sizes(kwargs)
    total = sum(sizes.values())
    if name == "key_kernel":
        of_queries = (kwargs["query"].data, kwargs["grad_out"].data, kwargs["delta"], *kwargs["softmax"])
        total -= int((1.0 - visits[0].queries) * sum(sizes[id(tensor)] for tensor in of_queries))
        gradients = sum(sizes[id(kwargs[name].data)] for name in ("grad_key", "grad_value"))
        total += kwargs["ADDS"] * gradients
        if kwargs["ADDS"] and segments[0].kind.value == kinds.SORTED.value:  # leaves out keys that no query sees
            of_keys = sum(sizes[id(tensor.data)] for tensor in (segments[0].key, segments[0].value))
            total -= int((1.0 - visits[0].keys) * (of_keys + 2 * gradients))
        return total
    shares: dict[int, float] = {}
    for segment, visit in zip(segments, visits, strict=True):
        for tensor in (segment.key.data, segment.value.data):
            shares[id(tensor)] = max(shares.get(id(tensor), 0.0), visit.keys)
    return total - sum(int((1.0 - share) * sizes[key]) for key, share in shares.items())


def _sizes(arguments: Any) -> dict[int, int]:
    """Return the sizes of the distinct tensors in arguments."""
    return {id(leaf): size_of(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}


def _visits(name: str, grid: tuple[int, ...], kwargs: dict[str, Any], segment: Keys, numbers: Numbers) -> Visits:
    q_len, rows, columns = kwargs["q_len"], kwargs["BLOCK_M"], kwargs["BLOCK_N"]
    kv_len = _number(numbers.kv_len)
    first = np.arange(0, q_len, rows)
    if name == "dense_bias_kernel":
        return Visits(len(first) * -(-kv_len // columns), 1.0, 1.0)
    if name == "position_kernel":  # the queries of a tile have at least one position, and in LongT5 exactly one
        return Visits(grid[0] * len(first), 1.0, 1.0)
    if name == "distance_kernel":
        key = first[:, None] + kwargs["lowest"] + np.arange(grid[0]) * columns
        return Visits(int(np.count_nonzero((key + columns > 0) & (key < kv_len))), 1.0, 1.0)
    place: Array = first + _number(numbers.start)
    last = np.minimum(first + rows, q_len) - 1 + _number(numbers.start)
    return visits_of(spans(segment, numbers, place, last), kv_len, columns)


def visits_of(spans: list[tuple[Array, Array]], kv_len: int, columns: int) -> Visits:
    """Return the visits of tiles of queries whose keys are in ``spans``, of which later spans have lower keys."""
    counts: Array = np.zeros(len(spans[0][0]), int)
    changes: Array = np.zeros(-(-kv_len // columns) + 1, int)
    limit: Array = np.full(len(counts), len(changes))  # a tile that two spans share counts once
    for start, stop in spans:
        begin: Array = start // columns
        end = np.where(stop > start, np.clip(-(-stop // columns), begin, np.maximum(begin, limit)), begin)
        limit = np.where(end > begin, begin, limit)
        counts += end - begin
        np.add.at(changes, begin, 1)
        np.add.at(changes, end, -1)
    keys = np.count_nonzero(np.cumsum(changes)[:-1]) * columns
    return Visits(int(counts.sum()), min(1.0, keys / kv_len), np.count_nonzero(counts) / len(counts))


def spans(segment: Keys, numbers: Numbers, place: Array, last: Array) -> list[tuple[Array, Array]]:
    """Return the keys that tiles of queries at the places ``place`` to ``last`` may see, as ``kernels/spans.py`` does.

    Raises:
        NotImplementedError: the segment is a hash round, whose tiles depend on the values of a tensor.
    """
    kv_len, kind = _number(numbers.kv_len), segment.kind.value
    if kind == kinds.HASHED.value:
        raise NotImplementedError("got a hash round, whose tiles depend on values; allowed: bands and chunks")
    if kind == kinds.BAND.value:
        start = np.maximum(place + _number(numbers.lowest), 0)
        return [(start, np.minimum(last + _number(numbers.highest) + 1, kv_len))]
    length, before, count = (_number(number) for number in (numbers.length, numbers.before, numbers.chunks))
    first_chunk: Array = place // length - before
    last_chunk: Array = last // length - before + _number(numbers.reach)
    is_whole = last_chunk - first_chunk + 1 >= count
    head = np.where(is_whole, 0, first_chunk % count)
    tail = np.where(is_whole, count - 1, last_chunk % count)
    wraps = head > tail
    stops = [np.where(wraps, count, tail + 1) * length, np.where(wraps, tail + 1, 0) * length]
    stops[0] = np.minimum(stops[0], kv_len)
    if segment.causal.value and kind == kinds.CHUNKS.value:
        stops = [np.minimum(stop, last + 1) for stop in stops]
    return [(head * length, stops[0]), (np.zeros_like(head), stops[1])]


def _number(encoded: int) -> int:
    """Return the integer that :func:`~attnzoo.backends.triton.kernels.arguments.encoded` has encoded."""
    return encoded >> 2
