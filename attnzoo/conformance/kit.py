"""The conformance kit: what a backend declares is what it does, in both directions.

    report = attnzoo.testing.check_backend("my_backend")     # raises ConformanceError with every failure

Cases are generated from one list of kinds, for every backend alike. A case the backend's capabilities take must run and
agree with the float64 oracle under the error rule, forward and backward; a case they refuse must really be refused,
with a field, what was got and what is allowed. A backend that changes the pattern is judged by what it makes of a case
(:meth:`attnzoo.Backend.rewrite`). attnzoo's own test matrix is these cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnzoo.backend import Backend
from attnzoo.backends.eager import evaluate
from attnzoo.conformance.attention_check import check_attention
from attnzoo.conformance.error_rule import Check, check
from attnzoo.conformance.samples import Sample
from attnzoo.conformance.transform_check import CHECKED, check_transform
from attnzoo.errors import AttnzooError, BackendRefusedError, InvalidArgumentError
from attnzoo.functional import execute
from attnzoo.registry import registry
from attnzoo.spec.bias import Bias, DenseBias, RelativeBias
from attnzoo.spec.global_keys import locate
from attnzoo.spec.hashed import HashedChunks, HashRound
from attnzoo.spec.heads import expand_heads
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, SortedChunks, Window
from attnzoo.spec.segments import FLOATS, Attention, Segment

PATTERNS: tuple[Pattern, ...] = (
    Full(),
    Causal(),
    Causal(offset=0),
    Window(5, 3),
    Window(9, 0),
    Chunks(8, 1, 1),
    Chunks(5, 2, 0, causal=True),
    SortedChunks(8, 1, 0, causal=True),
    SortedChunks(5, 1, 1),
)
MASKS = ("none", "keys", "dense", "globals")
BIASES = ("none", "relative", "dense", "trained relative", "trained dense")
_BATCH, _HEADS, _DIM, _VALUE_DIM = 3, 4, 16, 20


class ConformanceError(AttnzooError, AssertionError):
    """A backend does not do what it declares, or does what it refuses."""


@dataclass(frozen=True)
class AttentionCase:
    """One attention of the matrix.

    Attributes:
        dtype: of query, key and value.
        pattern: of the first segment.
        mask: ``"none"``; ``"keys"``: padding left, right and a whole sample; ``"dense"``; ``"globals"``: a second
            segment of per-sample global keys, and padding.
        bias: kind of the first segment's bias, and whether its values require grad.
        kv_heads: key heads for the four query heads.
        q_len, kv_len: lengths; deliberately multiples of nothing.
        grad: inputs require grad.
        dropout: probability of dropping a weight.
        uneven: value_dim differs from head_dim.
        probabilities: the softmax weights are asked for.
        strided: head_dim is not the fastest dimension of query, key and value in memory.
        transform: what of ``torch.func`` it runs under, of ``CHECKED``; empty: nothing.
    """

    dtype: torch.dtype = torch.float32
    pattern: Pattern = Full()
    mask: str = "none"
    bias: str = "none"
    kv_heads: int = 4
    q_len: int = 37
    kv_len: int = 37
    grad: bool = True
    dropout: float = 0.0
    uneven: bool = False
    probabilities: bool = False
    strided: bool = False
    transform: str = ""

    def __str__(self) -> str:
        parts = [str(self.dtype).removeprefix("torch."), str(self.pattern), f"mask {self.mask}", f"bias {self.bias}"]
        parts.append(f"{_HEADS}/{self.kv_heads} heads, {self.q_len} x {self.kv_len}")
        flags = ("grad", "dropout", "uneven", "probabilities", "strided")
        parts += [flag for flag in flags if getattr(self, flag)]
        return ", ".join([*parts, *([f"under {self.transform}"] if self.transform else [])])

    def attention(self, device: str = "cpu", seed: int = 0) -> Attention:
        """The case's attention on fresh random tensors."""
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=random, dtype=torch.float64)
            drawn = drawn.to(device=device, dtype=self.dtype)
            if self.strided and len(shape) == 4:
                drawn = drawn.transpose(-1, -2).contiguous().transpose(-1, -2)
            return drawn.requires_grad_(self.grad)

        def flags(*shape: int, p: float) -> Tensor:
            return (torch.rand(shape, generator=random) < p).to(device)

        query = normal(_BATCH, _HEADS, self.q_len, _DIM)
        key = normal(_BATCH, self.kv_heads, self.kv_len, _DIM)
        value = normal(_BATCH, self.kv_heads, self.kv_len, _VALUE_DIM if self.uneven else _DIM)
        segment = Segment(key, value, self.pattern, bias=self._bias(normal))
        if isinstance(self.pattern, SortedChunks):
            return self._sorted(self.pattern, query, segment, random, device)
        segments = [segment]
        if isinstance(self.pattern, HashedChunks):
            segments = self._hashed(self.pattern, segment, random, device)
        if self.mask == "dense":
            mask = flags(_BATCH, 1, self.q_len, self.kv_len, p=0.6)
            segments = [replace(segment, mask=mask) for segment in segments]
        elif self.mask != "none":
            real = torch.ones((_BATCH, self.kv_len), dtype=torch.bool, device=device)
            real[0, : self.kv_len // 3] = False
            real[1, self.kv_len - self.kv_len // 4 :] = False
            real[2] = False
            chosen = flags(_BATCH, self.kv_len, p=0.2) & real
            found = locate(chosen) if self.mask == "globals" else None
            segments = [replace(one, key_mask=real if found is None else real & ~chosen) for one in segments]
            if found is not None:
                segments.append(Segment(found.take(key), found.take(value), key_mask=found.valid))
        query_mask = None
        if self.mask == "globals":
            query_mask = flags(_BATCH, self.q_len, p=0.8)
        return Attention(query, tuple(segments), _DIM**-0.5, self.dropout, query_mask)

    def _hashed(self, pattern: HashedChunks, segment: Segment, random: torch.Generator, device: str) -> list[Segment]:
        """Two rounds that share the keys, and know of each other: a random order of keys, random places of queries."""
        rounds: tuple[HashRound, ...] = ()
        for _ in range(2):
            keys = torch.rand((_BATCH, self.kv_heads, self.kv_len), generator=random).argsort(-1)
            places = torch.randint(0, self.kv_len, (_BATCH, _HEADS, self.q_len), generator=random)
            chunks = (torch.arange(self.kv_len) // pattern.length).repeat(_BATCH, 1)
            one = (keys, keys.argsort(-1), chunks, places.argsort(-1), places)
            rounds += (HashRound(*(tensor.to(device) for tensor in one)),)
        return [replace(segment, pattern=replace(pattern, rounds=rounds[:number])) for number in (1, 2)]

    def _sorted(
        self, pattern: SortedChunks, query: Tensor, segment: Segment, random: torch.Generator, device: str
    ) -> Attention:
        """Two hash rounds: keys of both in a random order each; every query sees both, or gets its own value."""
        shape = (_BATCH, _HEADS, self.q_len)
        orders = [torch.rand(shape, generator=random).argsort(-1).to(device) for _ in range(2)]
        token = torch.cat(orders, dim=2)
        if self.mask == "keys":
            token = token.masked_fill(token < self.q_len // 3, -1)
        key, value = (expand_heads(tensor, _HEADS) for tensor in (segment.key, segment.value))
        index = token.clamp(min=0)[..., None]
        key = key.gather(2, index.expand(-1, -1, -1, key.shape[3]))
        value = value.gather(2, index.expand(-1, -1, -1, value.shape[3]))
        segments = tuple(
            Segment(key, value, replace(pattern, start=start, order=order, token=token), bias=segment.bias)
            for start, order in zip((0, self.q_len), orders, strict=True)
        )
        return Attention(query, segments, _DIM**-0.5, self.dropout, empty=expand_heads(segment.value, _HEADS))

    def _bias(self, normal: object) -> Bias | None:
        if self.bias == "none":
            return None
        kind, trained = self.bias.split()[-1], self.bias.startswith("trained")
        shape = (_HEADS, 21) if kind == "relative" else (1, _HEADS, self.q_len, self.kv_len)
        values = normal(*shape).detach().requires_grad_(trained and self.grad)  # type: ignore[operator]
        return RelativeBias(values, zero=10) if kind == "relative" else DenseBias(values)


@dataclass(frozen=True)
class Outcome:
    """What came of a case: it was refused, or it ran and was checked.

    Attributes:
        case: the case.
        refused: the backend refused it (and really did, with proper reasons).
        checks: output and gradients against the oracle, if it ran.
        failure: what is wrong, or empty.
    """

    case: AttentionCase | Sample
    refused: bool
    checks: tuple[Check, ...]
    failure: str


def cases(dtypes: tuple[torch.dtype, ...] = FLOATS) -> Iterator[AttentionCase]:
    """All cases of the matrix, whatever the backend."""
    for dtype, pattern, mask, bias in itertools.product(dtypes, PATTERNS, MASKS, BIASES):
        if mask == "globals" and bias != "none":
            continue
        if isinstance(pattern, SortedChunks) and (mask not in ("none", "keys") or bias.endswith("dense")):
            continue
        for kv_heads, grad in ((_HEADS, True), (1, False)):
            yield AttentionCase(dtype, pattern, mask, bias, kv_heads, grad=grad)
    for dtype, mask in itertools.product(dtypes, MASKS):
        for pattern in (Full(), Causal(), Window(5, 3)):
            yield AttentionCase(dtype, pattern, mask, kv_heads=2, q_len=5, kv_len=23)
            yield AttentionCase(dtype, pattern, mask, kv_heads=2, q_len=1, kv_len=1)
            yield AttentionCase(dtype, pattern, mask, dropout=0.25)
            yield AttentionCase(dtype, pattern, mask, uneven=True)
            yield AttentionCase(dtype, pattern, mask, strided=True)
            yield AttentionCase(dtype, pattern, mask, grad=False, probabilities=True)
        if mask in ("none", "keys"):
            yield AttentionCase(dtype, SortedChunks(8, 1, 0, causal=True), mask, dropout=0.25)
        for hashed in (HashedChunks(5, 1, 0, causal=True), HashedChunks(4, 1, 1, apart=2)):
            if mask != "globals":
                yield AttentionCase(dtype, hashed, mask)
                yield AttentionCase(dtype, hashed, mask, kv_heads=2, q_len=5, kv_len=23)
                yield AttentionCase(dtype, hashed, mask, kv_heads=1, dropout=0.25)
                yield AttentionCase(dtype, hashed, mask, uneven=True, grad=False)
        if mask == "none":
            yield AttentionCase(dtype, HashedChunks(5), mask, bias="trained relative")
            yield AttentionCase(dtype, SortedChunks(8, 1, 1), mask, uneven=True)
    for dtype, pattern in itertools.product(dtypes, PATTERNS):
        if dtype in (torch.float32, torch.bfloat16):  # one wide, one narrow: the oracle takes its time
            mask = "keys" if isinstance(pattern, SortedChunks) else "globals"
            yield AttentionCase(dtype, pattern, mask, kv_heads=2, q_len=700, kv_len=700)
    for dtype in dtypes:
        if dtype in (torch.float32, torch.bfloat16):
            yield from _transformed_cases(dtype)


def _transformed_cases(dtype: torch.dtype) -> Iterator[AttentionCase]:
    for transform, mask in itertools.product(CHECKED, MASKS):
        for pattern in (Full(), Causal(offset=0), Window(5, 3), Chunks(8, 1, 1)):
            yield AttentionCase(dtype, pattern, mask, transform=transform)
        yield AttentionCase(dtype, Causal(), mask, kv_heads=2, q_len=5, kv_len=23, transform=transform)
        if mask in ("none", "keys"):
            yield AttentionCase(dtype, SortedChunks(8, 1, 0, causal=True), mask, transform=transform)
    for transform, bias in itertools.product(CHECKED, ("relative", "trained relative", "trained dense")):
        yield AttentionCase(dtype, Window(5, 3), "keys", bias, transform=transform)


def run_case(backend: Backend, case: AttentionCase | Sample, device: str = "cpu", seed: int = 0) -> Outcome:
    """Put one case, or a sample of a request, to a backend and judge what it does."""
    attention = case.attention(device, seed)
    if isinstance(case, AttentionCase) and case.transform:
        return _run_transformed(backend, case, attention)
    reasons = registry.refusals(backend, attention.request(case.probabilities))
    if reasons:
        try:
            execute(backend, attention, case.probabilities)
        except BackendRefusedError:
            vague = [reason for reason in reasons if not (reason.field and reason.got and reason.allowed)]
            return Outcome(case, True, (), f"a refusal without field, got or allowed: {vague}" if vague else "")
        return Outcome(case, True, (), f"declared refused, yet it ran: {'; '.join(map(str, reasons))}")
    try:
        if case.dropout:
            return Outcome(case, False, (), _dropout_failure(backend, attention))
        report = check_attention("case", attention, backend, grad=case.grad, max_rows=1 << 30, seed=seed)
        wrong = "; ".join(str(one) for one in report.checks if not one.ok)
        failure = wrong or _result_failure(backend, case, attention)
        return Outcome(case, False, report.checks, failure)
    except Exception as error:  # declared as running: whatever it raises is the failure to report
        return Outcome(case, False, (), f"declared to run, yet it raised {type(error).__name__}: {error}")


def _run_transformed(backend: Backend, case: AttentionCase, attention: Attention) -> Outcome:
    """Put a case to a backend under a transform: it runs there and agrees, or is refused there."""
    names = tuple(case.transform.split(" of "))
    reasons = registry.refusals(backend, replace(attention.request(), transforms=names))
    try:
        verdict = check_transform(attention, backend, case.transform)
    except BackendRefusedError as error:
        return Outcome(case, True, (), "" if reasons else f"declared to run, yet it raised {error}")
    except Exception as error:
        return Outcome(case, False, (), f"declared to run, yet it raised {type(error).__name__}: {error}")
    if reasons:
        return Outcome(case, True, (), f"declared refused, yet it ran: {'; '.join(map(str, reasons))}")
    return Outcome(case, False, (verdict,), "" if verdict.ok else str(verdict))


def _result_failure(backend: Backend, case: AttentionCase | Sample, attention: Attention) -> str:
    """What is wrong with the result beyond its values."""
    result = execute(backend, attention, case.probabilities)
    expected = (attention.batch, attention.heads, attention.q_len, attention.value_dim)
    if tuple(result.output.shape) != expected or result.output.dtype != case.dtype:
        return f"output is {tuple(result.output.shape)} {result.output.dtype}, not {expected} {case.dtype}"
    if not isinstance(result.kernel, str) or not result.kernel:
        return f"the kernel that ran is not named: {result.kernel!r}"
    if not case.probabilities:
        return ""
    if result.probabilities is None or len(result.probabilities) != len(attention.segments):
        return "probabilities were asked for and declared, but not returned per segment"
    reference = evaluate(attention.with_tensors(tuple(t.detach().double() for t in attention.tensors())))
    eager = evaluate(attention)
    triples = zip(result.probabilities, reference.probabilities or (), eager.probabilities or (), strict=True)
    verdicts = [check("probabilities", *triple, k=2.0) for triple in triples]
    return "; ".join(str(verdict) for verdict in verdicts if not verdict.ok)


def _dropout_failure(backend: Backend, attention: Attention, seed: int = 0) -> str:
    """Check dropout weight by weight: with one-hot values the output is the dropped softmax weights themselves.

    Each must be 0 or its softmax weight over ``1 - dropout``, and about ``dropout`` of them must be 0.
    """
    total = sum(segment.kv_len for segment in attention.segments)
    one_hot = torch.eye(total, dtype=attention.query.dtype, device=attention.query.device)
    segments, start = [], 0
    for segment in attention.segments:
        rows = one_hot[start : start + segment.kv_len].expand(*segment.value.shape[:2], -1, -1)
        padded = torch.nn.functional.pad(segment.key.detach(), (0, total - attention.head_dim))
        segments.append(replace(segment, key=padded, value=rows.contiguous()))
        start += segment.kv_len
    query = torch.nn.functional.pad(attention.query.detach(), (0, total - attention.head_dim))
    dropped = replace(attention, query=query, segments=tuple(segments), empty=None)
    kept = replace(dropped, dropout=0.0)
    devices = [query.device] if query.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        got = execute(backend, dropped).output
    wide = kept.with_tensors(tuple(t.double() for t in kept.tensors()))
    weights = evaluate(backend.rewrite(wide, backend.choices(kept))).output
    scaled = weights / (1.0 - attention.dropout)
    gone = got == 0.0
    eps = torch.finfo(got.dtype).eps
    off = (got.double() - scaled).abs().masked_fill(gone, 0.0).max().item()
    if off > 16 * eps * scaled.max().item():
        return f"dropout: a kept weight is off by {off:.3g} from its softmax weight / (1 - dropout)"
    candidates = weights > eps
    share, count = gone[candidates].double().mean().item(), int(candidates.sum())
    slack = 5.0 * (attention.dropout * (1.0 - attention.dropout) / count) ** 0.5
    if abs(share - attention.dropout) > slack:
        return f"dropout: {share:.3f} of {count} weights dropped, asked for {attention.dropout}"
    return ""


@dataclass(frozen=True)
class Conformance:
    """What :func:`check_backend` found."""

    backend: str
    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The cases that went wrong."""
        return tuple(outcome for outcome in self.outcomes if outcome.failure)

    def __str__(self) -> str:
        refused = sum(outcome.refused for outcome in self.outcomes)
        ran = len(self.outcomes) - refused
        lines = [f"{self.backend}: {ran} cases ran, {refused} were refused, {len(self.failures)} failed"]
        lines += [f"  {outcome.case}: {outcome.failure}" for outcome in self.failures]
        return "\n".join(lines)


def check_backend(
    backend: str | Backend, *, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = FLOATS, seed: int = 0
) -> Conformance:
    """Run every case of the matrix on a backend, both directions.

    Args:
        backend: a registered name, or a configured backend.
        device: device type to run on.
        dtypes: dtypes to cover.
        seed: of the inputs.

    Returns:
        All outcomes; prints as a summary.

    Raises:
        InvalidArgumentError: no backend. UnknownNameError: none of that name. BackendRefusedError: it cannot run here.
        ConformanceError: a declared case fails or disagrees with the oracle, or a refused one runs; all are listed.
    """
    made = registry.make_backend(backend) if isinstance(backend, str) else backend
    if not isinstance(made, Backend):
        raise InvalidArgumentError("backend", repr(made), "a registered name, or a configured backend")
    report = Conformance(made.name, tuple(run_case(made, case, device, seed) for case in cases(dtypes)))
    if report.failures:
        raise ConformanceError(str(report))
    if all(outcome.refused for outcome in report.outcomes):
        raise ConformanceError(f"{report}: a backend that refuses everything on {device!r} conforms to nothing")
    return report
