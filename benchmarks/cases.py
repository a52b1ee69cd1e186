"""Build the subject that a contender runs in a case: a whole model or one attention module, on real text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import attnzoo
from attnzoo.auto.selection import AutoBackend
from attnzoo.backend import Backend
from attnzoo.benchmarks.decoding import GATE_TOKENS, TIMED_TOKENS, Decoding
from attnzoo.benchmarks.measure import cpu_seconds, device_seconds
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.workload import SEED
from attnzoo.spelling import configured

AUTO = AutoBackend.name
HOST_SCOPES = ("overhead", "decode")  # time the host: CPU time instead of wall-clock time
SCOPES = ("model", "module", "attention", *HOST_SCOPES)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


@dataclass(frozen=True)
class Case:
    """The settings that all contenders of a case share.

    Attributes:
        family: name of a workload in :data:`~attnzoo.benchmarks.models.WORKLOADS`.
        scope: ``"model"`` is the whole model. ``"module"`` is one self-attention module including its projections.
            ``"attention"`` is the same module, but the time of the projections is subtracted. ``"overhead"`` is the
            CPU time of one call of the same module. ``"decode"`` is the CPU time per token of the whole model in greedy
            decoding.
        seq_len: input length in tokens. In scope ``"decode"``, this is the length of the prompt.
        batch: number of passages.
        dtype: a key of :data:`DTYPES`.
        device: ``"cpu"`` or ``"cuda"``.
        threads: number of CPU threads of torch.
        train: True means that a run is a forward and a backward, both without dropout. False means only a forward.
        layers: number of layers in each stack (encoder or decoder) of a whole model. None means as many as published.
        clock: a key of :data:`~attnzoo.benchmarks.measure.CLOCKS`. The scopes in :data:`HOST_SCOPES` ignore it.
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
    clock: str = "wall"

    @property
    def mode(self) -> str:
        """The mode as text: ``"forward"`` or ``"forward+backward"``."""
        return "forward+backward" if self.train else "forward"


@dataclass
class Subject:
    """A module and its inputs.

    Attributes:
        model: the model to patch. :meth:`release` replaces the model by :attr:`module`.
        module: the module to run. It is the model or a part of the model.
        patched: glob that matches the names of the modules to patch in :attr:`model`.
        call: function that runs the forward and returns the output tensor.
        backward: function of the output tensor that runs the backward.
        inputs: floating-point inputs of the module that get gradients.
        tokens: number of steps in a call. Every step runs the attention modules whose host time the case measures.
        timer: function that runs the module and returns the seconds of one step. None means the time of :meth:`step`.
        owners: the modules whose layers share values with the module (``PatchPoint.shared_in``), set by :meth:`patch`.
    """

    case: Case
    model: nn.Module
    module: nn.Module
    patched: str
    call: Callable[[], Tensor]
    backward: Callable[[Tensor], None]
    inputs: list[Tensor] = field(default_factory=list)
    tokens: int = 1
    timer: Callable[[], float] | None = None
    owners: tuple[nn.Module | None, ...] = ()

    def patch(self, backend: str) -> attnzoo.Handle:
        """Patch the module, then :meth:`release` the model. ``backend`` has the syntax of the option ``--backend``."""
        handle = attnzoo.patch(self.model, {self.patched: backend_of(backend)})
        # Without its owner, the module could not know that all layers are patched. LongT5's first layer would then also
        # run its original forward, to pass on the bias in the original format.
        self.owners = tuple(forward.plan.target.owner for forward in handle.forwards)
        self.release()
        return handle

    def release(self) -> None:
        """Free everything in the model except the module, so that only the memory of the module is measured."""
        self.model = self.module

    def step(self) -> None:
        """Run the module once, with its backward if :attr:`Case.train` is True. The benchmark times this method."""
        with torch.set_grad_enabled(self.case.train):
            output = self.call()
            if self.case.train:
                self.backward(output)

    def seconds(self) -> float:
        """Return the seconds of one timed run, as the scope counts seconds."""
        if self.timer is not None:
            with torch.no_grad():
                return self.timer()
        if self.case.scope == "overhead":
            return cpu_seconds(self.step)
        return device_seconds(self.step, self.clear, self.case.device, self.case.clock)

    def forward(self) -> None:
        """Run the forward of :meth:`step`. With gradients, other code or another kernel may run than without."""
        with torch.set_grad_enabled(self.case.train):
            self.call()

    def clear(self) -> None:
        for tensor in (*self.module.parameters(), *self.inputs):
            tensor.grad = None


def backend_of(text: str) -> str | Backend:
    """Return the backend for the text of an option ``--backend``: ``"auto"``, or a configured backend."""
    return text if text == AUTO else configured(text)


def build(case: Case) -> Subject:
    """Return the subject of a case. The weights and the text are the same in every process."""
    builders = {"model": _whole_model, "decode": _decoding}
    return builders.get(case.scope, _one_module)(case)


def _whole_model(case: Case) -> Subject:
    workload = find_workload(case.family)
    train_at = case.seq_len if case.train else None
    model = workload.build(case.layers, case.seq_len, train_at).to(case.device, DTYPES[case.dtype])
    kwargs, targets = workload.read(case.batch, case.seq_len, case.device)

    def call() -> Tensor:
        logits: Tensor = model(**kwargs).logits
        return logits

    def backward(logits: Tensor) -> None:
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()).backward()

    return Subject(case, model, model, "*", call, backward)


