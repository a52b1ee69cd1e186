"""A model family at a published configuration: built with seeded weights, reading real text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from attnzoo.benchmarks.text import read_tokens
from attnzoo.benchmarks.weights import skip_initialisation, spread
from attnzoo.errors import InvalidArgumentError

SEED = 0


class Inputs(NamedTuple):
    """What a model reads in a run.

    Attributes:
        kwargs: keyword arguments of the model's forward.
        targets: ``(batch, n)`` token ids the logits ``(batch, n, vocabulary)`` are trained on.
    """

    kwargs: dict[str, Any]
    targets: Tensor


@dataclass(frozen=True)
class Peer:
    """Another library's attention that resembles a family's.

    Attributes:
        package: a key of ``peers.LIBRARIES``.
        dim_head: size of a head.
        options: arguments of the library's class.
    """

    package: str
    dim_head: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """One family at a published configuration.

    Attributes:
        name: what ``--model`` takes.
        checkpoint: whose configuration it is.
        published: the configuration's numbers, as published.
        config_class: ``"module:Class"`` of the configuration.
        model_class: ``"module:Class"`` of the model.
        attention: class name of the self-attention module that the scopes ``module`` and ``attention`` run.
        heads: attention heads, for the memory estimate of the dense oracle.
        layers: layers that attend over the whole input, for the same.
        special_tokens: the id of byte 0.
        inputs: tokens in, model inputs out: ``inputs(tokens)`` with :attr:`extra` more tokens than the input length.
        extra: how many tokens ``inputs`` needs beyond the input length.
        shrink: ``shrink(published, layers)`` is the same configuration with fewer layers.
        positions: the configuration's field that limits the input length, or None.
        reserved: how many of these positions no token takes.
        training: ``training(published, seq_len)`` is what the configuration has otherwise to train the whole model at a
            length, for a model whose own backward works in training mode only; raises InvalidArgumentError for a length
            it cannot train at. None: it trains in eval mode, which drops nothing.
        peer: whose attention stands beside it in scope ``attention``, or None.
    """

    name: str
    checkpoint: str
    published: Mapping[str, Any]
    config_class: str
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

    def too_long(self, seq_len: int) -> str | None:
        """Return what the published configuration says against inputs of a length in tokens; None: nothing."""
        most = None if self.positions is None else int(self.published[self.positions]) - self.reserved
        if most is None or seq_len <= most:
            return None
        return f"the published configuration has {most} positions"

    def obstacle(self, seq_len: int, train: bool) -> str | None:
        """Return why the whole model cannot be trained at a length in tokens; None: it can, or is not trained."""
        if train and self.training is not None:
            try:
                self.training(self.published, seq_len)
            except InvalidArgumentError as error:
                return str(error)
        return None

    def build(self, layers: int | None = None, seq_len: int | None = None, train_at: int | None = None) -> nn.Module:
        """The model with seeded spread weights, float32 on CPU; in eval mode, or one without dropout.

        Args:
            layers: fewer layers than published; None: as published.
            seq_len: make the position table at least as long; None: as published.
            train_at: input length to train the whole model at; None: it is not trained.

        Raises:
            InvalidArgumentError: it cannot be trained at that length.
        """
        values = dict(self.published) if layers is None else self.shrink(self.published, layers)
        if self.positions is not None and seq_len is not None:
            values[self.positions] = max(values[self.positions], seq_len + self.reserved)
        trained = train_at is not None and self.training is not None
        if train_at is not None and self.training is not None:
            values.update(self.training(values, train_at))
        with skip_initialisation():
            model: nn.Module = _load(self.model_class)(_load(self.config_class)(**values))
        model.tie_weights()  # type: ignore[operator]
        spread(model, SEED)
        return model.train(trained)

    def read(self, batch: int, seq_len: int) -> Inputs:
        """Inputs of ``batch`` passages of ``seq_len`` tokens of the book."""
        return self.inputs(read_tokens(batch, seq_len + self.extra, self.special_tokens))


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
