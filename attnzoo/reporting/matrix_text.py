"""The support matrix as text: for terminals, as Markdown and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from attnzoo.backend import BackendInfo, Capabilities
from attnzoo.errors import Refusal
from attnzoo.layout import aligned, fit
from attnzoo.registry import registry
from attnzoo.reporting.matrix import DEVICES, FEATURES, Module, Row, rows
from attnzoo.spec.segments import FLOATS, Request

_FLAGS = ("key_mask", "mask", "bias_grad", "gqa", "uneven_value_dim", "dropout", "grad", "probabilities", "exact")
_SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
Families = dict[str, tuple[Module, ...] | str]

LEGEND = """\
Each cell asks what the module asks in inference and one feature more, in float64, float32, bfloat16 and float16, on CPU
and CUDA, with every optional package there is (`attnzoo doctor` tells what this machine has). *yes*: all of it runs.
Else what runs is named; `cuda`: it takes a CUDA device. What the CPU runs is tested; what CUDA runs is declared, and
tested by `make test-cuda` where there is a device. Numbers are reasons for the rest, listed below; those of *forward*
hold for the whole row and are not repeated. *(≈)*: the backend changes the pattern there, and computes that exactly."""


def plain(families: Families) -> dict[str, Any]:
    """Everything as plain data for JSON: what is declared, and each cell with its reasons (none: it runs)."""
    return {"backends": declared(), "families": [_plain_family(*family) for family in families.items()]}


def declared() -> list[dict[str, Any]]:
    """What each registered backend declares, and whether this machine can run it."""
    found = []
    for info in registry.backends().values():
        about = {"backend": info.name, "aliases": list(info.aliases), "available": info.available}
        found.append({**about, "reason": info.reason, **_plain_capabilities(info.capabilities)})
    return found


def _plain_capabilities(capabilities: Capabilities | None) -> dict[str, Any]:
    if capabilities is None:
        return {}
    return {
        "devices": sorted(capabilities.devices),
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in capabilities.dtypes),
        "patterns": sorted(pattern.__name__ for pattern in capabilities.patterns),
        "segments": "any" if capabilities.segments >= 1 << 16 else str(capabilities.segments),
        "bias": sorted(capabilities.bias),
        "transforms": sorted(capabilities.transforms),
        **{flag: getattr(capabilities, flag) for flag in _FLAGS},
    }


def _plain_family(model_type: str, modules: tuple[Module, ...] | str) -> dict[str, Any]:
    if isinstance(modules, str):
        return {"model_type": model_type, "problem": modules, "modules": []}
    return {"model_type": model_type, "modules": [_plain_module(module) for module in modules]}


def _plain_module(module: Module) -> dict[str, Any]:
    found = {"cls": module.cls, "pattern": module.pattern, "asks": _asks(module)}
    return {**found, "backends": [_plain_row(row) for row in rows(module)]}


def _plain_row(row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for (feature, device, dtype), reasons in row.cells.items():
        cell = cells.setdefault(feature, {}).setdefault(device, {})
        cell[str(dtype).removeprefix("torch.")] = [vars(reason) for reason in reasons]
    return {"backend": row.backend, "options": dict(row.options), "changes": row.changes, "cells": cells}


class Reasons:
    """Refusals by number, in the order in which they were first told."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, reason: Refusal) -> int:
        """The number of a reason."""
        return self._numbers.setdefault(str(reason), len(self._numbers) + 1)

    def listed(self) -> Iterable[tuple[int, str]]:
        """Numbers and reasons."""
        return ((number, text) for text, number in self._numbers.items())


def _outcomes(row: Row, reasons: Reasons, code: Callable[[str], str]) -> list[tuple[str, str]]:
    """Per feature: where it runs, and the numbers of the reasons for the rest. ``code`` marks words of a program."""
    found = []
    for feature in FEATURES:
        own = set() if feature == "forward" else set(row.reasons("forward"))
        numbers = sorted({reasons.number(reason) for reason in row.reasons(feature) if reason not in own})
        note = f" [{', '.join(map(str, numbers))}]" if numbers else ""
        cpu, cuda = (row.runs(feature, device) for device in DEVICES)
        found.append((_where(cpu, cuda, code), note))
    return found


def _where(cpu: tuple[torch.dtype, ...], cuda: tuple[torch.dtype, ...], code: Callable[[str], str]) -> str:
    def dtypes(runs: tuple[torch.dtype, ...]) -> str:
        return "" if runs == FLOATS else " ".join(_SHORT[dtype] for dtype in runs)

    if cpu == cuda:
        return (dtypes(cpu) or "yes") if cpu else "no"
    parts = ((device, runs) for device, runs in zip(DEVICES, (cpu, cuda), strict=True) if runs)
    return "; ".join(f"{code(device)} {dtypes(runs)}".rstrip() for device, runs in parts)


