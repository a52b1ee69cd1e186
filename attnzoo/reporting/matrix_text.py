"""Format the support matrix as text for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from attnzoo.backend import BackendInfo, Capabilities
from attnzoo.errors import Refusal
from attnzoo.layout import aligned, fit
from attnzoo.registry import registry
from attnzoo.reporting.matrix import DEVICES, FEATURES, Families, Module, Row, rows
from attnzoo.spec.segments import FLOATS, Request

_FLAGS = ("key_mask", "mask", "bias_grad", "gqa", "uneven_value_dim", "dropout", "grad", "probabilities", "exact")
_SHORT = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

LEGEND = """\
A cell is one module, one backend, and one feature in addition to what the module requests in inference, in float64,
float32, bfloat16 and float16, on CPU and CUDA. It assumes that every optional package is installed; `attnzoo doctor`
shows what this machine has. *yes*: the backend runs all of these. Otherwise the cell names the dtypes and devices that
run; `cuda` means that a CUDA device is required. Tests run the CPU part; `make test-cuda` runs the CUDA part on a
machine with a device. Numbers in brackets refer to the reasons below the tables. A reason under *forward* is valid for
the whole row and is not repeated. *(≈)*: the backend changes the pattern of the attention."""


def _declarations() -> dict[str, dict[str, object]]:
    """Return, for each loaded backend, a dict from the name of a declaration, such as "dtypes", to its value."""
    infos = registry.backends().values()
    return {info.name: _declared(info, info.capabilities) for info in infos if info.capabilities is not None}


def _declared(info: BackendInfo, capabilities: Capabilities) -> dict[str, object]:
    return {
        "aliases": list(info.aliases),
        "devices": sorted(capabilities.devices),
        "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in capabilities.dtypes),
        "patterns": sorted(pattern.__name__ for pattern in capabilities.patterns),
        "segments": "any" if capabilities.segments >= 1 << 16 else str(capabilities.segments),
        "bias": sorted(capabilities.bias),
        "transforms": sorted(capabilities.transforms),
        **{flag: getattr(capabilities, flag) for flag in _FLAGS},
    }


class Reasons(dict[str, int]):
    """Dict from the text of a refusal to its number. The refusal that is printed first has number 1."""

    def number(self, reason: Refusal) -> int:
        """Return the number of a reason. A new reason gets the next free number."""
        return self.setdefault(str(reason), len(self) + 1)


def _outcomes(row: Row, reasons: Reasons, code: Callable[[str], str]) -> list[tuple[str, str]]:
    """Return two texts per feature: the dtypes and devices that run it, and the numbers of the reasons for refusals."""
    outcomes = []
    for feature in FEATURES:
        printed = set() if feature == "forward" else set(row.reasons("forward"))
        numbers = sorted({reasons.number(reason) for reason in row.reasons(feature) if reason not in printed})
        note = f" [{', '.join(map(str, numbers))}]" if numbers else ""
        cpu, cuda = (row.runs(feature, device) for device in DEVICES)
        outcomes.append((_where(cpu, cuda, code), note))
    return outcomes


def _where(cpu: tuple[torch.dtype, ...], cuda: tuple[torch.dtype, ...], code: Callable[[str], str]) -> str:
    def dtypes(runs: tuple[torch.dtype, ...]) -> str:
        return "" if runs == FLOATS else " ".join(_SHORT[dtype] for dtype in runs)

    if cpu == cuda:
        return (dtypes(cpu) or "yes") if cpu else "no"
    parts = ((device, runs) for device, runs in zip(DEVICES, (cpu, cuda), strict=True) if runs)
    return "; ".join(f"{code(device)} {dtypes(runs)}".rstrip() for device, runs in parts)


def _label(row: Row) -> tuple[str, str]:
    """Return the backend's name with the required options, and a mark if the backend changes the pattern."""
    options = ", ".join(f"{name}={value!r}" for name, value in row.options.items())
    return f"{row.backend}({options})" if options else row.backend, f" (≈ {row.changes})" if row.changes else ""


