"""Run attention modules on the device ``meta``, and record the work of each launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import attnzoo
from attnzoo.benchmarks.cases import Case, ModuleCall, module_call
from attnzoo.benchmarks.gpu.prediction.kernels import work_of
from attnzoo.benchmarks.gpu.prediction.meta import Reads, readable_by_nobody, without_values
from attnzoo.benchmarks.gpu.prediction.stored import Count
from attnzoo.benchmarks.gpu.prediction.work import Recorder, Work
from attnzoo.benchmarks.rows import ORIGINAL


def count(family: str, seq_len: int, backend: str, train: bool) -> Count:
    """Return the work of one call of an attention module in bfloat16, batch size 1.

    Args:
        family: name of a workload in :data:`~attnzoo.benchmarks.models.WORKLOADS`.
        seq_len: input length in tokens.
        backend: the backend to patch the module with, or ``"native"`` for the model's code without a patch.
        train: whether a backward follows the forward.
    """
    call = module_call(Case(family, "module", seq_len, 1, "bfloat16", "cpu", 1, train))
    recorded = run(call, backend, train, Answers)
    works = Counter((*recorded.forward, *recorded.backward))
    return Count(family, seq_len, backend, train, tuple(works.items()))


class Recorded(NamedTuple):
    """The works of a forward and of a backward, in their order, and what has answered the reads of values."""

    forward: list[Work]
    backward: list[Work]
    reads: Reads


def run(call: ModuleCall, backend: str, train: bool, answers: Callable[[], Reads]) -> Recorded:
    """Run the module of a call twice without values, and return what the second run did.

    ``answers`` makes what answers the reads of one run. Other arguments as in :func:`count`.
    """
    works: list[Work] = []
    with readable_by_nobody(lambda *launch: works.append(work_of(*launch))), torch.set_grad_enabled(train):
        call.model.to("meta")
        args, kwargs = tree_map_only(Tensor, _on_meta, (call.args, call.kwargs))
        if backend != ORIGINAL:
            attnzoo.patch(call.model, {call.name: backend})
        for _ in range(2):  # the first run plans and fills caches
            works.clear()
            with answers() as reads, Recorder(works):
                output = call.module(*args, **kwargs)
                while not isinstance(output, Tensor):
                    output = output[0]
                launches = len(works)
                if output.requires_grad:
                    output.backward(torch.empty_like(output))
            tree_map_only(Tensor, _clear, (list(call.module.parameters()), args, kwargs))
    return Recorded(works[:launches], works[launches:], reads)


def _on_meta(tensor: Tensor) -> Tensor:
    return without_values(tensor).requires_grad_(tensor.requires_grad)


def _clear(tensor: Tensor) -> None:
    tensor.grad = None


class Answers(Reads):
    """Answers reads as inputs with one global token would. Attention of PyTorch is one launch, as on CUDA."""

    def value_read(self) -> None:
        pass

    def size_read(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if func not in (Tensor.nonzero, torch.nonzero):
            raise NotImplementedError(f"got {func.__name__}, whose size depends on values; allowed: nonzero")
        shape = (args[0].ndim, 1) if kwargs.get("as_tuple") else (1, args[0].ndim)
        indices = torch.empty(shape, dtype=torch.int64, device="meta")
        return tuple(indices.unbind()) if kwargs.get("as_tuple") else indices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is Tensor.max and len(args) == 1 and args[0].is_meta and not args[0].is_floating_point():
            func(*args)  # is recorded
            return torch.tensor(1)  # a number of tokens, with which the model's code goes on to compute sizes
        return super().__torch_function__(func, types, args, kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Run the operator of a fused kernel. On meta, PyTorch would choose operators that store all scores."""
    if attn_mask is not None:
        raise NotImplementedError("got a mask in scaled_dot_product_attention; allowed: no mask")
    if enable_gqa:
        key, value = (tensor.expand(-1, query.shape[1], -1, -1) for tensor in (key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    output: Tensor = attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return output