def _decoding(case: Case) -> Subject:
    workload = find_workload(case.family)
    model = workload.build(case.layers, case.seq_len + TIMED_TOKENS).to(case.device, DTYPES[case.dtype])
    decoding = Decoding(model, workload.read(case.batch, case.seq_len, case.device).kwargs)

    def backward(output: Tensor) -> None:
        raise NotImplementedError("got a backward of decoding; allowed: a forward")

    call = partial(decoding.tokens, GATE_TOKENS)
    timer = decoding.cpu_seconds_per_token
    return Subject(case, model, model, "*", call, backward, tokens=GATE_TOKENS, timer=timer)


class ModuleCall(NamedTuple):
    """The first self-attention module of a one-layer model, and the arguments of its call in the model.

    Attributes:
        model: the model.
        name: the name of the module in the model.
        args, kwargs: copies of the arguments.
        inputs: the hidden states among the arguments that get gradients, if :attr:`Case.train` is True.
    """

    model: nn.Module
    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]


def module_call(case: Case) -> ModuleCall:
    """Return the module that a case measures, with arguments from a model run."""
    workload = find_workload(case.family)
    model = workload.build(layers=1, seq_len=case.seq_len).to(case.device, DTYPES[case.dtype])
    name, module = next((n, m) for n, m in model.named_modules() if type(m).__name__ == workload.attention)
    kwargs = workload.read(case.batch, case.seq_len, case.device).kwargs
    model_args, model_kwargs, without_gradients = _capture(model, module, kwargs)
    inputs: list[Tensor] = []

    def copy_input(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        leaf = value.detach().clone()
        # Reversible layers run their forward without gradients. Then only the shape shows which inputs are states.
        is_states = value.is_floating_point() and value.ndim == 3
        if case.train and (is_states if without_gradients else value.requires_grad):
            inputs.append(leaf.requires_grad_())
        return leaf

    return ModuleCall(model, name, module, tree_map(copy_input, model_args), tree_map(copy_input, model_kwargs), inputs)


def _one_module(case: Case) -> Subject:
    """Return a subject for the module of :func:`module_call`."""
    call = module_call(case)
    module, args, kwargs = call.module, call.args, call.kwargs
    return module_subject(case, call.model, module, call.name, lambda: module(*args, **kwargs), call.inputs)


def module_subject(
    case: Case, model: nn.Module, module: nn.Module, patched: str, call: Callable[[], Any], inputs: list[Tensor]
) -> Subject:
    """Return a subject for one module. ``call`` runs the module. The first tensor in its result is the output.

    The backward starts from a random gradient of the output, with a fixed seed. If the first input and the output
    differ in shape, the backward starts from the values of the output instead.
    """
    shape = inputs[0].shape if case.train and inputs else None
    cotangent = None if shape is None else random_normal(case, shape, torch.Generator().manual_seed(SEED))

    def first_tensor() -> Tensor:
        output = call()
        while not isinstance(output, Tensor):
            output = output[0]
        return output

    def backward(output: Tensor) -> None:
        output.backward(cotangent if cotangent is not None and cotangent.shape == output.shape else output.detach())

    return Subject(case, model, module, patched, first_tensor, backward, inputs)


def random_normal(case: Case, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a random tensor in the dtype and on the device of the case. The values depend only on ``generator``."""
    return torch.randn(shape, generator=generator).to(case.device, DTYPES[case.dtype])


class _CapturedError(Exception):
    """Exception that stops the forward of the model directly before the module runs."""


def _capture(
    model: nn.Module, module: nn.Module, kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """Return arguments and keyword arguments of the module's first call, and whether gradients are disabled in it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], bool]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((args, keywords, not torch.is_grad_enabled()))
        raise _CapturedError

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.enable_grad():  # so that hidden states require gradients, but masks do not
            model(**kwargs)
    except _CapturedError:
        pass
    finally:
        hook.remove()
    return calls[0]


class _LinearRecorder(TorchFunctionMode):
    """PyTorch mode that records every call of ``linear``. It uses no module hooks, because models may detect hooks."""

    def __init__(self) -> None:
        super().__init__()
        # For each call: weight, bias, shape of the input, and whether the input requires a gradient.
        self.calls: list[tuple[Tensor, Tensor | None, torch.Size, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            states, weight, *bias = args
            self.calls.append((weight, bias[0] if bias else None, states.shape, states.requires_grad))
        return func(*args, **(kwargs or {}))


class Projections:
    """The linear projections of a module, on random inputs. Scope ``attention`` subtracts the time of :meth:`step`."""

    def __init__(self, subject: Subject) -> None:
        case = subject.case
        with _LinearRecorder() as recorder, torch.set_grad_enabled(case.train):
            subject.call()
        options: dict[str, Any] = dict(dtype=DTYPES[case.dtype], device=case.device)
        self._train, self._device, self._clock = case.train, case.device, case.clock
        self._calls: list[tuple[Tensor, Tensor | None, Tensor, Tensor | None]] = []
        for weight, bias, shape, requires_grad in recorder.calls:
            states = torch.randn(shape, **options).requires_grad_(requires_grad)
            cotangent = torch.randn((*shape[:-1], weight.shape[0]), **options) if case.train else None
            self._calls.append((weight, bias, states, cotangent))

    def step(self) -> None:
        """Run every projection once, with its backward if :attr:`Case.train` is True."""
        with torch.set_grad_enabled(self._train):
            for weight, bias, states, cotangent in self._calls:
                output = torch.nn.functional.linear(states, weight, bias)
                if cotangent is not None:
                    output.backward(cotangent)

    def clear(self) -> None:
        for tensor in (tensor for call in self._calls for tensor in call if tensor is not None):
            tensor.grad = None

    def seconds(self) -> float:
        """Return the seconds of one timed run of the projections."""
        return device_seconds(self.step, self.clear, self._device, self._clock)
