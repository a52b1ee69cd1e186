"""Workloads: a model of a family with its published configuration and random weights, and inputs of real text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from attnzoo.benchmarks.text import read_tokens
from attnzoo.benchmarks.weights import skip_initialisation, spread
from attnzoo.spec.patterns import Causal, Window

SEED = 0


class Inputs(NamedTuple):
    """Keyword arguments of a forward, and the target token ids ``(batch, n)`` of the loss."""

    kwargs: dict[str, Any]
    targets: Tensor


@dataclass(frozen=True)
class Peer:
    """The attention of another library, with which the benchmark compares a family.

    Attributes:
        package: the pip package of the library. ``peers.LIBRARIES`` names the attention class of each package.
        dim_head: the size of a head.
        options: keyword arguments for the constructor of the attention class.
    """

    package: str
    dim_head: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """The attention of a family, as other libraries need its description.

    Attributes:
        kv_heads: number of key heads. :attr:`Workload.heads` has the number of query heads.
        head_dim: dimension of a head.
        pattern: which query sees which key. A chunk is replaced by the window that shows as many keys on average.
        has_bias: whether a learned bias by distance is added to the scores.
        global_keys: number of keys at the start that every query sees.
    """

    kv_heads: int
    head_dim: int
    pattern: Causal | Window
    has_bias: bool = False
    global_keys: int = 0


@dataclass(frozen=True)
class Workload:
    """One family with a published configuration.

    Attributes:
        name: value of the option ``--model``.
        checkpoint: the checkpoint that has this configuration.
        published: arguments of the configuration class, as published.
        model_class: ``"module:Class"`` of the model.
        attention: class name of the self-attention module that the scopes ``module`` and ``attention`` run.
        heads: number of attention heads, for the memory estimate of dense backends.
        layers: number of layers that attend over the whole input, for the memory estimate of dense backends.
        special_tokens: number of special tokens. Their ids are smaller than the ids of bytes.
        inputs: function that turns token ids ``(batch, seq_len + extra)`` into model inputs.
        extra: number of tokens that ``inputs`` needs in addition to the input length.
        shrink: function of ``published`` and a number of layers that returns the configuration with fewer layers.
        positions: name of the configuration's field that limits the input length. None means no limit.
        reserved: number of rows of the position table that no token uses.
        training: function of ``published`` and an input length. It returns the configuration fields to change, so that
            training mode has no dropout. It raises InvalidArgumentError if the model cannot train with this length.
            None means that the backward works in eval mode, so training mode is not needed.
        peer: the peer in scope ``attention``. None means that the family has no peer.
        shape: heads and pattern of the attention, for the peers that are kernels of PyTorch. None means that no such
            kernel computes a similar attention.
        small: fields of the configuration to change in :meth:`reduced`.
    """

    name: str
    checkpoint: str
    published: Mapping[str, Any]
    model_class: str
    attention: str
    heads: int
    layers: int
    special_tokens: int
    inputs: Callable[[Tensor], Inputs]
    extra: int
    shrink: Callable[[Mapping[str, Any], int], dict[str, Any]]
    positions: str | None = None
    reserved: int = 0
    training: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None
    peer: Peer | None = None
    shape: Shape | None = None
    small: Mapping[str, Any] = field(default_factory=dict)

    def reduced(self) -> Workload:
        """Return the workload with a configuration of a few thousand weights, for runs that only test the benchmark."""
        return replace(self, checkpoint=f"{self.checkpoint} (reduced)", published={**self.published, **self.small})

    def too_long(self, seq_len: int) -> str | None:
        """Return why ``seq_len`` tokens are too many for the published configuration, or None if they are not."""
        limit = None if self.positions is None else int(self.published[self.positions]) - self.reserved
        return None if limit is None or seq_len <= limit else f"the published configuration has {limit} positions"

    def build(self, layers: int | None = None, seq_len: int | None = None, train_at: int | None = None) -> nn.Module:
        """Return the model in float32 on the CPU, without dropout.

        The position table has at least ``seq_len`` rows. For a training run, ``train_at`` is the input length.
        """
        values = dict(self.published) if layers is None else self.shrink(self.published, layers)
        if self.positions is not None and seq_len is not None:
            values[self.positions] = max(values[self.positions], seq_len + self.reserved)
        changes = None if train_at is None or self.training is None else self.training(values, train_at)
        values.update(changes or {})
        module, _, name = self.model_class.partition(":")
        model_class = getattr(import_module(module), name)
        with skip_initialisation():
            model: nn.Module = model_class(model_class.config_class(**values))
        model.tie_weights()  # type: ignore[operator]
        spread(model, SEED)
        return model.train(changes is not None)

    def check_training(self, seq_len: int) -> None:
        """Raise InvalidArgumentError if the whole model cannot train with inputs of ``seq_len`` tokens."""
        if self.training is not None:
            self.training(self.published, seq_len)

    def read(self, batch: int, seq_len: int, device: str = "cpu") -> Inputs:
        """Return the inputs on ``device`` for ``batch`` passages of the book. Each passage has ``seq_len`` tokens."""
        inputs = self.inputs(read_tokens(batch, seq_len + self.extra, self.special_tokens))
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
