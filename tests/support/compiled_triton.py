"""What the Triton backend would do on a CUDA card that is not there: compile the kernels, or count the operations."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.backends.triton.attend import attend
from attnzoo.benchmarks.gpu.prediction.absent_card import on_an_absent_card

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: name, file, registers per thread, bytes of stack per thread, bytes of shared memory."""

    name: str
    file: str
    registers: int
    stack: int
    shared: int


def run(attention, grad):
    """Run forward and, with ``grad``, backward of an attention on the Triton backend."""
    with torch.set_grad_enabled(grad):
        output = attend(attention)
        leaves = [tensor for tensor in attention.tensors() if tensor.requires_grad]
        if grad:
            torch.autograd.grad(output, leaves, torch.empty_like(output), allow_unused=True)


def compile_attention(attention, capability, folder, grad=True) -> list[Compiled]:
    """Return the kernels that forward and, with ``grad``, backward of an attention launch. ``folder`` is for files."""
    kernels = {}

    def compile_it(kernel, grid, args, kwargs):
        compiled = kernel.warmup(*args, grid=grid, **kwargs)
        kernels[compiled.hash] = compiled

    with on_an_absent_card(capability, compile_it):
        run(attention, grad)
    return [_measured(kernel, folder) for kernel in kernels.values()]


class _Log(TorchDispatchMode):
    """Appends the name of each operation of PyTorch to a list."""

    def __init__(self, names):
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of(attention, grad=True) -> list[str]:
    """Return the names of all operations and kernels of forward and, with ``grad``, backward of an attention."""
    names = []
    with on_an_absent_card((9, 0), lambda kernel, *_: names.append(kernel.fn.__name__)), _Log(names):
        run(attention, grad)
    return names


def _measured(kernel, folder):
    cubin = Path(folder) / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    text = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    usage = dict(part.split(":") for part in text.splitlines()[-1].split() if part.count(":") == 1)
    return Compiled(kernel.name, cubin.name, int(usage["REG"]), int(usage["STACK"]), kernel.metadata.shared)
