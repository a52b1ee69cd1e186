"""Peers: attentions of other libraries. The tables include the times of peers, but no gate checks their numbers.

``Workload.peer`` names the peer of a family. A peer computes a function that is similar to the family's attention, but
not equal. So the float64 oracle cannot check a peer, and a peer never makes a shootout fail. A peer has no projections.
The inputs are random queries, keys and values of the family's sizes. Only worker processes import the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, ClassVar

import torch
from torch import nn

from attnzoo.benchmarks.cases import DTYPES, Case, module_subject, random_normal
from attnzoo.benchmarks.contenders import Contender, PreparedContender
from attnzoo.benchmarks.models import find_workload
from attnzoo.benchmarks.rows import SKIPPED, Problem
from attnzoo.benchmarks.workload import SEED, Peer

SCOPE = "attention"


@dataclass(frozen=True)
class Library:
    """The attention class of a library, and the inputs that its instances need.

    Attributes:
        module: name of the Python module that contains the class.
        cls: name of the class. :attr:`Peer.options` has the arguments of its constructor.
        inputs: number of input tensors of a forward. Each tensor has the shape ``(batch * heads, S, dim_head)``.
        multiple: function of the options. The input length must be a multiple of the integer that it returns.
    """

    module: str
    cls: str
    inputs: int
    multiple: Callable[[Mapping[str, Any]], int]


# The keys are the names of the packages for pip.
LIBRARIES: dict[str, Library] = {
    "local-attention": Library("local_attention", "LocalAttention", 3, lambda options: 1),  # q, k, v; pads by itself
    "reformer-pytorch": Library("reformer_pytorch", "LSHAttention", 2, lambda options: 2 * options["bucket_size"]),
}


@dataclass(frozen=True)
class PeerContender(Contender):
    """The attention of another library. :attr:`name` is the pip package of the library, a key of :data:`LIBRARIES`."""

    peer: ClassVar[bool] = True

    def has_row(self, case: Case) -> bool:
        peer = find_workload(case.family).peer
        return case.scope == SCOPE and peer is not None and peer.package == self.name

    def check(self, case: Case) -> None:
        multiple = LIBRARIES[self.name].multiple(_peer(case).options)
        if case.seq_len % multiple:
            raise Problem(SKIPPED, f"supports only multiples of {multiple} tokens")

    def prepare(self, case: Case) -> PreparedContender:
        cls, peer, library = _import(self.name), _peer(case), LIBRARIES[self.name]
        module = cls(**peer.options).to(case.device, DTYPES[case.dtype]).eval()
        shape = (case.batch * find_workload(case.family).heads, case.seq_len, peer.dim_head)
        generator = torch.Generator().manual_seed(SEED)
        inputs = [random_normal(case, shape, generator).requires_grad_(case.train) for _ in range(library.inputs)]
        subject = module_subject(case, module, module, "", lambda: module(*inputs), inputs)
        try:
            version = metadata.version(self.name)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        return PreparedContender(subject, f"{library.cls} {version}")


def peers_of(families: Iterable[str]) -> tuple[PeerContender, ...]:
    """Return the peers of the named workloads, without duplicates."""
    peers = (find_workload(family).peer for family in families)
    return tuple(PeerContender(name) for name in dict.fromkeys(peer.package for peer in peers if peer is not None))


def _peer(case: Case) -> Peer:
    peer = find_workload(case.family).peer
    if peer is None:
        raise Problem(SKIPPED, f"{case.family} names no peer")
    return peer


def _import(package: str) -> Callable[..., nn.Module]:
    """Return the attention class of a library. Raise :class:`Problem` if the package is absent or broken."""
    library = LIBRARIES[package]
    remedy = f"pip install {package}, or pip install 'attnzoo[peers]'"
    try:
        cls: Callable[..., nn.Module] = getattr(import_module(library.module), library.cls)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == library.module:
            raise Problem(SKIPPED, f"needs the package {package!r}: {remedy}") from error
        broken = f"the package {package!r} cannot be imported ({type(error).__name__}: {error})"
        raise Problem(SKIPPED, f"{broken}: {remedy}") from error
    return cls
