"""The conformance kit has a case for each backend that is wrong in one place only, and reports the failure."""

from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo import testing
from attnzoo.backends.eager import evaluate, joined_values
from attnzoo.spec.patterns import Chunks, SortedChunks
from tests.plugin.attnzoo_example_plugin.tiled import TiledBackend
from tests.support.candidates import (
    Candidate,
    candidate,
    changes_in_place,
    gradient_at,
    of_bias,
    only_if,
    scaled_at,
    softer,
    with_fields,
    with_segment,
)


def first_failure(backend, words, dtype=torch.float32):
    """Return the first failure among those cases of the kit whose description contains all words."""
    chosen = [case for case in testing.cases((dtype,)) if all(word in str(case) for word in words)]
    assert chosen, words
    return next((o.failure for case in chosen if (o := testing.run_case(backend, case)).failure), "")


def rejects(backend, *words, message="output: error", dtype=torch.float32):
    return message in first_failure(backend, words, dtype)


def interleaved(attention):
    """Query head h uses key head h % kv_heads."""
    copies = [attention.heads // segment.key.shape[1] for segment in attention.segments]
    segments = tuple(
        replace(s, key=s.key.repeat(1, n, 1, 1), value=s.value.repeat(1, n, 1, 1))
        for s, n in zip(attention.segments, copies, strict=True)
    )
    return replace(attention, segments=segments)


def without_wrap_around(attention):
    (segment,) = attention.segments
    pattern, chunk = segment.pattern, torch.arange(attention.q_len) // segment.pattern.length
    ahead = chunk[None, :] - chunk[:, None]
    near = ((ahead >= -pattern.before) & (ahead <= pattern.after))[None, None]
    return replace(attention, segments=(replace(segment, mask=near if segment.mask is None else segment.mask & near),))


def is_wrapped(attention):
    return len(attention.segments) == 1 and type(attention.segments[0].pattern) is Chunks


def of_first(field, value):
    """Return a function that uses the first sample or head of a tensor for all samples or heads."""
    return with_segment(0, **{field: lambda mask: None if mask is None else value(mask)})


def as_if_contiguous(tensor):
    dense = torch.empty(tensor.shape).stride()
    return tensor.as_strided(tensor.shape, dense)


def repeated_rows(bias):
    """A dense bias whose rows start again after a block of 512 rows."""
    rows = torch.arange(bias.values.shape[2]) % 512
    return replace(bias, values=bias.values[:, :, rows])


def of_a_cache(key_of, field):
    """Return a function that caches a field of the first segment by a key, and uses this value in later calls."""
    kept = {}

    def before(attention):
        segment = attention.segments[0]
        value = kept.setdefault(key_of(attention), getattr(segment, field))
        return replace(attention, segments=(replace(segment, **{field: value}), *attention.segments[1:]))

    return before


def request_and_lengths(attention):
    return attention.request(), attention.q_len, attention.segments[0].kv_len


def with_the_first_offset():
    """Return a function that caches the offset of a causal pattern by the number of queries only, not of keys."""
    kept = {}

    def before(attention):
        (segment,) = attention.segments
        shift = kept.setdefault(attention.q_len, segment.kv_len - attention.q_len)
        return replace(attention, segments=(replace(segment, pattern=replace(segment.pattern, offset=shift)),))

    return before


def no_queries_masked(attention):
    return replace(attention, query_mask=None) if len(attention.segments) == 1 else attention


# Words of a case that must fail, and the backend.
FAULTS = {
    "key heads are interleaved": (["4/2 heads"], Candidate(interleaved)),
    "no wrap-around": (["Chunks(length=8, before=1, after=1", "mask none"], only_if(is_wrapped, without_wrap_around)),
    "causal from the first key": (
        ["Causal(offset=None)", "5 x 23"],
        Candidate(with_segment(0, pattern=lambda p: replace(p, offset=0))),
    ),
    "more queries than keys": (["23 x 9"], only_if(lambda a: a.q_len > a.segments[0].kv_len, softer)),
    "bias from the first key": (
        ["relative", "5 x 23"],
        Candidate(with_segment(0, bias=lambda b: b and replace(b, offset=0))),
    ),
    "outputs of rows without keys": (
        ["empty"],
        only_if(lambda a: type(a.segments[0].pattern) is not SortedChunks, with_fields(empty=lambda empty: None)),
    ),
    "padding queries of one segment": (["mask queries"], Candidate(no_queries_masked)),
    "padding keys of the first sample": (
        ["mask keys"],
        Candidate(of_first("key_mask", lambda mask: mask[:1].expand_as(mask))),
    ),
    "mask of the first sample": (["mask dense"], Candidate(of_first("mask", lambda m: m[:1]))),
    "mask of the first head": (["mask dense", "other_shapes"], Candidate(of_first("mask", lambda m: m[:, :1]))),
    "bias of the first head": (["bias trained dense"], Candidate(with_segment(0, bias=of_bias(lambda v: v[:, :1])))),
    "bias of the first sample": (
        ["dense", "other_shapes"],
        Candidate(with_segment(0, bias=of_bias(lambda v: v[:1]))),
    ),
    "positions of the bias": (
        ["relative", "other_shapes"],
        Candidate(with_segment(0, bias=lambda b: replace(b, positions=None))),
    ),
    "strides": (["strided"], Candidate(with_fields(query=as_if_contiguous))),
    "strides of the second segment": (
        ["strided", "globals"],
        Candidate(with_segment(0, value=as_if_contiguous)),
    ),
    "batch of one": (["batch 1"], only_if(lambda a: a.query.shape[0] == 1, softer)),
    "several samples": ([], only_if(lambda a: a.query.shape[0] > 1, softer)),
    "value_dim": (["uneven"], only_if(lambda a: a.value_dim != a.head_dim, softer)),
    "inference": (["mask none", "4/1 heads"], only_if(lambda a: not a.query.requires_grad, softer)),
    "rows past a block": (["530 x 530"], Candidate(after=scaled_at((..., slice(512, None), slice(None))))),
    "bias past a block": (["dense", "530 x 530"], Candidate(with_segment(0, bias=repeated_rows))),
    "hidden keys past a block": (
        ["mask dense", "530 x 530"],
        only_if(lambda a: a.q_len > 512, of_first("mask", lambda m: m[:, :, torch.arange(m.shape[2]) % 512])),
    ),
    "a mask kept by its shape": (["mask keys"], Candidate(of_a_cache(request_and_lengths, "key_mask"))),
    "a dense mask kept by its shape": (["mask dense"], Candidate(of_a_cache(request_and_lengths, "mask"))),
    "an offset kept by the number of queries": (
        ["Causal(offset=None)", "mask none", " 1 x "], Candidate(with_the_first_offset()),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("words", "backend"), FAULTS.values(), ids=FAULTS)
def test_kit_rejects_a_backend_that_is_wrong_in_one_kind_of_case(words, backend):
    assert rejects(backend, *words)


GRADIENTS = {
    "second key": (["globals"], with_segment(1, key=gradient_at())),
    "second value": (["globals"], with_segment(1, value=gradient_at())),
    "query": ([], with_fields(query=gradient_at())),
    "relative bias": (["trained relative"], with_segment(0, bias=of_bias(gradient_at()))),
    "dense bias": (["trained dense"], with_segment(0, bias=of_bias(gradient_at()))),
    "relative bias with padding queries": (
        ["trained relative", "mask queries"],
        with_segment(0, bias=of_bias(gradient_at())),
    ),
    "relative bias by positions": (
        ["trained relative", "other_shapes"],
        with_segment(0, bias=of_bias(torch.Tensor.detach)),
    ),
    "rows without keys": (["empty"], with_fields(empty=gradient_at())),
    "rows past a block": (["530 x 530"], with_fields(query=gradient_at((..., slice(512, None), slice(None))))),
    "one sample": (["mask none"], with_segment(0, key=gradient_at(1))),
}


@pytest.mark.parametrize(("words", "before"), GRADIENTS.values(), ids=GRADIENTS)
def test_kit_rejects_one_wrong_gradient(words, before):
    assert rejects(Candidate(before), *words, message="gradient: error")


def dropped(attention, kept):
    """Output with the weights that are kept, divided by 1 - dropout."""
    if not attention.dropout:
        return evaluate(attention).output
    weights = torch.cat(evaluate(replace(attention, dropout=0.0)).probabilities, dim=-1)
    weights = weights * kept(weights) / (1 - attention.dropout)
    return attention.fill(weights @ joined_values(attention), None)


def draw(*shape, rate=0.25):
    return torch.rand(shape) >= rate


def another_backward(attention):
    forward, backward = (evaluate(attention).output for _ in range(2))
    return backward - backward.detach() + forward.detach()


def forward_without_scale(attention):
    output = evaluate(attention).output
    return output * (1 - attention.dropout)


def of_one_seed(attention):
    torch.manual_seed(3)
    return evaluate(attention).output


DROPOUTS = {
    "rate": (lambda a: dropped(a, lambda w: draw(*w.shape, rate=0.2)), "dropout: got a share of 0."),
    "scale": (forward_without_scale, "dropout: a kept weight differs"),
    "none": (lambda a: evaluate(replace(a, dropout=0.0)).output, "dropout: a kept weight differs"),
    "none, but scaled": (lambda a: dropped(a, lambda w: 1.0), "dropout: got a share of 0.0"),
    "all heads alike": (lambda a: dropped(a, lambda w: draw(w.shape[0], 1, *w.shape[2:])), "neighbouring heads"),
    "all samples alike": (lambda a: dropped(a, lambda w: draw(1, *w.shape[1:])), "neighbouring samples"),
    "all queries alike": (lambda a: dropped(a, lambda w: draw(*w.shape[:2], 1, w.shape[3])), "dropout: "),
    "all calls alike": (of_one_seed, "two calls drop the same weights"),
    "other weights in the backward": (another_backward, "dropout: gradient: error"),
    "no gradient of the scores": (
        lambda a: dropped(a.with_tensors((a.query.detach(), *a.tensors()[1:])), lambda w: draw(*w.shape)),
        "dropout: gradient: error",
    ),
}


@pytest.mark.parametrize(("compute", "message"), DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("mask", ["none", "globals"])
def test_kit_rejects_one_wrong_property_of_dropout(compute, message, mask):
    backend = candidate(lambda a: compute(a) if a.dropout else evaluate(a).output)
    assert rejects(backend, "dropout", "Full()", f"mask {mask}", message=message)


@pytest.mark.parametrize("name", ["all heads alike", "all samples alike", "all queries alike"])
def test_two_samples_heads_or_queries_with_equal_dropped_weights_are_enough_to_reject(name):
    compute, _ = DROPOUTS[name]
    sizes = dict(batch=2) if name == "all samples alike" else dict(batch=1, q_len=2)
    backend, case = candidate(lambda a: compute(a)), testing.AttentionCase(dropout=0.25, kv_len=400, **sizes)
    assert "drop the same weights" in testing.run_case(backend, case).failure
    right = candidate(lambda a: dropped(a, lambda w: draw(*w.shape)))
    assert "drop the same weights" not in testing.run_case(right, case).failure


def returning(**change):
    class Returning(Candidate):
        def run(self, attention, probabilities=False):
            result = super().run(attention, probabilities)
            return result._replace(**{name: new(result) for name, new in change.items()})

    return Returning()


def scaled_probabilities(result):
    return result.probabilities and tuple(weights * 1.01 for weights in result.probabilities)


RESULTS = {
    "probabilities": (["probabilities"], returning(probabilities=scaled_probabilities), "probabilities: error"),
    "weights after dropout": (
        ["batch 3, probabilities"], returning(dropped=scaled_probabilities), "dropped: error",
    ),
    "no weights after dropout": (
        ["batch 3, probabilities"], returning(dropped=lambda r: None), "tensor per segment in 'dropped'",
    ),
    "weights before dropout": (
        ["dropout", "probabilities"], returning(dropped=lambda r: r.probabilities), "are not the weights of the output",
    ),
    "one tensor for two segments": (
        ["globals", "probabilities"],
        returning(probabilities=lambda r: r.probabilities and (torch.cat(r.probabilities, -1),)),
        "tensor per segment in 'probabilities'",
    ),
    "dtype": (["mask none"], returning(output=lambda r: r.output.double()), "output: got shape (3, 4, 37, 16), torch."),
    "kernel": (["mask none"], returning(kernel=lambda r: ""), "kernel of the result: got ''"),
    "no graph": (["mask none", "grad"], returning(output=lambda r: r.output.detach()), "gradient: error"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "backend", "message"), RESULTS.values(), ids=RESULTS)
def test_kit_rejects_one_wrong_field_of_the_result(words, backend, message):
    assert rejects(backend, *words, message=message)


def raising(error, applies):
    def before(attention):
        if applies(attention):
            raise error
        return attention

    return Candidate(before)


def test_kit_rejects_a_backend_that_fails_at_what_it_declares():
    refusal = attnzoo.BackendRefusedError("candidate", {"": (attnzoo.Refusal("segments", "2", "1"),)}, {})
    for error, name in ((NotImplementedError("one segment"), "NotImplementedError"), (refusal, "BackendRefusedError")):
        backend = raising(error, lambda attention: len(attention.segments) > 1)
        assert rejects(backend, "globals", message=f"the backend supports this case, but raised {name}")


def test_kit_rejects_a_backend_that_changes_its_inputs():
    for choose in (lambda a: a.segments[0].key, lambda a: a.segments[0].key_mask):
        backend, message = changes_in_place(choose), "inputs, which the backend must not change: error inf"
        assert rejects(backend, "mask keys", "4/1 heads", message=message)
        # With gradients, autograd may raise before the inputs are compared.
        assert first_failure(backend, ["mask keys", "4/4 heads", "batch 3, grad"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kit_rejects_a_wrong_block_in_every_dtype(dtype):
    assert rejects(Candidate(after=scaled_at((1, 2, slice(8, 12)))), "37 x 37", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [Candidate(), TiledBackend(tile=7)], ids=["plain", "tiled"])
def test_kit_accepts_right_backends_on_the_cases_that_reject_wrong_ones(backend, dtype):
    for word in ("other_shapes", "empty", "reversed", "batch 1", "23 x 9", "mask queries", "dropout", "probabilities"):
        assert not first_failure(backend, [word], dtype)
