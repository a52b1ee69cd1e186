"""Which architectures of transformers run on a backend, and agree with their own code: one outcome per model type.

``python -m attnzoo.benchmarks.architectures`` builds a tiny model of every model type, patches it, and compares outputs
and gradients with the oracle under the error rule (:func:`attnzoo.verify`): without padding, and with padding on either
side. Models that generate must also generate the tokens of the unpatched model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from attnzoo.benchmarks.tiny_models import Example, build
from attnzoo.errors import AttnzooError, PatchError
from attnzoo.patching.patch import patch
from attnzoo.patching.sites import find_sites
from attnzoo.verification.verify import verify

BACKENDS = ("sdpa", "eager")
_SECONDS = 120
_MOST_BYTES = 8 << 30  # a tiny model of some types still builds huge tensors


@dataclass(frozen=True)
class Outcome:
    """The outcome of one model type on one backend.

    Attributes:
        kind: ``agrees``, ``differs``, ``refused``, ``raises`` (another error while verifying, of attnzoo or of the
            model in float64), ``other attention`` (no module of the model calls the attention interface) or ``not
            built`` (the tiny model does not run before the patch).
        detail: the reason, if the kind is not ``agrees``.
        checks: the checks that passed.
        sites: the number of patched attention modules.
    """

    model_type: str
    backend: str
    kind: str
    detail: str = ""
    checks: tuple[str, ...] = ()
    sites: int = 0


def model_types() -> tuple[str, ...]:
    """Return every model type of the installed transformers that has a model class, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return tuple(sorted(MODEL_MAPPING_NAMES))


def check(model_type: str, backend: str) -> Outcome:
    """Build a tiny model of a model type, and compare the patched model with its own code."""
    try:
        example = build(model_type)
    except Exception as error:  # any error of a model that attnzoo has not touched
        return Outcome(model_type, backend, "not built", _brief(error))
    try:
        sites = len([target for target in find_sites(example.model) if target.point.attends])
    except PatchError:
        return Outcome(model_type, backend, "other attention")
    passed: list[str] = []
    try:
        for what, inputs in _inputs_of(example).items():
            report = verify(example.model, inputs, backend=backend)
            if not report.ok:
                return Outcome(model_type, backend, "differs", f"{what}: {_brief(report)}", sites=sites)
            passed.append(what)
        difference = _generates_differently(model_type, backend)
    except AttnzooError as error:
        return Outcome(model_type, backend, "refused", _brief(error), sites=sites)
    except Exception as error:
        return Outcome(model_type, backend, "raises", _brief(error), sites=sites)
    if difference:
        return Outcome(model_type, backend, "differs", difference, sites=sites)
    return Outcome(model_type, backend, "agrees", "", (*passed, *([] if difference is None else ["generation"])), sites)


def _inputs_of(example: Example) -> dict[str, Any]:
    padded = {f"padding {side}": example.padded(side) for side in ("right", "left")} if example.has_padding else {}
    return {"forward and gradients": example.inputs, **padded}


