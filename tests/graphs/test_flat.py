"""An attention survives the conversion to plain arguments."""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.graphs.flat import flatten, unflatten
from attnzoo.spec.bias import Bias
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, SortedChunks, Window
from attnzoo.spec.segments import Attention, Segment
from tests.graphs.attentions import ATTENTIONS, tokens


def same(one, other):
    """Whether two values of fields are equal, and all their tensors are the same objects."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Attention | Segment | Pattern | Bias):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
        )
    return one == other


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_an_attention_survives(attention):
    assert same(unflatten(flatten(attention)), attention)


PATTERNS = [
    Full(), Full(cross=True), Causal(), Causal(offset=0), Window(2, 1), Window(2, 1, offset=3), Chunks(4, 1, 1),
    Chunks(4, causal=True),
    SortedChunks(4, 1, 0, True, 8, torch.arange(8).expand(2, 1, -1), torch.arange(8).expand(2, 1, -1)),
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_survives(pattern):
    q, k, v = tokens(8).unbind()
    (segment,) = unflatten(flatten(Attention(q[:, :1], (Segment(k[:, :1], v[:, :1], pattern),), 1.0))).segments
    assert same(segment.pattern, pattern)


def test_shared_tensors_are_passed_once():
    """A backend recognises shared keys by identity, and computes their gradient once."""
    q, k, v = tokens(8).unbind()
    flat = flatten(Attention(q, (Segment(k, v, Window(2, 0)), Segment(k, v, Chunks(4))), 1.0))
    assert len(flat.trained) == 3


def test_lengths_are_numbers_and_no_text():
    forms = set()
    for length in (8, 12):
        q, k, v = tokens(length).unbind()
        forms.add(flatten(Attention(q, (Segment(k, v, Causal(offset=length)),), 1.0)).form)
    assert len(forms) == 1


def test_an_unknown_pattern_is_refused():
    @dataclass(frozen=True)
    class Window(attnzoo.Window):
        """A pattern whose name is known, but whose class is not."""

    q, k, v = tokens(8).unbind()
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"pattern: got Window; allowed: .* in a graph"):
        flatten(Attention(q, (Segment(k, v, Window(1, 1)),), 1.0))
