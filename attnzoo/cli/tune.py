"""``attnzoo tune``: measure backends for ``auto``, and show or remove the stored measurements."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

import attnzoo
from attnzoo.cli import completion
from attnzoo.cli.output import Json, emit, require_json_target
from attnzoo.errors import InvalidArgumentError
from attnzoo.layout import fit

if TYPE_CHECKING:
    from attnzoo.tuning.report import TuningReport

MODEL_HELP = "A model of the benchmarks (see attnzoo bench --help), or the folder of a checkpoint."
_NEW_TOKENS = 3  # the first token comes from the prompt, the others from decoding steps
_DTYPES = ("float32", "bfloat16", "float16")


def tune(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, autocompletion=completion.families)] = None,
    seq_len: Annotated[
        list[int] | None, typer.Option(help="Tokens of real text. May be repeated.  [default: 1024]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 (fp32, bf16, fp16).")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads.  [default: torch's number]", min=1)] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Tune for training (forward and backward) instead of inference.")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", help="Tune for generation with a cache: the prompt, and single new tokens.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Timed samples per backend.", min=1)] = 7,
    again: Annotated[bool, typer.Option("--again", help="Also measure attentions with a stored measurement.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the stored measurements and measure nothing.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the stored measurements.")] = False,
    json: Json = None,
) -> None:
    """Measure which backend is fastest for each attention, and where the model's code is faster, for auto."""
    if show and model is not None:
        raise InvalidArgumentError("model", f"{model!r} with --show", "no model, because --show measures nothing")
    if model is None and not (show or clear):
        raise InvalidArgumentError("model", "None", "a model name or checkpoint folder, or --show or --clear")
    if train and decode:
        raise InvalidArgumentError("decode", "--decode with --train", "at most one of --decode and --train")
    require_json_target(json)
    if model is None:
        _manage(clear, show, json)
        return
    if clear:
        from attnzoo.auto import cache

        print(f"removed {len(cache.clear())} file(s)", file=sys.stderr)
    report = _measure(model, seq_len or [1024], dtype, device, threads, train, decode, again, rounds)
    emit(report.to_dict, lambda: _text(report), json)


def _manage(clear: bool, show: bool, json: str | None) -> None:
    """Remove or show the stored measurements. Both together show what is left."""
    from attnzoo.auto import cache

    removed = cache.clear() if clear else ()
    if not show:
        emit(lambda: [str(path) for path in removed], lambda: f"removed {len(removed)} file(s)", json)
        return
    if clear and json is None:
        print(f"removed {len(removed)} file(s)")
    emit(stored_measurements, stored_measurements_text, json)


def _text(report: TuningReport) -> str:
    from attnzoo.auto import cache
    from attnzoo.auto.choice import by_priority_because

    lines = [str(report), fit(f"stored in {cache.folder()}")]
    if because := by_priority_because():
        lines.append(fit(f"note: auto selects by priority nevertheless: {because}"))
    return "\n".join(lines)


def _measure(
    name: str,
    lengths: list[int],
    dtype: str,
    device: str,
    threads: int | None,
    train: bool,
    decode: bool,
    again: bool,
    rounds: int,
) -> TuningReport:
    import torch
    from torch.utils._pytree import tree_map_only

    from attnzoo.auto.measurements import Measurement
    from attnzoo.benchmarks.named_models import load_with_passages
    from attnzoo.spelling import dtype_name
    from attnzoo.tuning.report import TuningReport

    dtype = dtype_name(dtype)
    if dtype not in _DTYPES:
        raise InvalidArgumentError("dtype", repr(dtype), ", ".join(_DTYPES))
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise InvalidArgumentError("device", repr(device), "cpu" + ", cuda" * torch.cuda.is_available())
    if min(lengths) < 1:
        raise InvalidArgumentError("seq-len", min(lengths), "an integer >= 1")
    if threads is not None:
        torch.set_num_threads(threads)
    measurements: dict[str, Measurement] = {}
    modules: dict[str, Measurement] = {}
    fresh: set[str] = set()
    for length in lengths:
        loaded, (inputs,) = load_with_passages(name, length, 1)
        loaded.train(train).to(device, getattr(torch, dtype))
        inputs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
        run = partial(_decode, loaded, inputs) if decode else inputs
        report = attnzoo.tune(loaded, run, again=again, rounds=rounds, progress=partial(print, file=sys.stderr))
        measurements.update({measurement.key: measurement for measurement in report})
        modules.update({measurement.key: measurement for measurement in report.modules})
        fresh |= report.fresh
    return TuningReport(measurements.values(), frozenset(fresh), tuple(modules.values()))


def _decode(model: Any, inputs: dict[str, Any]) -> None:
    prompt = {name: value for name, value in inputs.items() if name != "use_cache"}
    model.generate(**prompt, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False)


def stored_measurements() -> list[dict[str, Any]]:
    """Return the content of every cache file as plain data for JSON."""
    from attnzoo.auto import cache

    data = []
    for path, environment, stored, problem in cache.stored():
        measurements = [measurement.to_dict() for measurement in stored.values()]
        data.append(dict(file=str(path), problem=problem, environment=environment, measurements=measurements))
    return data


def stored_measurements_text() -> str:
    """Return the content of every cache file as text."""
    from attnzoo.auto import cache
    from attnzoo.tuning.report import table

    files = cache.stored()
    if not files:
        return fit(f"no measurements in {cache.folder()}; to measure, run: attnzoo tune MODEL")
    lines = []
    for file in files:
        versions = ", ".join(f"{name} {version}" for name, version in file.environment.get("versions", {}).items())
        threads = f", threads {file.environment['threads']}" if file.environment.get("threads") else ""
        lines.append(fit(f"{file.path}\n{file.environment.get('name', 'unknown device')}{threads}, {versions}"))
        lines += [fit(f"cannot be read: {file.problem}")] if file.problem else map(table, file.measurements.values())
    return "\n".join(lines)
