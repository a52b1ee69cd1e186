"""One cell of the shootout, and the thing that runs in it: a whole model or one attention module, on real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import attnzoo
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.workload import SEED
from attnzoo.spelling import configured

SCOPES = ("model", "module", "attention")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """What every contender of a cell does alike.

    Attributes:
        family: name of the workload.
        scope: ``"model"``: the whole model; ``"module"``: one self-attention module, projections included;
            ``"attention"``: the same module with the measured time of its projections taken off.
        seq_len: input length in tokens.
        batch: passages.
        dtype: a key of :data:`DTYPES`.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads.
        train: forward and backward, dropout off; else forward without gradients.
        layers: of each stack of the whole model; None: as published.
    """

    family: str
    scope: str
    seq_len: int
    batch: int
    dtype: str
    device: str
    threads: int
    train: bool
    layers: int | None = None

    @property
    def mode(self) -> str:
        """``"forward"`` or ``"forward+backward"``."""
        return "forward+backward" if self.train else "forward"


@dataclass
class Subject:
    """Something to run: call it, clear its gradients, patch it.

    Attributes:
        case: the cell.
        model: what :func:`attnzoo.patch` gets.
        module: what is called: the model, or one module of it.
        patched: glob of the module names to patch.
        call: the forward; returns the output tensor.
        backward: takes the output.
        inputs: floating-point inputs that get gradients.
    """

    case: Case
    model: nn.Module | None
    module: nn.Module
    patched: str
    call: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    inputs: list[Tensor] = field(default_factory=list)

    def patch(self, backend: str) -> attnzoo.Handle:
        """Patch what is run with a backend as one types it; what only helped to build it is let go."""
        handle = attnzoo.patch(self._owner(), {self.patched: configured(backend)})
        self.release()
        return handle

    def implementation(self) -> str:
        """What transformers calls the attention the model has without a patch."""
        return str(getattr(self._owner().config, "_attn_implementation", None))

    def release(self) -> None:
        """Forget the rest of the model, so that a module's memory is its own."""
        if self.model is not self.module:
            self.model = None

    def _owner(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("the model around the module was let go")
        return self.model

    def step(self) -> None:
        """One run: what is timed."""
        with torch.set_grad_enabled(self.case.train):
            output = self.call()
            if self.case.train:
                self.backward(output)

    def forward(self) -> None:
        """The forward alone, without gradients."""
        with torch.no_grad():
            self.call()

    def clear(self) -> None:
        """Drop the gradients of a run."""
        for parameter in self.module.parameters():
            parameter.grad = None
        for tensor in self.inputs:
            tensor.grad = None


def build(case: Case) -> Subject:
    """Build the subject of a case: seeded weights and real text, the same in every process."""
    return _whole_model(case) if case.scope == "model" else _one_module(case)


def _whole_model(case: Case) -> Subject:
    workload = find_workload(case.family)
    train_at = case.seq_len if case.train else None
    model = workload.build(case.layers, case.seq_len, train_at).to(case.device, DTYPES[case.dtype])
    kwargs, targets = workload.read(case.batch, case.seq_len)
    kwargs = tree_map(lambda value: value.to(case.device) if isinstance(value, Tensor) else value, kwargs)
    targets = targets.to(case.device)

    def call() -> Tensor:
        logits: Tensor = model(**kwargs).logits
        return logits

    def backward(logits: Tensor) -> None:
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()

    return Subject(case, model, model, "*", call, backward)


def _one_module(case: Case) -> Subject:
    """The first self-attention module, on what a one-layer model gives it for real text: states, masks and all."""
    workload = find_workload(case.family)
    model = workload.build(layers=1, seq_len=case.seq_len).to(case.device, DTYPES[case.dtype])
    name, module = next((n, m) for n, m in model.named_modules() if type(m).__name__ == workload.attention)
    kwargs = tree_map(
        lambda value: value.to(case.device) if isinstance(value, Tensor) else value,
        workload.read(case.batch, case.seq_len).kwargs,
    )
    got_args, got_kwargs, recomputed = _capture(model, module, kwargs)
    inputs: list[Tensor] = []

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        leaf = value.detach().clone()
        # Reversible layers run without gradients, and with them on the way back: their states are told by their shape.
        states = value.is_floating_point() and value.ndim == 3
        if case.train and (states if recomputed else value.requires_grad):
            inputs.append(leaf.requires_grad_())
        return leaf

    args, keywords = tree_map(own, got_args), tree_map(own, got_kwargs)

    def call() -> Tensor:
        return first_tensor(module(*args, **keywords))

    shape = inputs[0].shape if inputs else None
    generator = torch.Generator().manual_seed(SEED)
    cotangent = None if shape is None else torch.randn(shape, generator=generator).to(case.device, DTYPES[case.dtype])

    def backward(output: Tensor) -> None:
        output.backward(cotangent if cotangent is not None and cotangent.shape == output.shape else output.detach())

    return Subject(case, model, module, name, call, backward, inputs)


class _CapturedError(Exception):
    """Stops a model once its first attention module was reached."""


def _capture(
    model: nn.Module, module: nn.Module, kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """What the module is called with, and whether gradients are off where it is."""
    found: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = []

    def look(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append((args, keywords, not torch.is_grad_enabled()))
        raise _CapturedError

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.enable_grad():  # tells hidden states, which carry gradients, from masks, which do not
            model(**kwargs)
    except _CapturedError:
        pass
    finally:
        hook.remove()
    return found[0]


def first_tensor(value: Any) -> Tensor:
    """What a module returns, without what comes along with it."""
    while not isinstance(value, Tensor):
        value = value[0]
    return value


class _Linears(TorchFunctionMode):
    """Collects every linear projection: weight, bias, shape of its input, and whether that gets a gradient.

    No hook: code may look for hooks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor | None, torch.Size, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            states, weight, *bias = args
            self.calls.append((weight, bias[0] if bias else None, states.shape, states.requires_grad))
        return func(*args, **(kwargs or {}))


class Projections:
    """The linear projections a module really runs, alone on inputs of the same shapes: what ``attention`` takes off."""

    def __init__(self, subject: Subject) -> None:
        case = subject.case
        with _Linears() as linears, torch.set_grad_enabled(case.train):
            subject.call()
        options: dict[str, Any] = dict(dtype=DTYPES[case.dtype], device=case.device)
        self._train = case.train
        self._calls = [
            (weight, bias, torch.randn(shape, **options).requires_grad_(trained))
            for weight, bias, shape, trained in linears.calls
        ]
        self._cotangents = [
            torch.randn((*x.shape[:-1], weight.shape[0]), **options) if case.train else None
            for weight, _, x in self._calls
        ]

    def step(self) -> None:
        """Run them once, backward too where the case trains."""
        with torch.set_grad_enabled(self._train):
            for (weight, bias, x), cotangent in zip(self._calls, self._cotangents, strict=True):
                output = torch.nn.functional.linear(x, weight, bias)
                if cotangent is not None:
                    output.backward(cotangent)

    def clear(self) -> None:
        """Drop the gradients of a run."""
        for weight, bias, x in self._calls:
            for tensor in (weight, bias, x):
                if tensor is not None:
                    tensor.grad = None