def _label(row: Row) -> tuple[str, str]:
    """The backend with the options it needs here, and a mark if it changes the pattern."""
    options = ", ".join(f"{name}={value!r}" for name, value in row.options.items())
    return f"{row.backend}({options})" if options else row.backend, f" (≈ {row.changes})" if row.changes else ""


def _asks(module: Module) -> list[str]:
    """Which features the module itself asks for."""

    def includes(change: Callable[[Request], Request]) -> bool:
        return any(change(request) == request for request in module.requests)

    return [feature for feature, change in FEATURES.items() if feature != "forward" and includes(change)]


def markdown(families: Families) -> str:
    """The page of the documentation."""

    def code(text: str) -> str:
        return f"`{text}`"

    lines = ["# Support matrix", "", "Made by `attnzoo matrix --markdown` from what adapters and backends declare.", ""]
    lines += ["## What backends declare", "", *_declared_table(), "", "## What runs where", "", LEGEND, ""]
    reasons = Reasons()
    for model_type, modules in families.items():
        lines += [f"### `{model_type}`", ""]
        if isinstance(modules, str):
            lines += [modules, ""]
            continue
        for module in modules:
            lines += [
                f"**{module.cls}**: {module.pattern}{_asks_for(module)}",
                "",
                _line(["backend", *FEATURES]),
                "|---" * (len(FEATURES) + 1) + "|",
            ]
            for row in rows(module):
                name, mark = _label(row)
                lines.append(_line([code(name) + mark, *map("".join, _outcomes(row, reasons, code))]))
            lines.append("")
    lines += ["## Reasons", "", *(f"{number}. {text}" for number, text in reasons.listed())]
    return "\n".join(lines)


def _asks_for(module: Module) -> str:
    asks = ", ".join(_asks(module))
    return f" (asks for: {asks})" if asks else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _declared_table() -> list[str]:
    found = [info for info in registry.backends().values() if info.capabilities is not None]
    broken = [info for info in registry.backends().values() if info.capabilities is None]
    lines = [_line(["", *(f"`{info.name}`" for info in found)]), "|---" * (len(found) + 1) + "|"]
    lines += [_line(cells) for cells in _declared_lines(found)]
    return [*lines, *(f"\n`{info.name}`: {info.reason}" for info in broken)]


def _declared_lines(infos: list[BackendInfo]) -> list[list[str]]:
    """One line per capability, one cell per backend after its name."""
    columns = [{"aliases": list(info.aliases), **_plain_capabilities(info.capabilities)} for info in infos]
    return [[key, *(_words(column[key]) for column in columns)] for key in columns[0]] if columns else []


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def text(families: Families) -> str:
    """Everything for a terminal: per backend what it declares, then per module and backend what runs."""
    infos = [info for info in registry.backends().values() if info.capabilities is not None]
    parts = ["Declared capabilities", *map(_declared_text, infos)]
    reasons = Reasons()
    for model_type, modules in families.items():
        if isinstance(modules, str):
            parts.append(fit(f"{model_type}: {modules}"))
            continue
        for module in modules:
            shown = [line for row in rows(module) for line in _row_text(row, reasons)]
            parts.append(fit(f"{module}{_asks_for(module)}") + "\n" + aligned(shown, indent=2))
    parts.append(aligned([[LEGEND.translate(dict.fromkeys(map(ord, "*`")))]]))
    if listed := [(f"{number}.", reason) for number, reason in reasons.listed()]:
        parts.append(aligned(listed))
    return "\n\n".join(parts)


def _declared_text(info: BackendInfo) -> str:
    declared = {"aliases": list(info.aliases), **_plain_capabilities(info.capabilities)}
    lines = [(key, _words(value)) for key, value in declared.items() if not isinstance(value, bool)]
    for word, flag in (("yes", True), ("no", False)):
        lines.append((word, _words([key for key, value in declared.items() if value is flag])))
    return f"{info.name}\n{aligned(lines, indent=2)}"


def _row_text(row: Row, reasons: Reasons) -> list[tuple[str, str]]:
    """The backend, then one line per outcome with the features that have it."""
    name, mark = _label(row)
    outcomes: dict[str, list[str]] = {}
    for feature, (where, note) in zip(FEATURES, _outcomes(row, reasons, str), strict=True):
        outcomes.setdefault(where, []).append(feature + note)
    lines = [f"{where}: {', '.join(features)}" for where, features in outcomes.items()]
    lines = ["yes: everything"] if lines == [f"yes: {', '.join(FEATURES)}"] else lines
    lines = [f"{name[len(row.backend) :]}{mark}".strip(), *lines] if mark else lines
    return [(row.backend if not number else "", line) for number, line in enumerate(lines)]
