"""The agenda: what to measure, most important first, with an estimate and a limit for each item."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from attnzoo.benchmarks.gpu.calls import calls
from attnzoo.benchmarks.gpu.correctness import attentions, models
from attnzoo.benchmarks.gpu.results import Keep
from attnzoo.benchmarks.gpu.rows import rows
from attnzoo.benchmarks.gpu.settings import Settings
from attnzoo.benchmarks.gpu.suite import suite
from attnzoo.benchmarks.models import WORKLOADS

BOTH, FORWARD = (False, True), (False,)


@dataclass(frozen=True)
class Item:
    """One part of the agenda. It runs in a separate process, which is killed at the limit.

    Attributes:
        name: the name, which is also the name of the JSON file.
        run: the function that runs the item and keeps its results as they come.
        estimate: seconds that the item is expected to take, with the start of the process. An item starts only if half
            of these seconds are left.
        limit: seconds after which the item is killed. The results until then count.
    """

    name: str
    run: Callable[[Settings, Keep], None]
    estimate: float
    limit: float


def agenda(settings: Settings) -> tuple[Item, ...]:
    """Return the items, most important first."""
    return tuple(_tiny() if settings.tiny else _full())


def _full() -> Iterator[Item]:
    # A module takes about a minute on an H200 (measured with a process for each contender, which needs longer).
    yield Item("attentions", partial(attentions, seconds=40.0), 55, 150)
    yield from _of_families("module", (16384,), 30, 180)
    yield from _of_families("attention", (16384,), 40, 240)
    yield Item("calls", partial(calls, seq_len=1024), 60, 240)
    yield from _of_families("module", (4096, 65536), 60, 300)
    yield from _of_families("model", (512, 4096, 16384), 90, 400)
    yield Item("decode", partial(_rows, scope="decode", families=tuple(WORKLOADS), seq_lens=(1024,)), 120, 400)
    yield Item("models", partial(models, seq_len=1024), 150, 400)
    yield from _of_families("attention", (4096, 65536), 80, 300)
    yield Item("tests", suite, 400, 1800)


def _tiny() -> Iterator[Item]:
    """The same kinds of items, each with one or two families. The limits are wide, because the machine may be busy."""
    yield Item("attentions", partial(attentions, seconds=2.0), 10, 900)
    for scope, family in (("module", "led"), ("attention", "longt5_local"), ("model", "gpt_neox")):
        yield _of_family(scope, family, (64,), 10, 900)
    yield Item("calls", partial(calls, seq_len=64), 20, 900)
    yield Item("decode", partial(_rows, scope="decode", families=("gpt_bigcode",), seq_lens=(32,)), 10, 900)
    yield Item("models", partial(models, seq_len=32), 20, 900)
    yield Item("tests", partial(suite, folder="tests/properties"), 20, 900)


def _of_families(scope: str, lengths: tuple[int, ...], estimate: float, limit: float) -> Iterator[Item]:
    for family in WORKLOADS:
        yield _of_family(scope, family, lengths, estimate, limit)


def _of_family(scope: str, family: str, lengths: tuple[int, ...], estimate: float, limit: float) -> Item:
    name = "-".join((scope, family, *map(str, lengths)))
    return Item(name, partial(_rows, scope=scope, families=(family,), seq_lens=lengths), estimate, limit)


def _rows(settings: Settings, keep: Keep, scope: str, **fields: Any) -> None:
    rows(settings, keep, scope=scope, modes=FORWARD if scope == "decode" else BOTH, **fields)
