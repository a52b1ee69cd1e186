"""The rule of ``auto``: a backend runs only where it is known to be faster, else the model's code."""

import pytest
import torch

import attnzoo
from attnzoo.auto.calls import DECODING, FORWARD, TRAINING, ModuleCall
from attnzoo.auto.rule import LIMITS, Limit, count_scores, kind_of, native_because, native_by_rule
from attnzoo.spec.patterns import Causal, Chunks, Full, SortedChunks, Window
from attnzoo.spec.segments import Request, SegmentRequest
from tests.support.models import FAMILIES

CPU = "cpu"


def requests(*patterns, heads=4, bias=None, device=CPU, dtype=torch.float32):
    segments = tuple(SegmentRequest(pattern, heads, bias=bias) for pattern in patterns)
    return (Request(device, dtype, heads, 16, 16, segments),)


def call(mode=FORWARD, q_len=64, kv_len=None, batch=1, device=CPU):
    return ModuleCall(mode, batch, q_len, q_len if kv_len is None else kv_len, device)


@pytest.mark.parametrize(
    ("kind", "patterns", "bias"),
    [
        ("window", [Window(3, 3)], None),
        ("window and other keys", [Window(3, 3), Full()], None),
        ("window with bias", [Window(3, 3)], "relative"),
        ("window and other keys with bias", [Window(3, 3), Full()], "relative"),
        ("chunks", [Chunks(4)], None),
        ("sorted chunks", [SortedChunks(4)] * 2, None),
        ("dense in eager", [Causal(offset=0)], None),
        ("dense in eager with bias", [Full()], "relative"),
        ("unknown", [], None),
    ],
)
def test_kinds(kind, patterns, bias):
    assert kind_of(requests(*patterns, bias=bias), "eager") == kind
    assert kind_of((), "eager") == "unknown"


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("led", {"window and other keys", "dense in eager"}),
        ("longformer", {"window and other keys"}),
        ("longt5-local", {"window with bias", "dense in eager with bias", "dense in eager"}),
        ("longt5-tglobal", {"window and other keys with bias", "dense in eager with bias", "dense in eager"}),
        ("bigbird", {"chunks"}),
        ("bigbird_pegasus", {"chunks", "dense in eager"}),
        ("pegasus_x", {"chunks", "dense in eager"}),
        ("reformer", {"chunks", "sorted chunks"}),
        ("gpt_neox", {"dense in sdpa"}),
        ("gpt_bigcode-mqa", {"dense in sdpa"}),
    ],
)
def test_the_kinds_of_every_family(family, kinds):
    model = FAMILIES[family].build()
    handle = attnzoo.patch(model)
    plans = [forward.plan for forward in handle.forwards if forward.point.attends]
    assert {kind_of(plan.requests, plan.target.point.original_kernel(plan.target.module)) for plan in plans} == kinds


def test_every_limit_is_for_a_kind_that_some_family_has():
    known = {"window", "dense in sdpa"} | {kind for kind, _, _ in LIMITS}
    assert {mode for _, _, mode in LIMITS} <= {FORWARD, TRAINING}, "decoding always runs the model's code"
    for patterns, bias in (([Window(3, 3), Full()], None), ([Chunks(4)], None), ([Full()], None)):
        assert kind_of(requests(*patterns, bias=bias), "eager") in known


def test_scores_are_batch_times_heads_times_queries_times_visible_keys():
    assert count_scores(requests(Window(3, 4)), call(q_len=100, batch=2)) == 2 * 4 * 100 * 8
    assert count_scores(requests(Window(3, 4), Full()), call(q_len=5)) == 4 * 5 * 5, "a short input has fewer keys"
    assert count_scores(requests(Chunks(4, 1, 0)), call(q_len=100)) == 4 * 100 * 8
    assert count_scores(requests(*[SortedChunks(4, 1, 1)] * 3), call(q_len=100)) == 4 * 100 * 36
    sides = requests(Window(3, 3), Full(), bias="relative")
    assert count_scores(sides, call(q_len=100)) == 4 * 100 * 100, "LongT5's global keys grow with the length"
    assert count_scores(requests(Causal(offset=0)), call(q_len=7, kv_len=32)) == 4 * 7 * 32


WINDOW = requests(Window(7, 8), Full())


@pytest.fixture
def limit(monkeypatch):
    """Set a limit for windows on the CPU: 16 keys per query, and 4 heads x 50 queries x 16 keys."""
    for mode in (FORWARD, TRAINING):
        monkeypatch.setitem(LIMITS, ("window and other keys", CPU, mode), Limit(16, 4 * 50 * 16))


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
@pytest.mark.parametrize(("q_len", "batch", "native"), [(49, 1, True), (50, 1, False), (25, 2, False), (24, 2, True)])
def test_a_backend_runs_from_the_limit_on(limit, mode, q_len, batch, native):
    reason = native_because(WINDOW, "eager", call(mode, q_len, batch=batch))
    assert (reason is not None) == native
    if native:
        scores = 1 << (4 * q_len * batch * 16 - 1).bit_length()
        assert reason == (
            f"by rule: {mode} of window and other keys with about {scores} scores (limit 3200) on cpu; "
            "to measure, run attnzoo tune"
        )


def test_with_dropout_the_models_code_runs(limit):
    """The limits are measured without dropout."""
    assert native_because(WINDOW, "eager", call(TRAINING, 1000)) is None
    assert native_because(WINDOW, "eager", call(TRAINING, 1000), dropout=True) == (
        "by rule: forward+backward of window and other keys with dropout on cpu; to measure, run attnzoo tune --train"
    )


def test_a_narrow_window_always_runs_the_models_code(limit):
    narrow = requests(Window(7, 7), Full())
    assert native_because(narrow, "eager", call(q_len=1 << 20)) is not None


@pytest.mark.parametrize("length", [1, 1 << 20])
def test_without_a_limit_the_models_code_runs(limit, length):
    for others in (call(DECODING, 1, length), call(q_len=length, device="cuda"), call(q_len=length, device="meta")):
        assert native_because(WINDOW, "eager", others).startswith(f"by rule: {others.mode} of window and other keys")
    assert native_because(requests(Causal(offset=0)), "sdpa", call(q_len=length)) is not None
    assert native_because((), "eager", call(q_len=length)) is not None


def test_a_limit_may_hold_for_one_backend_only(limit, monkeypatch):
    key = ("window and other keys", CPU, FORWARD)
    monkeypatch.setitem(LIMITS, key, LIMITS[key]._replace(backend="eager"))
    assert native_because(WINDOW, "eager", call(q_len=1000)) is not None, "auto would select sdpa"
    monkeypatch.setitem(LIMITS, key, LIMITS[key]._replace(backend="sdpa"))
    assert native_because(WINDOW, "eager", call(q_len=1000)) is None


def test_the_rule_in_words(limit):
    assert native_by_rule(WINDOW, "eager", CPU) == (
        "window and other keys on cpu: decoding, forward below 50 queries, forward+backward below 50 queries"
    )
    assert native_by_rule(WINDOW, "eager", CPU, dropout=True) == (
        "window and other keys on cpu: decoding, forward below 50 queries, "
        "forward+backward with dropout or below 50 queries"
    )
    assert native_by_rule(requests(Causal(offset=0)), "sdpa", CPU) == (
        "dense in sdpa on cpu: decoding, forward, forward+backward"
    )
    first = native_by_rule(requests(Causal(offset=0), heads=1), "eager", CPU).split("forward below ")[1].split()[0]
    assert int(first) ** 2 == LIMITS["dense in eager", CPU, FORWARD].scores
