"""The operators ``attnzoo::attend`` and ``attnzoo::attend_backward``.

A graph of ``torch.compile`` or ``torch.export`` contains the attention of a site as one operator, and no operation of
the site's backend. When the graph runs, the operator runs the backend on real tensors. So selection, refusals, counts
and observers work as outside of a graph. Lengths are symbols in the graph, so a new length needs no new graph.

The backward computes the forward again, as gradient checkpointing does. So every backend with gradients works in a
graph, and only the inputs are kept for the backward.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnzoo.errors import BackendRefusedError, PatchError, Refusal
from attnzoo.functional import execute
from attnzoo.graphs.flat import Flat, flatten, unflatten
from attnzoo.registry import registry
from attnzoo.spec.masks import read_dense_mask
from attnzoo.spec.segments import Attention, Result


class Runner(Protocol):
    """Runs the attentions of one site when a graph runs."""

    def __call__(self, attention: Attention, /) -> Result:
        """Run an attention, and count it."""

    def repeat(self, attention: Attention, /) -> Tensor:
        """Return the output of an attention that was counted before."""

    def takes(self, attention: Attention, /) -> bool:
        """Whether the backend of the site supports an attention."""


NO_SITE = 0  # for exported programs, which outlive the site and run the backend by its name
_runners: weakref.WeakValueDictionary[int, Runner] = weakref.WeakValueDictionary()
_numbers = itertools.count(NO_SITE + 1)
# The bytes of the state of a random generator: the Mersenne Twister of the CPU, seed and offset on CUDA.
_STATE_SIZES = {"cpu": torch.get_rng_state().numel(), "cuda": 16}
_SECOND_DERIVATIVE = Refusal("create_graph", "True", "False, because the operator in a graph has no second derivative")


def register_runner(runner: Runner) -> int:
    """Return a number by which graphs refer to a runner. The reference is weak."""
    number = next(_numbers)
    _runners[number] = runner
    return number


def attend_in_graph(attention: Attention, runner: int, backend: str) -> Tensor:
    """Put an attention into the graph that is being traced. Return the output ``(batch, heads, q_len, value_dim)``.

    Args:
        attention: tensors of the trace. Its integers may be symbols.
        runner: a number from :func:`register_runner`, or ``NO_SITE``.
        backend: the name of the backend.
    """
    flat = flatten(attention)
    output, _ = torch.ops.attnzoo.attend(*flat, runner, backend)
    result: Tensor = output.transpose(1, 2)
    return result


def _run(flat: Flat, runner: int, backend: str, counts: bool) -> Tensor:
    attention = unflatten(flat)
    if runner == NO_SITE:
        configured = registry.configure(backend)
        read = _read_masks(attention, lambda other: not registry.refusals(configured, other.request()))
        return execute(configured, read).output
    site = _runners.get(runner)
    if site is None:
        raise PatchError(
            f"compiled model: got a call after its patched modules (backend {backend!r}) were freed; allowed: a call "
            "while the patched model exists"
        )
    read = _read_masks(attention, site.takes)
    return site(read).output if counts else site.repeat(read)


def _read_masks(attention: Attention, takes: Callable[[Attention], bool]) -> Attention:
    """Return an equal attention whose patterns replace dense masks, so that kernels skip what a pattern hides.

    The graph was made for dense masks. A backend may support these, but not the pattern. Then the masks stay. On a GPU,
    they stay too: the CPU would have to wait for their values.
    """
    if not attention.query.is_cpu or attention.q_len == 1:
        return attention
    segments = tuple(read_dense_mask(segment, attention.batch) for segment in attention.segments)
    read = replace(attention, segments=segments)
    return read if takes(read) else attention


@torch.library.custom_op("attnzoo::attend", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _attend(
    trained: Sequence[Tensor],
    masks: Sequence[Tensor],
    numbers: Sequence[int],
    factors: Sequence[float],
    form: str,
    runner: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the output ``(batch, q_len, heads, value_dim)`` and, with dropout, the state of the random generator."""
    flat = Flat(list(trained), list(masks), list(numbers), list(factors), form)
    state = _random_state(trained[0].device, factors[1])
    output = _run(flat, runner, backend, counts=True)
    return _in_model_layout(output), state


