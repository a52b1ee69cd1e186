"""What operators of PyTorch compute and move. Only shapes count, so the tensors may be on the device ``meta``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operators that reserve memory or change the shape. Together with views, they launch nothing on a device.
_LAUNCH_NOTHING = {
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided", "split", "split_with_sizes", "unbind", "unfold", "diagonal", "detach", "as_strided"),
}
# These read only the rows that an index selects, and write the rows once.
_READ_ROWS = ("index", "index_select", "gather", "embedding")
_OVERWRITE = ("copy_", "fill_", "zero_")  # the first argument is written, and not read


class Work(NamedTuple):
    """One launch on a device: FLOPs of matrix products, and bytes that are read or written.

    Attributes:
        name: the name of the operator, or of the kernel of Triton.
        flops: two for each multiplication and addition of a matrix product. All other arithmetic is left out.
        bytes: the sizes of all inputs and outputs. A broadcast dimension counts once.
        is_triton: whether Triton launches the kernel.
    """

    name: str
    flops: int
    bytes: int
    is_triton: bool = False


class Recorder(TorchDispatchMode):
    """Appends the work of each operator that launches a kernel to a list."""

    def __init__(self, works: list[Work]) -> None:
        super().__init__()
        self._works = works

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        is_on_host = all(tensor.device.type == "cpu" for tensor in _tensors(output))
        if not (func.is_view or name in _LAUNCH_NOTHING or is_on_host):
            self._works.append(Work(name, _flops(func, args, kwargs, output), _bytes(name, args, kwargs, output)))
        return output


def size_of(tensor: Tensor) -> int:
    """Return the number of bytes of memory that a tensor covers. Broadcast and overlapping entries count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride != 0 else min(size, 1)
    return min(count * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _sum(tensors: Iterable[Tensor]) -> int:
    return sum(map(size_of, tensors))


def _bytes(name: str, args: Any, kwargs: Any, output: Any) -> int:
    written = _sum(_tensors(output))
    if name in _READ_ROWS:
        return written + min(written, size_of(args[0])) + _sum(_tensors(args[1:]))
    return written + _sum(_tensors((args[1:] if name in _OVERWRITE else args, kwargs)))


def _flops(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    formula = flop_registry.get(func.overloadpacket)
    if formula is None:
        return 0
    flops = int(formula(*args, **kwargs, out_val=output))
    names = [argument.name for argument in func._schema.arguments]
    # The formulas of attention ignore causality, and the kernels skip the hidden half.
    position = names.index("is_causal") if "is_causal" in names else len(args)
    is_causal = args[position] if position < len(args) else kwargs.get("is_causal", False)
    return flops // 2 if is_causal else flops
