"""The predictions as Markdown, for the terminal and for docs/results.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attnzoo.benchmarks.gpu.prediction import card
from attnzoo.benchmarks.gpu.prediction.card import CARDS, H200, Card, seconds
from attnzoo.benchmarks.gpu.prediction.goals import GOALS, NATIVE, SEQ_LEN, Goal
from attnzoo.benchmarks.gpu.prediction.stored import Count
from attnzoo.reporting.matrix_text import markdown_row

TITLE = "## Predictions for a GPU (not measured)"
COMMAND = "python -m attnzoo.benchmarks.gpu.prediction --json benchmarks/results/gpu_prediction.json"
_METHOD = f"""\
**Prediction, not measured.** A run on tensors without values counts the launches of one self-attention module (with
its projections, bfloat16, batch 1, S = {SEQ_LEN}), the FLOPs of its matrix products and the bytes that each operator
reads and writes; Triton kernels count whole tiles. A launch takes the longest of three times: FLOPs at
{card.PRODUCTS:.0%} (Triton: {card.TRITON:.0%}) of the card's peak, bytes at {card.BANDWIDTH:.0%} of its bandwidth, and
{card.SHORTEST * 1e6:.0f} us; a call takes the sum, or the time of the host ({card.HOST * 1e6:.0f} us for an operator,
{card.HOST_TRITON * 1e6:.0f} us for a launch of Triton) if this is longer.

All shares and times in this paragraph are assumptions. Peak and bandwidth are those of NVIDIA's data sheets:
{{cards}}. Each cell with two numbers shows the original first,
then the patched module. **speed** is their predicted ratio."""
_CHECK = """\
The times of the originals were measured on an H200 in an earlier run (torch 2.11, transformers 5.17). GPT-NeoX was
measured with other heads, so it is left out. An operator of PyTorch that starts several kernels, or that reads memory
with large strides, needs more time than predicted. This holds for the operators of patched modules, too."""
_TOO_FAR = 2.0

Counts = Mapping[tuple[str, str, bool], Count]


def lines(counts: Sequence[Count], versions: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of the section: method, predictions, missed goals, and a check against measured originals."""
    found = {(count.family, count.backend, count.train): count for count in counts}
    cards = "; ".join(f"{c.name} {c.flops / 1e12:.0f} TFLOP/s and {c.bandwidth / 1e12:.2f} TB/s" for c in CARDS)
    yield from (TITLE, "", *_METHOD.format(cards=cards).splitlines(), "")
    yield f"`{COMMAND}` ({', '.join(f'{name} {version}' for name, version in versions.items())})"
    yield from ("", "### Prediction, not measured: the original and the patched module", "")
    yield from _table(found)
    yield from ("", *_missed(found))
    yield from ("", "### Prediction, not measured, beside measured times of the originals", "", *_CHECK.splitlines())
    yield from ("", *_check(found))


def _table(counts: Counts) -> Iterator[str]:
    of_cards = [text for c in CARDS for text in (f"{c.name}, ms", "speed")]
    yield markdown_row(("module", "backend", "mode", "launches", "GFLOP", "GB", *of_cards, "goal"))
    yield markdown_row(("---", "---", "---", *["--:"] * (4 + len(of_cards))))
    for goal, train in _cases():
        original, patched = _pair(counts, goal, train)
        cells = [goal.family, f"`{goal.backend}`", _mode(train)]
        cells.append(f"{original.launches} / {patched.launches}")
        cells.append(f"{original.flops / 1e9:.0f} / {patched.flops / 1e9:.0f}")
        cells.append(f"{original.bytes / 1e9:.2f} / {patched.bytes / 1e9:.2f}")
        for c in CARDS:
            times = seconds(original, c), seconds(patched, c)
            cells += [f"{times[0] * 1e3:.2f} / {times[1] * 1e3:.2f}", f"{times[0] / times[1]:.2f}x"]
        wanted = goal.speed(train)
        yield markdown_row((*cells, "-" if wanted is None else f"{wanted:g}x"))


def _missed(counts: Counts) -> Iterator[str]:
    """Yield one line for each goal that a prediction misses, with what takes the most time."""
    wanted = [(goal, train, c) for goal, train in _cases() for c in CARDS if goal.speed(train) is not None]
    missed = [case for case in wanted if _speed(counts, *case) < (case[0].speed(case[1]) or 0.0)]
    yield f"The prediction is below the goal in {len(missed)} of {len(wanted)} cases{':' if missed else '.'}"
    yield ""
    for goal, train, c in missed:
        speed = f"{_speed(counts, goal, train, c):.2f}x, goal {goal.speed(train):g}x"
        yield f"- {goal.family}, {_mode(train)}, {c.name}: {speed}. {_reason(_pair(counts, goal, train)[1], c)}"


def _reason(count: Count, c: Card) -> str:
    operators, host = card.by_operator(count, c), card.host_seconds(count)
    device = sum(of_operator for _, of_operator in operators)
    if host > device:
        return f"The host decides: {host * 1e3:.2f} ms, while the device needs {device * 1e3:.2f} ms."
    slowest = ", ".join(f"`{name}` {of_operator * 1e3:.2f} ms" for name, of_operator in operators[:3])
    return f"Slowest on the device: {slowest}."


def _check(counts: Counts) -> Iterator[str]:
    yield markdown_row(("module", "mode", "predicted, ms", "measured, ms", "measured / predicted", ""))
    yield markdown_row(("---", "---", "--:", "--:", "--:", "---"))
    for goal, train in _cases():
        if goal.measured is not None:
            predicted, measured = seconds(counts[goal.family, NATIVE, train], H200) * 1e3, goal.measured[train]
            ratio = measured / predicted
            word = f"off by more than {_TOO_FAR:g}x" if not 1 / _TOO_FAR <= ratio <= _TOO_FAR else ""
            yield markdown_row((goal.family, _mode(train), f"{predicted:.2f}", f"{measured:g}", f"{ratio:.2f}", word))


def _cases() -> Iterator[tuple[Goal, bool]]:
    return ((goal, train) for train in (False, True) for goal in GOALS)


def _pair(counts: Counts, goal: Goal, train: bool) -> tuple[Count, Count]:
    return counts[goal.family, NATIVE, train], counts[goal.family, goal.backend, train]


def _speed(counts: Counts, goal: Goal, train: bool, c: Card) -> float:
    original, patched = _pair(counts, goal, train)
    return seconds(original, c) / seconds(patched, c)


def _mode(train: bool) -> str:
    return "forward+backward" if train else "forward"