def _title(module: Module) -> str:
    """Return the pattern of a module, and the features that the requests of the module already include."""

    def includes(change: Callable[[Request], Request]) -> bool:
        return any(change(request) == request for request in module.requests)

    features = [feature for feature, change in FEATURES.items() if feature != "forward" and includes(change)]
    return f"{module.pattern} (requests: {', '.join(features)})" if features else module.pattern


def markdown(families: Families) -> str:
    """Return the support matrix as a page of the documentation, in Markdown."""

    def code(text: str) -> str:
        return f"`{text}`"

    source = "`attnzoo matrix --markdown` writes this page from the declarations of adapters and backends."
    lines = ["# Support matrix", "", source, ""]
    lines += ["## What backends declare", "", *_declared_table(), "", "## What runs where", "", LEGEND, ""]
    reasons = Reasons()
    for model_type, modules in families.items():
        lines += [f"### `{model_type}`", ""]
        if isinstance(modules, str):
            lines += [modules, ""]
            continue
        for module in modules:
            lines += [f"**{module.cls}**: {_title(module)}", "", *_head(["backend", *FEATURES])]
            for row in rows(module):
                name, mark = _label(row)
                lines.append(markdown_row([code(name) + mark, *map("".join, _outcomes(row, reasons, code))]))
            lines.append("")
    lines += ["## Reasons", "", *(f"{number}. {text}" for text, number in reasons.items())]
    return "\n".join(lines)


def markdown_row(cells: Iterable[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _head(cells: list[str]) -> list[str]:
    return [markdown_row(cells), "|---" * len(cells) + "|"]


def _declared_table() -> list[str]:
    """Return a table with a line per declaration and a column per backend, then the backends that failed to load."""
    columns = _declarations()
    lines = _head(["", *(f"`{name}`" for name in columns)])
    for key in next(iter(columns.values()), {}):
        lines.append(markdown_row([key, *(_words(column[key]) for column in columns.values())]))
    broken = (info for info in registry.backends().values() if info.capabilities is None)
    return [*lines, *(f"\n`{info.name}`: {info.reason}" for info in broken)]


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def text(families: Families) -> str:
    """Return the support matrix for a terminal: the declarations of each backend, then the rows of each module."""
    parts = ["Declared capabilities", *(_declared_text(*declared) for declared in _declarations().items())]
    reasons = Reasons()
    for model_type, modules in families.items():
        if isinstance(modules, str):
            parts.append(fit(f"{model_type}: {modules}"))
            continue
        for module in modules:
            lines = [line for row in rows(module) for line in _row_text(row, reasons)]
            title = f"{module.model_type}: {module.cls}, {_title(module)}"
            parts.append(fit(title) + "\n" + aligned(lines, indent=2))
    parts.append(aligned([[LEGEND.translate(dict.fromkeys(map(ord, "*`")))]]))
    if reasons:
        parts.append(aligned((f"{number}.", reason) for reason, number in reasons.items()))
    return "\n\n".join(parts)


def _declared_text(name: str, declared: dict[str, object]) -> str:
    lines = [(key, _words(value)) for key, value in declared.items() if not isinstance(value, bool)]
    for word, flag in (("yes", True), ("no", False)):
        lines.append((word, _words([key for key, value in declared.items() if value is flag])))
    return f"{name}\n{aligned(lines, indent=2)}"


def _row_text(row: Row, reasons: Reasons) -> list[tuple[str, str]]:
    """Return ``(name, line)`` pairs. The first pair has the backend's name, the others have ``""``.

    Features with the same outcome share a line.
    """
    name, mark = _label(row)
    outcomes: dict[str, list[str]] = {}
    for feature, (where, note) in zip(FEATURES, _outcomes(row, reasons, str), strict=True):
        outcomes.setdefault(where, []).append(feature + note)
    lines = [f"{where}: {', '.join(features)}" for where, features in outcomes.items()]
    lines = ["yes: everything"] if lines == [f"yes: {', '.join(FEATURES)}"] else lines
    lines = [f"{name[len(row.backend) :]}{mark}".strip(), *lines] if mark else lines
    return [(row.backend if not number else "", line) for number, line in enumerate(lines)]