def _generates_differently(model_type: str, backend: str) -> str | None:
    """Return how the tokens of greedy generation differ, an empty string if they are equal, None without generation."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    for auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        if not any(config.model_type == model_type for config in auto_class._model_mapping):
            continue
        try:
            example = build(model_type, auto_class)
            arguments = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
            inputs: dict[str, Any] = {**example.padded("left"), "use_cache": True}
            inputs.pop("decoder_input_ids", None)
            expected = example.model.generate(**inputs, **arguments)  # type: ignore[operator]
        except Exception:  # the unpatched model does not generate from these inputs
            return None
        with patch(example.model, backend):
            got = example.model.generate(**inputs, **arguments)  # type: ignore[operator]
        return "" if torch.equal(got, expected) else f"generation, {backend}: other tokens"
    return None


def _brief(value: object) -> str:
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else str(value)
    text = re.sub(r"'/[^']*'", "'...'", " ".join(text.split()))  # paths differ between machines
    return text[:300]


def to_markdown(outcomes: Iterable[Outcome], versions: str) -> str:
    """Return the table of outcomes for the documentation, with one row per model type and a column per backend."""
    table: dict[str, dict[str, Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.model_type):
        table.setdefault(outcome.model_type, {})[outcome.backend] = outcome
    backends = sorted({backend for row in table.values() for backend in row})
    lines = [
        "# Architectures",
        "",
        "`make docs-architectures` writes this page. For every model type of transformers, a tiny random model was",
        "patched on the CPU and compared with its own code under the error rule: outputs and gradients without padding",
        "and with padding on either side, and the tokens of greedy generation.",
        "",
        f"Versions: {versions}.",
        "",
        *_counts(table, backends),
        "",
        "*other attention*: no attention module of the model calls transformers' `AttentionInterface`. *not built*:",
        "the tiny model does not run with automatic sizes and inputs, without attnzoo. *raises*: an error while",
        "verifying, of attnzoo or of the model in float64.",
        "",
        f"| model type | {' | '.join(backends)} | attention modules | checks, or the reason |",
        f"|---|{'---|' * len(backends)}---|---|",
    ]
    for model_type, row in table.items():
        worst = next((outcome for outcome in row.values() if outcome.detail), None)
        detail = ", ".join(next(iter(row.values())).checks) if worst is None else worst.detail
        kinds = " | ".join(row[backend].kind if backend in row else "" for backend in backends)
        sites = max(outcome.sites for outcome in row.values()) or ""
        lines.append(f"| {model_type} | {kinds} | {sites} | {_escaped(detail)} |")
    return "\n".join(lines) + "\n"


def _counts(table: dict[str, dict[str, Outcome]], backends: Sequence[str]) -> Iterator[str]:
    for backend in backends:
        counts = Counter(row[backend].kind for row in table.values() if backend in row)
        yield f"- `{backend}`: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _escaped(text: str) -> str:
    return text[:120].replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


class _TookTooLong(BaseException):
    """Raised when a model type takes too long. It is no ``Exception``, because checks catch these."""


def _time_out(number: int, frame: FrameType | None) -> None:
    raise _TookTooLong(f"took more than {_SECONDS} s")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check model types, and write one JSON line per outcome as it comes. Return 1 if a model differs."""
    parser = argparse.ArgumentParser(prog="python -m attnzoo.benchmarks.architectures", description=__doc__)
    parser.add_argument("model_types", nargs="*", help="model types (default: all)")
    parser.add_argument("--backend", action="append", help=f"default: {' and '.join(BACKENDS)}")
    parser.add_argument("--json", type=Path, help="file for the outcomes; outcomes in this file are not repeated")
    parser.add_argument(
        "--markdown", type=Path, help="write the table of the outcomes in --json to this file, and stop"
    )
    options = parser.parse_args(arguments)
    known = read(options.json) if options.json and options.json.exists() else {}
    if options.markdown:
        options.markdown.write_text(to_markdown(known.values(), _versions()))
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _time_out)
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
    differs = False
    for model_type, backend in itertools.product(options.model_types or model_types(), options.backend or BACKENDS):
        if (model_type, backend) in known:
            continue
        signal.alarm(_SECONDS)
        try:
            outcome = check(model_type, backend)
        except _TookTooLong as error:
            outcome = Outcome(model_type, backend, "not built", str(error))
        signal.alarm(0)
        differs |= outcome.kind == "differs"
        print(f"{model_type}, {backend}: {outcome.kind} {outcome.detail}", flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
    return int(differs)


def read(path: Path) -> dict[tuple[str, str], Outcome]:
    """Return the outcomes in a JSON-lines file, by model type and backend."""
    rows = map(json.loads, path.read_text().splitlines())
    outcomes = (Outcome(**{**row, "checks": tuple(row["checks"])}) for row in rows)
    return {(outcome.model_type, outcome.backend): outcome for outcome in outcomes}


def _versions() -> str:
    import transformers

    return f"transformers {transformers.__version__}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
