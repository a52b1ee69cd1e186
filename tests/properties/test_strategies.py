"""The strategy for attentions draws every kind of attention that a backend may treat differently."""

from collections import Counter

from hypothesis import Phase, given, settings

from attnzoo.spec.hashed import HashedChunks
from attnzoo.spec.patterns import Chunks, SortedChunks
from tests.support.drawn_attentions import attentions

EXAMPLES = 120


def has(*kinds):
    return lambda whole: any(type(segment.pattern) in kinds for segment in whole.segments)


def is_wrapped(whole):
    """Whether the first or the last chunk sees a chunk at the other end of the sequence, and not every chunk."""
    return any(
        type(segment.pattern) is Chunks
        and not segment.pattern.causal
        and segment.pattern.before + segment.pattern.after + 1 < -(-segment.kv_len // segment.pattern.length)
        for segment in whole.segments
    )


def differs(of_segment):
    """Whether segments in the order of the sequence differ in one thing. (Hash rounds differ in their pattern.)"""
    return lambda whole: not has(SortedChunks, HashedChunks)(whole) and len(set(map(of_segment, whole.segments))) > 1


def is_beyond_the_table(segment):
    return (
        segment.bias is not None and segment.bias.kind == "relative" and segment.kv_len > segment.bias.values.shape[1]
    )


KINDS = {
    "sorted chunks": has(SortedChunks),
    "hashed chunks": has(HashedChunks),
    "wrap-around": is_wrapped,
    "grouped heads": lambda whole: whole.heads != whole.segments[0].key.shape[1],
    "grouped heads of sorted or hashed keys": lambda whole: (
        has(SortedChunks, HashedChunks)(whole) and whole.heads != whole.segments[0].key.shape[1]
    ),
    "two segments": lambda whole: len(whole.segments) == 2,
    "three segments": lambda whole: len(whole.segments) == 3,
    "padding differs": differs(lambda segment: id(segment.key_mask)),
    "a mask, a bias or key heads differ": differs(
        lambda segment: (id(segment.mask), id(segment.bias), segment.key.shape[1])
    ),
    "lengths differ": differs(lambda segment: segment.kv_len),
    "patterns differ": differs(lambda segment: segment.pattern),
    "empty beside several segments": lambda whole: whole.empty is not None and len(whole.segments) > 1,
    "distances beyond the table": lambda whole: any(map(is_beyond_the_table, whole.segments)),
}


def test_every_kind_of_attention_is_drawn():
    drawn = Counter()

    @settings(max_examples=EXAMPLES, derandomize=True, phases=[Phase.generate], database=None)
    @given(attentions())
    def count(whole):
        drawn.update(name for name, is_kind in KINDS.items() if is_kind(whole))

    count()
    assert {name: drawn[name] for name in KINDS if drawn[name] < 3} == {}
