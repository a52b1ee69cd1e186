"""Peers: other libraries' attention in the same table, timed like every row and judged by nobody.

A workload names the peer its attention resembles (:attr:`~attnzoo.benchmarks.models.Workload.peer`). The peer computes
something slightly different, so the float64 oracle has nothing to say about its numbers, and its row never counts as
ours. It has no projections: it gets random normal queries, keys and values of the family's sizes. Nothing of a peer is
imported before its own worker process prepares it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnzoo.benchmarks import rows as status
from attnzoo.benchmarks.cases import DTYPES, Case, Subject, first_tensor
from attnzoo.benchmarks.contenders import Contender, Entry
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.worker import Problem
from attnzoo.benchmarks.workload import SEED, Peer

SCOPE = "attention"


@dataclass(frozen=True)
class Library:
    """How another library's attention is reached and called: ``cls(**options)(*inputs)``.

    Attributes:
        module: what is imported.
        cls: the attention class in it.
        inputs: how many tensors ``(batch * heads, S, dim_head)`` it takes.
        multiple: what the input length has to be a multiple of, given the options of the class.
    """

    module: str
    cls: str
    inputs: int
    multiple: Callable[[Mapping[str, Any]], int]


# By the name the package is installed under.
LIBRARIES: dict[str, Library] = {
    "local-attention": Library("local_attention", "LocalAttention", 3, lambda options: 1),  # q, k, v; pads itself
    "reformer-pytorch": Library("reformer_pytorch", "LSHAttention", 2, lambda options: 2 * options["bucket_size"]),
}


@dataclass(frozen=True)
class PeerContender(Contender):
    """Another library's attention; ``name`` is a key of :data:`LIBRARIES`."""

    peer: ClassVar[bool] = True

    def listed(self, case: Case) -> bool:
        """Only beside the attention it resembles, projections taken off."""
        peer = find_workload(case.family).peer
        return case.scope == SCOPE and peer is not None and peer.package == self.name

    def obstacle(self, case: Case) -> str | None:
        """A length the library does not take."""
        multiple = LIBRARIES[self.name].multiple(_peer(case).options)
        return f"takes multiples of {multiple} tokens only" if case.seq_len % multiple else None

    def prepare(self, case: Case) -> Entry:
        """Import the library, build its module and its inputs.

        Raises:
            Problem: it is not installed, or broken.
        """
        made, peer = _import(self.name), _peer(case)
        module = made(**peer.options).to(case.device, DTYPES[case.dtype]).eval()
        shape = (case.batch * find_workload(case.family).heads, case.seq_len, peer.dim_head)
        return Entry(_subject(case, module, shape, LIBRARIES[self.name].inputs), _label(self.name))


def peers_of(families: Iterable[str]) -> tuple[PeerContender, ...]:
    """The peers that the workloads of these names have, each once."""
    found = (find_workload(family).peer for family in families)
    return tuple(PeerContender(name) for name in dict.fromkeys(peer.package for peer in found if peer is not None))


def _peer(case: Case) -> Peer:
    peer = find_workload(case.family).peer
    if peer is None:
        raise Problem(status.SKIPPED, f"{case.family} names no peer")
    return peer


def _import(package: str) -> Callable[..., nn.Module]:
    """The attention class of a library; a package that is absent or broken, in whatever way, is a row left out."""
    library = LIBRARIES[package]
    remedy = f"pip install {package}, or pip install 'attnzoo[peers]'"
    try:
        made: Callable[..., nn.Module] = getattr(import_module(library.module), library.cls)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == library.module:
            raise Problem(status.SKIPPED, f"needs the package {package!r}: {remedy}") from error
        broken = f"the package {package!r} cannot be imported ({type(error).__name__}: {error})"
        raise Problem(status.SKIPPED, f"{broken}: {remedy}") from error
    return made


def _label(package: str) -> str:
    """The class that runs, with its library's version."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return f"{LIBRARIES[package].cls} {version}"


def _subject(case: Case, module: nn.Module, shape: tuple[int, ...], count: int) -> Subject:
    """The module on seeded random normal tensors of one shape."""
    generator = torch.Generator().manual_seed(SEED)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator).to(case.device, DTYPES[case.dtype])

    inputs = [normal().requires_grad_(case.train) for _ in range(count)]
    cotangent = normal() if case.train else None

    def call() -> Tensor:
        return first_tensor(module(*inputs))

    def backward(output: Tensor) -> None:
        output.backward(cotangent)

    return Subject(case, None, module, "", call, backward, inputs)