@_attend.register_fake
def _(trained: Sequence[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    _, _, factors, form, *_ = args
    query = trained[0]
    value = trained[int(form.split(",")[4])]
    batch, heads, q_len, _ = query.shape
    size = 0 if factors[1] == 0.0 else _STATE_SIZES.get(query.device.type, _STATE_SIZES["cpu"])
    return query.new_empty((batch, q_len, heads, value.shape[3])), query.new_empty(size, dtype=torch.uint8)


def _in_model_layout(output: Tensor) -> Tensor:
    """Return an output ``(batch, heads, q_len, dim)`` as contiguous ``(batch, q_len, heads, dim)``, as models do."""
    return output.transpose(1, 2).contiguous()


def _random_state(device: torch.device, dropout: float) -> Tensor:
    """Return the state of the random generator of a device, or an empty tensor if there is no dropout.

    The result is on the device, because a graph with results on the CPU cannot be captured as a CUDA graph.
    """
    if dropout == 0.0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cuda.get_rng_state(device).to(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _random_numbers_from(state: Tensor, device: torch.device) -> Iterator[None]:
    """Context in which the random generator of a device starts with ``state``. Empty means no random numbers."""
    if not state.numel():
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state.cpu(), device)
        else:
            torch.set_rng_state(state)
        yield


# This operator repeats the forward and computes its gradients by autograd. ``custom_op`` would disable autograd.
torch.library.define(
    "attnzoo::attend_backward",
    "(Tensor grad, Tensor state, Tensor[] trained, Tensor[] masks, SymInt[] numbers, float[] factors, str form, "
    "SymInt runner, str backend, bool[] needs) -> Tensor[]",
)


@torch.library.impl("attnzoo::attend_backward", "default")
def _attend_backward(
    grad: Tensor,
    state: Tensor,
    trained: Sequence[Tensor],
    masks: Sequence[Tensor],
    numbers: Sequence[int],
    factors: Sequence[float],
    form: str,
    runner: int,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients of the tensors in ``trained`` that need one."""
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(trained, needs, strict=True)]
    flat = Flat(leaves, list(masks), list(numbers), list(factors), form)
    with torch.enable_grad(), _random_numbers_from(state, grad.device):
        output = _run(flat, runner, backend, counts=False)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(output, asked, grad.transpose(1, 2), materialize_grads=True)
    return [_laid_out_like(leaf, part) for leaf, part in zip(asked, grads, strict=True)]


@torch.library.register_fake("attnzoo::attend_backward")
def _(grad: Tensor, state: Tensor, trained: Sequence[Tensor], *args: Any) -> list[Tensor]:
    *_, needs = args
    return [torch.empty_like(tensor) for tensor, need in zip(trained, needs, strict=True) if need]


def _laid_out_like(tensor: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of a tensor with the strides that the graph expects."""
    expected = torch.empty_like(tensor)
    return grad if grad.stride() == expected.stride() else expected.copy_(grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    trained, masks, *ctx.rest = inputs
    ctx.count = len(trained)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *trained, *masks)


def _derive(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # with create_graph=True
        raise BackendRefusedError(ctx.rest[-1], {"attention": (_SECOND_DERIVATIVE,)}, {})
    state, *tensors = ctx.saved_tensors
    trained, masks = tensors[: ctx.count], tensors[ctx.count :]
    needs = list(ctx.needs_input_grad[0])
    grads = iter(torch.ops.attnzoo.attend_backward(grad, state, trained, masks, *ctx.rest, needs))
    return [next(grads) if need else None for need in needs], [None] * len(masks), *(None for _ in ctx.rest)


_attend.register_autograd(_derive, setup_context=_keep)
