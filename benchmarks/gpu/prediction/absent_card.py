"""A CUDA card that is not there: Triton compiles for the card, and a launch calls a function instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import KernelInterface

from attnzoo.backends.triton import tile_sizes

MULTIPROCESSORS = 132  # of an H100 SXM and of an H200

Launch = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], object]


class _AbsentCard(DriverBase):
    """The driver of a card that is not there. Triton compiles for its capability, and nothing can be launched."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> Any:
        return self._target.arch  # kernels are cached by device

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> NoReturn:
        raise NotImplementedError


@contextmanager
def on_an_absent_card(capability: tuple[int, int], launch: Launch) -> Iterator[None]:
    """Let kernel launches call ``launch(kernel, grid, args, kwargs)``.

    ``capability`` is the compute capability of the card, which decides the sizes of the tiles.
    """

    def launcher(self: Any, grid: Any) -> Callable[..., object]:
        return lambda *args, **kwargs: launch(self, grid, args, kwargs)

    def forget() -> None:
        for function in (tile_sizes.tile, tile_sizes.programs_at_once):
            function.cache_clear()

    properties = mock.Mock(multi_processor_count=MULTIPROCESSORS)
    driver = triton.runtime.driver
    before = driver._active
    forget()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", launcher))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: capability))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
        driver.set_active(_AbsentCard(capability))
        try:
            yield
        finally:
            driver.set_active(before)
            forget()
