"""The launches of the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from attnzoo.backends.triton.forward import compile_options, constants, in_rows, new_rows, tile_of
from attnzoo.backends.triton.kernels import arguments as kinds
from attnzoo.backends.triton.kernels.arguments import Softmax
from attnzoo.backends.triton.kernels.dense_bias import dense_bias_kernel
from attnzoo.backends.triton.kernels.distance_table import diagonals_kernel, distance_kernel
from attnzoo.backends.triton.kernels.key import key_kernel
from attnzoo.backends.triton.kernels.position_table import entries_kernel, position_kernel
from attnzoo.backends.triton.kernels.query import query_kernel
from attnzoo.backends.triton.plan import Inputs, Plan, keys_of, rows, settings
from attnzoo.backends.triton.tile_sizes import Tile, programs_at_once

_FEWEST_STEPS = 4  # tiles of queries per program, at least, if several programs share the queries of a tile of keys
_ENTRIES = 16  # table entries per program


class Backward:
    """The backward of one attention.

    Args:
        plan, inputs, seed: those of the forward.
        out, softmax: the results of the forward.
        grad_out: the gradient of the output.
    """

    def __init__(
        self, plan: Plan, inputs: Inputs, seed: Tensor | None, out: Tensor, softmax: Softmax, grad_out: Tensor
    ) -> None:
        self._plan, self._inputs, self._out, self._grad_out = plan, inputs, out, grad_out
        self._order = [index for indices in plan.passes for index in indices]
        self._keys = [keys_of(plan, inputs, index) for index in range(len(plan.forms))]
        self._delta = torch.empty_like(softmax.top)
        self._common: dict[str, Any] = dict(
            query=rows(inputs.query),
            grad_out=rows(grad_out),
            softmax=softmax,
            delta=self._delta,
            settings=settings(plan, seed),
            heads=plan.heads,
            q_len=plan.q_len,
            **constants(plan),
        )

    def queries(self, needs_ends: bool) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the queries, and the gradients of the first and last table entries.

        The second result is ``(segments, heads, 2)``. This method must be called first: it also computes ``delta``,
        which the other methods need.
        """
        plan, sizes = self._plan, tile_of("query", self._plan)
        blocks = triton.cdiv(plan.q_len, sizes.queries)
        shape = (len(plan.forms), plan.batch, plan.heads, blocks, 2)
        ends = torch.empty(shape, dtype=torch.float32, device=plan.device) if needs_ends else None
        earlier, first_segment = None, 0
        for number, indices in enumerate(plan.passes):
            is_last = number == len(plan.passes) - 1
            grad = new_rows(plan, plan.head_dim, plan.dtype if is_last else torch.float32)
            query_kernel[(blocks * plan.batch * plan.heads,)](
                out=rows(self._out),
                grad_query=rows(grad),
                earlier=rows(grad if earlier is None else earlier),
                ends=ends,
                segments=tuple(self._keys[index] for index in indices),
                numbers=tuple(map(plan.numbers, indices)),
                first_segment=first_segment,
                NEEDS_ENDS=needs_ends,
                IS_FIRST=number == 0,
                IS_LAST=is_last,
                **self._common,
                **compile_options(sizes),
            )
            earlier, first_segment = grad, first_segment + len(indices)
        return grad, None if ends is None else ends.sum((1, 3))

    def keys_values(self) -> list[Tensor]:
        """Return the gradients of the distinct keys and values."""
        places = [place for form in self._plan.forms for place in (form.key, form.value)]
        grads: dict[int, Tensor] = {}
        for number, index in enumerate(self._order):
            form = self._plan.forms[index]
            if places.count(form.key) == places.count(form.value) == 1:
                grads[form.key], grads[form.value] = self._of_segment(number, index)
                continue
            # Several segments share these tensors. Each segment adds to the same gradients, which are float32.
            for place in (form.key, form.value):
                if place not in grads:
                    grads[place] = torch.zeros(
                        self._inputs.keys_values[place].shape, dtype=torch.float32, device=self._plan.device
                    )
            self._launch_keys(number, index, (grads[form.key], grads[form.value]), shares=1, adds=True)
        return [grads[place].to(self._plan.dtype) for place in range(len(self._inputs.keys_values))]

    def _of_segment(self, number: int, index: int) -> tuple[Tensor, Tensor]:
        """Return the gradients of the keys and values of a segment that shares them with no other segment."""
        plan, form, sizes = self._plan, self._plan.forms[index], tile_of("key", self._plan)
        key, value = (self._inputs.keys_values[place] for place in (form.key, form.value))
        programs = triton.cdiv(form.kv_len, sizes.keys) * plan.batch * key.shape[1]
        steps = triton.cdiv(plan.most_queries(index, sizes.keys), sizes.queries) * form.group
        shares = min(programs_at_once(plan.device) // programs, steps // _FEWEST_STEPS)
        if shares < 2:
            of_key, of_value = (in_rows(tensor.shape, plan.dtype, plan.device) for tensor in (key, value))
            self._launch_keys(number, index, (of_key, of_value), shares=1, adds=False)
            return of_key, of_value
        dims = (key.shape[3], value.shape[3])
        both = torch.empty((shares, *key.shape[:3], sum(dims)), dtype=torch.float32, device=plan.device)
        of_key, of_value = both.flatten(0, 1).split(dims, dim=3)
        self._launch_keys(number, index, (of_key, of_value), shares, adds=False)
        of_key, of_value = both.sum(0).to(plan.dtype).split(dims, dim=3)
        return of_key, of_value

    def _launch_keys(self, number: int, index: int, grads: tuple[Tensor, Tensor], shares: int, adds: bool) -> None:
        """Write or add to ``grads``, each ``(shares * batch, kv_heads, kv_len, dim)``."""
        plan, form, sizes = self._plan, self._plan.forms[index], tile_of("key", self._plan)
        programs = triton.cdiv(form.kv_len, sizes.keys) * plan.batch * grads[0].shape[1]
        key_kernel[(programs * shares,)](
            grad_key=rows(grads[0]),
            grad_value=rows(grads[1]),
            segment=keys_of(plan, self._inputs, index, for_keys=True),
            numbers=plan.numbers(index),
            which=number,
            shares=shares,
            batch=plan.batch,
            ADDS=adds,
            **self._common,
            **compile_options(sizes),
        )

    def biases(self, dtypes: Sequence[torch.dtype | None], ends: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of the bias values in these dtypes, or None where the dtype is None (not needed).

        ``ends`` is the second result of :meth:`queries`.
        """
        grads: list[Tensor | None] = [None] * len(dtypes)
        for number, index in enumerate(self._order):
            form = self._plan.forms[index]
            if form.bias == kinds.NO_BIAS.value:
                continue
            dtype = dtypes[form.bias_place]
            if dtype is None:
                continue
            if form.has_table and ends is not None:
                grads[form.bias_place] = self._table(number, index, dtype, ends[number])
            else:
                grads[form.bias_place] = self._dense(number, index)
        return grads

    def _table(self, number: int, index: int, dtype: torch.dtype, ends: Tensor) -> Tensor:
        """Return the gradient ``(heads or 1, size)`` of a table. ``ends`` is ``(heads, 2)``."""
        plan, form = self._plan, self._plan.forms[index]
        is_shared = self._inputs.biases[form.bias_place].shape[0] == 1
        shape = (plan.heads, form.size)
        grad = torch.empty(shape, dtype=torch.float32 if is_shared else dtype, device=plan.device)
        if form.bias == kinds.BY_POSITION.value:
            self._by_position(number, index, ends, grad)
        else:
            self._by_distance(number, index, ends, grad)
        return grad.sum(0, keepdim=True).to(dtype) if is_shared else grad

    def _by_distance(self, number: int, index: int, ends: Tensor, grad: Tensor) -> None:
        plan, form, sizes = self._plan, self._plan.forms[index], tile_of("distance", self._plan)
        band = plan.band(index)
        first, last = max(1, band.lowest + form.zero), min(form.size - 2, band.highest + form.zero)
        offsets = triton.cdiv(last - first + sizes.queries, sizes.keys) if first <= last else 0
        chunks = self._chunks(sizes, max(1, offsets)) if offsets else 0
        count = chunks * plan.heads * offsets * sizes.queries * sizes.keys
        total = torch.empty(count, dtype=torch.float32, device=plan.device)
        if offsets:
            distance_kernel[(offsets, chunks, plan.heads)](
                total=total,
                segment=self._keys[index],
                numbers=plan.numbers(index),
                batch=plan.batch,
                which=number,
                lowest=first - form.zero,
                chunks=chunks,
                **self._common,
                **compile_options(sizes),
            )
        diagonals_kernel[(triton.cdiv(form.size, _ENTRIES), plan.heads)](
            total, ends, grad, plan.heads, chunks, offsets, form.size, first, last,
            BLOCK_M=sizes.queries, BLOCK_N=sizes.keys, BLOCK_R=_ENTRIES,
        )  # fmt: skip

    def _by_position(self, number: int, index: int, ends: Tensor, grad: Tensor) -> None:
        plan, form, sizes = self._plan, self._plan.forms[index], tile_of("position", self._plan)
        runs = triton.cdiv(form.size - 2, sizes.keys) if form.size > 2 else 0
        chunks = self._chunks(sizes, runs) if runs else 0
        total = torch.empty(chunks * plan.heads * form.size, dtype=torch.float32, device=plan.device)
        if runs:
            position_kernel[(runs, chunks, plan.heads)](
                total=total,
                segment=self._keys[index],
                numbers=plan.numbers(index),
                batch=plan.batch,
                which=number,
                chunks=chunks,
                **self._common,
                **compile_options(sizes),
            )
        grid = (triton.cdiv(form.size, _ENTRIES), plan.heads)
        entries_kernel[grid](total, ends, grad, plan.heads, chunks, form.size, BLOCK_R=_ENTRIES)

    def _chunks(self, sizes: Tile, programs: int) -> int:
        """Return into how many chunks to divide the query tiles. Each chunk and head has ``programs`` programs."""
        plan = self._plan
        blocks = triton.cdiv(plan.q_len, sizes.queries) * plan.batch
        return max(1, min(blocks, triton.cdiv(programs_at_once(plan.device), programs * plan.heads)))

    def _dense(self, number: int, index: int) -> Tensor:
        plan, form, sizes = self._plan, self._plan.forms[index], tile_of("dense", self._plan)
        values = self._inputs.biases[form.bias_place]
        grad = torch.empty(values.shape, dtype=values.dtype, device=plan.device)
        tiles = (triton.cdiv(plan.q_len, sizes.queries), triton.cdiv(form.kv_len, sizes.keys))
        grid = (values.shape[0] * values.shape[1], *tiles)
        dense_bias_kernel[grid](
            grad=grad,
            segment=self._keys[index],
            numbers=plan.numbers(index),
            batch=plan.batch,
            bias_batch=values.shape[0],
            bias_heads=values.shape[1],
            which=number,
            **self._common,
            **compile_options(sizes),
        )
        return grad
