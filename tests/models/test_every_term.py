"""The tiny models show every term of their attention: without a term, their logits change by far more than a rounding.

Other tests compare these models with the original. These tests would not notice an error in a term on which the logits
do not depend.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import attnzoo
from attnzoo.backends.eager import EagerBackend
from attnzoo.patching.replay import replaying
from attnzoo.patching.sites import find_sites
from attnzoo.spec.patterns import Causal, Chunks, Full, Window
from tests.support.judge import hashes_of, logits_of
from tests.support.models import FAMILIES, ids, padded

VISIBLE = 0.01  # of the largest logit; float32 roundings are below 1e-5


def of_segment(number, change):
    """Return a function that changes one segment of an attention, or returns None if there is nothing to change."""

    def spoil(attention):
        if number >= len(attention.segments):
            return None
        changed = change(attention.segments[number])
        if changed is None:
            return None
        segments = list(attention.segments)
        segments[number] = changed
        return replace(attention, segments=tuple(segments))

    return spoil


def without(field):
    return lambda segment: None if getattr(segment, field) is None else replace(segment, **{field: None})


def without_in_last_sample(segment):
    mask = segment.key_mask
    if mask is None or bool(mask[-1].all()):
        return None
    return replace(segment, key_mask=torch.cat([mask[:-1], torch.ones_like(mask[-1:])]))


def bias_of_one_head_less(segment):
    bias = segment.bias
    if bias is None or not hasattr(bias, "zero"):
        return None
    kept = torch.ones_like(bias.values)
    kept[-1] = 0.0
    return replace(segment, bias=replace(bias, values=bias.values * kept))


def bias_of_far_keys_less(segment):
    """Remove the bias of the last bucket, which distances from ``relative_attention_max_distance`` on share."""
    bias = segment.bias
    if bias is None or not hasattr(bias, "zero"):
        return None
    kept = torch.ones_like(bias.values)
    kept[:, 0] = kept[:, -1] = 0.0
    return replace(segment, bias=replace(bias, values=bias.values * kept))


def wider(segment):
    if isinstance(segment.pattern, Causal):
        return replace(segment, pattern=Full())
    if isinstance(segment.pattern, Window):
        return replace(segment, pattern=replace(segment.pattern, left=segment.pattern.left + 1))
    if isinstance(segment.pattern, Chunks) and segment.pattern.causal:
        return replace(segment, pattern=replace(segment.pattern, causal=False))
    return None


def narrower(segment):
    if isinstance(segment.pattern, Causal):
        return replace(segment, pattern=Causal(offset=-1 if segment.pattern.offset == 0 else -2))
    if isinstance(segment.pattern, Window):
        return replace(segment, pattern=replace(segment.pattern, left=segment.pattern.left - 1))
    if isinstance(segment.pattern, Chunks):
        fewer = dict(before=0) if segment.pattern.before else dict(length=segment.pattern.length // 2)
        return replace(segment, pattern=replace(segment.pattern, **fewer))
    return None


def swapped(field):
    def change(segment):
        heads = getattr(segment, field)
        return replace(segment, **{field: heads.flip(1)}) if heads.shape[1] > 1 else None

    return change


def fewer_segments(attention):
    return replace(attention, segments=attention.segments[:1]) if len(attention.segments) > 1 else None


# What a segment may lack. Each function returns the segment without the term, or None if it does not have the term.
OF_A_SEGMENT = {
    "key mask": without("key_mask"),
    "key mask of the last sample": without_in_last_sample,
    "bias": without("bias"),
    "bias of one head": bias_of_one_head_less,
    "bias of far keys": bias_of_far_keys_less,
    "last keys": wider,
    "first keys": narrower,
    "key heads": swapped("key"),
    "value heads": swapped("value"),
}
TERMS = {
    "scale": lambda attention: replace(attention, scale=attention.scale * 1.1),
    "second segment": fewer_segments,
    "output of queries without keys": lambda a: None if a.empty is None else replace(a, empty=None),
    **{name: of_segment(0, change) for name, change in OF_A_SEGMENT.items()},
    **{f"{name}, second segment": of_segment(1, change) for name, change in OF_A_SEGMENT.items()},
}
_DENSE = {"scale", "key mask", "key mask of the last sample", "last keys", "first keys"}
_HEADS = {"key heads", "value heads"}
_SECOND = {"second segment", "key heads, second segment", "value heads, second segment", "key mask, second segment"}
_BIAS = {"bias", "bias of one head", "bias of far keys"}
_SECOND_BIAS = {f"{name}, second segment" for name in _BIAS}
HAS = {
    "led": _DENSE | _HEADS | _SECOND,
    "longformer": _DENSE | _HEADS | _SECOND,
    "longt5-local": _DENSE | _HEADS | _BIAS,
    "longt5-tglobal": _DENSE | _HEADS | _BIAS | _SECOND | _SECOND_BIAS
    | {"key mask of the last sample, second segment"},
    "bigbird": _DENSE - {"last keys"} | _HEADS | _SECOND | _SECOND_BIAS
    | {"key mask of the last sample, second segment"},
    "bigbird_pegasus": _DENSE | _HEADS | _SECOND | _SECOND_BIAS | {"key mask of the last sample, second segment"},
    "pegasus_x": _DENSE | _HEADS | _SECOND - {"key mask, second segment"},
    "reformer": _DENSE | _HEADS | _SECOND - {"key mask, second segment"}
    | {"output of queries without keys", "last keys, second segment", "first keys, second segment"},
    "gpt_neox": _DENSE | _HEADS,
    "gpt_bigcode-mqa": _DENSE,
    "gpt_bigcode-mha": _DENSE | _HEADS,
}  # fmt: skip


@dataclass(frozen=True)
class Spoiling(attnzoo.Backend):
    """Compute as eager does, but without one term (``less``) at the sites of one kind.

    ``seen`` has every kind with every term that its attentions have, in the order of the calls.
    """

    kind: str = ""
    name: ClassVar[str] = "spoiling"
    capabilities: ClassVar[attnzoo.Capabilities] = EagerBackend.capabilities
    less: ClassVar[tuple[str, str] | None] = None
    seen: ClassVar[dict] = {}

    def run(self, attention, probabilities=False):
        if self.less is None:
            self.seen.update({(self.kind, term): None for term, spoil in TERMS.items() if spoil(attention) is not None})
        elif self.less[0] == self.kind:
            attention = TERMS[self.less[1]](attention) or attention
        return EagerBackend().run(attention, probabilities)


def kind_of(target):
    """Sites of one kind have the same class and pattern, and the same place in their layer (self or cross)."""
    return f"{target.point.describe(target.module)} in {target.name.rpartition('.')[2]}"


def relative(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def inputs_of(family):
    """Return inputs with padding on the left that are longer than a window and than ``max_distance``."""
    inputs = family.inputs(100 if "longt5" in family.name else 36, "left")
    if "decoder_input_ids" in inputs:
        inputs |= dict(decoder_input_ids=ids(3, 24, seed=3), decoder_attention_mask=padded(3, 24, "left"))
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_logits_show_every_term_of_every_site(family, monkeypatch):
    model, inputs = family.build(), inputs_of(family)
    kinds = {target.label: kind_of(target) for target in find_sites(model) if target.point.attends}
    hidden = {}
    monkeypatch.setattr(Spoiling, "seen", {})
    with hashes_of(model) as buckets, attnzoo.patch(model, {name: Spoiling(kind) for name, kind in kinds.items()}):
        expected = logits_of(model, inputs)
        replayed = {name: calls[:1] for name, calls in buckets.items()}
        for kind, term in tuple(Spoiling.seen):
            monkeypatch.setattr(Spoiling, "less", (kind, term))
            with replaying(model, replayed):
                change = relative(logits_of(model, inputs), expected)
            if change < VISIBLE:
                hidden[kind, term] = change
    assert hidden == {}
    assert {term for _, term in Spoiling.seen} == HAS[family.name]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_logits_show_every_projection_of_every_site(family):
    """A bias of the keys adds one number to all scores of a query, which the softmax ignores, unless keys rotate."""
    model, inputs = family.build(), inputs_of(family)
    hidden = {}
    with hashes_of(model) as buckets:
        expected = logits_of(model, inputs)
        replayed = {name: calls[:1] for name, calls in buckets.items()}
        for target in find_sites(model):
            for name, parameter in target.module.named_parameters() if target.point.attends else ():
                if name.endswith(("key.bias", "k_proj.bias", "key_global.bias")):
                    continue
                before = parameter.clone()
                parameter.zero_()
                with replaying(model, replayed):
                    change = relative(logits_of(model, inputs), expected)
                parameter.copy_(before)
                if change < VISIBLE:
                    hidden[f"{target.label}.{name}"] = change
    assert hidden == {}


@torch.no_grad()
def test_logits_show_the_rotation_of_gpt_neox():
    model, inputs = FAMILIES["gpt_neox"].build(), inputs_of(FAMILIES["gpt_neox"])
    expected = logits_of(model, inputs)
    model.gpt_neox.rotary_emb.inv_freq.zero_()
    assert relative(logits_of(model, inputs), expected) > VISIBLE
