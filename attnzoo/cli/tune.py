"""``attnzoo tune``: measure, show and forget what ``auto`` goes by."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import torch
import typer

from attnzoo.auto import cache
from attnzoo.auto.choice import by_priority_because
from attnzoo.auto.measurements import Measurement
from attnzoo.errors import InvalidArgumentError
from attnzoo.layout import fit
from attnzoo.spelling import dtype_name
from attnzoo.tuning.race import ROUNDS
from attnzoo.tuning.report import Tuning, table
from attnzoo.tuning.tuner import clear as forget
from attnzoo.tuning.tuner import tune as measure

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def tune(
    model: Annotated[
        str | None, typer.Argument(help="A family of the shootout (see bench --help), or a local checkpoint.")
    ] = None,
    seq_len: Annotated[list[int] | None, typer.Option(help="Tokens of real text, repeatable; default 1024.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (fp32, bf16, fp16).")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's.", min=1)] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Tune training (forward and backward), not inference.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Timed samples per backend.", min=1)] = ROUNDS,
    again: Annotated[bool, typer.Option("--again", help="Measure what is known already, too.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print what is kept, measure nothing.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what is kept.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure which backend is fastest at a model's attentions, for 'auto' to take from now on. Kept in a file."""
    if show and model is not None:
        raise InvalidArgumentError("model", f"{model!r} with --show", "none: --show measures nothing")
    if clear:
        removed = forget()
        print(json.dumps([str(path) for path in removed]) if as_json else f"removed {len(removed)} file(s)")
    if show:
        print(json.dumps(kept(), indent=2) if as_json else shown())
    if model is None:
        if not (show or clear):
            raise InvalidArgumentError("model", "nothing", "a family or a checkpoint; or --show, or --clear")
        return
    found = _measure(model, seq_len or [1024], dtype, device, threads, train, again, rounds)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(found)
    print(fit(f"kept in {cache.folder()}"))
    because = by_priority_because()
    if because is not None:
        print(fit(f"note: auto goes by priority all the same: {because}"))


def _measure(
    name: str, lengths: list[int], dtype: str, device: str, threads: int | None, train: bool, again: bool, rounds: int
) -> Tuning:
    from attnzoo.benchmarks.named_models import load_with_passages

    dtype = dtype_name(dtype)
    if dtype not in _DTYPES:
        raise InvalidArgumentError("dtype", repr(dtype), ", ".join(_DTYPES))
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InvalidArgumentError("device", repr(device), "cpu" + ", cuda" * torch.cuda.is_available())
    if min(lengths) < 1:
        raise InvalidArgumentError("seq-len", min(lengths), "an integer >= 1")
    if threads is not None:
        torch.set_num_threads(threads)
    found: dict[str, Measurement] = {}
    fresh: set[str] = set()
    for length in lengths:
        loaded, (inputs,) = load_with_passages(name, length, 1)
        loaded.train(train).to(device, _DTYPES[dtype])
        given: dict[str, Any] = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
        }
        one = measure(loaded, given, again=again, rounds=rounds, progress=lambda text: print(text, file=sys.stderr))
        found.update({measurement.key: measurement for measurement in one})
        fresh |= one.fresh
    return Tuning(found.values(), frozenset(fresh))


def kept() -> list[dict[str, Any]]:
    """Every cache file as plain data."""
    return [
        {
            "file": str(file.path),
            "problem": file.problem,
            "environment": file.environment,
            "measurements": [measurement.to_dict() for measurement in file.measurements.values()],
        }
        for file in cache.stored()
    ]


def shown() -> str:
    """Every cache file in words."""
    files = cache.stored()
    if not files:
        return fit(f"nothing is kept in {cache.folder()}; attnzoo tune MODEL measures")
    lines = []
    for file in files:
        versions = ", ".join(f"{name} {version}" for name, version in file.environment.get("versions", {}).items())
        threads = f", threads {file.environment['threads']}" if file.environment.get("threads") else ""
        lines.append(fit(f"{file.path}\n{file.environment.get('name', 'unknown device')}{threads}, {versions}"))
        lines += [fit(f"cannot be read: {file.problem}")] if file.problem else map(table, file.measurements.values())
    return "\n".join(lines)
