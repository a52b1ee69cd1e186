"""``auto`` takes what was measured to be fastest, else goes by priority, and can say why."""

import copy
from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo.auto import selection
from attnzoo.auto.measurements import in_words, plain
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import SegmentRequest
from tests.support.models import gpt_neox, led
from tests.support.tuning import attention, files, measured, neox_inputs, took, tune

# What auto takes


def test_before_anything_is_measured_auto_goes_by_priority_and_says_so(add):
    add("slow", rank=5)
    add("fast")
    choice = took()
    assert choice.backend.name == "slow"
    assert choice.reason == (
        "by priority: nothing measured for forward at batch <= 1, queries <= 32, keys <= 32; attnzoo.tune measures"
    )


def test_after_tuning_auto_takes_the_fastest_and_says_so(add, clock):
    slow, fast = add("slow", seconds=4.0, rank=5), add("fast", seconds=0.25)
    tune(clock)
    choice = took()
    assert choice.backend == fast()
    assert choice.reason == "measured 250 ms; slow 4 s"
    slow.runs.clear(), fast.runs.clear()
    took()
    assert (len(slow.runs), len(fast.runs)) == (0, 2), "one per layer"


def test_what_was_measured_holds_for_the_function_too(add, clock):
    add("slow", seconds=4.0, rank=5)
    fast = add("fast", seconds=0.25)
    q = torch.randn(1, 2, 21, 4)
    tune(clock, inputs=lambda: attnzoo.attention(q, q, q))
    fast.runs.clear()
    attnzoo.attention(q, q, q)
    assert fast.runs == [], "only a model's own attentions are measured"
    tune(clock)
    seen = fast.runs[-1]
    attnzoo.attention(seen.query, seen.segments[0].key, seen.segments[0].value, attnzoo.Causal(offset=0), scale=1.0)
    assert fast.runs[-1].scale == 1.0, "the same request at the same size"


@pytest.mark.parametrize(
    ("length", "same"), [(17, True), (32, True), (16, False), (33, False), (5, False), (64, False)]
)
def test_a_measurement_holds_for_its_size_class(add, clock, length, same):
    add("slow", seconds=4.0, rank=5), add("fast")
    tune(clock, inputs=neox_inputs(21))
    assert took(inputs=neox_inputs(length)).backend.name == ("fast" if same else "slow")


OTHERS = {
    "dtype": lambda a: a.with_tensors(tuple(t.double() for t in a.tensors())),
    "pattern": lambda a: replace(a, segments=(replace(a.segments[0], pattern=attnzoo.Window(5, 0)),)),
    "heads": lambda a: a.with_tensors(tuple(t[:, :1] for t in a.tensors())),
    "batch": lambda a: a.with_tensors(tuple(torch.cat([t, t]) for t in a.tensors())),
    "dropout": lambda a: replace(a, dropout=0.5),
    "gradients": lambda a: a.with_tensors(tuple(t.clone().requires_grad_() for t in a.tensors())),
    "key mask": lambda a: replace(a, segments=(replace(a.segments[0], key_mask=torch.ones(2, 37) > 0),)),
    "segments": lambda a: replace(a, segments=a.segments * 2),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_measurement_holds_for_nothing_else(add, change):
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    assert selection.choose_for(attention()).backend.name == "fast"
    assert selection.choose_for(change(attention())).backend.name == "slow"


def test_where_a_pattern_grows_with_the_lengths_it_is_rounded_with_them(add):
    def key(pattern):
        return plain(SegmentRequest(pattern, 2))

    assert key(attnzoo.Causal(offset=17)) == key(attnzoo.Causal(offset=30)) != key(attnzoo.Causal(offset=33))
    assert key(attnzoo.Causal(offset=-1)) != key(attnzoo.Causal(offset=1)) != key(attnzoo.Causal())
    assert key(SortedChunks(8, start=100)) == key(SortedChunks(8, start=128)) != key(SortedChunks(8, start=0))
    assert key(attnzoo.Window(5, 0)) != key(attnzoo.Window(8, 0)), "a window is not a length"


def test_a_backend_of_the_same_name_is_not_the_one_that_was_measured(add):
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    add("fast", version="2")
    assert selection.choose_for(attention()).backend.name == "slow", "of what is known, the other is the fastest"


def test_registering_and_unregistering_is_seen_at_once(add):
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    assert selection.choose_for(attention()).backend.name == "fast"
    attnzoo.unregister_backend("fast")
    assert selection.choose_for(attention()).reason == "measured 2 s"
    add("top", rank=9)
    assert selection.choose_for(attention()).backend.name == "slow", "what was not measured does not win"
    assert selection.choose_for(attention(70)).backend.name == "top", "nothing was measured here"
    add("summit", rank=10)
    assert selection.choose_for(attention(70)).backend.name == "summit"


def test_what_only_one_backend_takes_is_not_measured(add, clock):
    only = add("only")
    assert tune(clock) == ()
    assert str(tune(clock)).startswith("nothing to measure") and files() == []
    only.runs.clear()
    assert took() == attnzoo.Choice(only(), "the only backend that supports this")


# Deterministic when told so


@pytest.mark.parametrize(
    ("variable", "deterministic", "taken"),
    [(None, False, "fast"), (None, True, "slow"), ("priority", False, "slow"), ("priority", True, "slow"),
     ("measured", False, "fast"), ("measured", True, "fast")],
)  # fmt: skip
def test_auto_goes_by_priority_when_told_so(add, clock, monkeypatch, variable, deterministic, taken):
    add("slow", seconds=4.0, rank=5), add("fast")
    tune(clock)
    if variable is not None:
        monkeypatch.setenv("ATTNZOO_AUTO", variable)
    torch.use_deterministic_algorithms(deterministic)
    try:
        choice = took()
        told = str(attnzoo.explain(gpt_neox()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert choice.backend.name == taken
    if taken == "slow":
        why = "ATTNZOO_AUTO=priority" if variable else "torch.use_deterministic_algorithms is on"
        assert choice.reason.startswith(f"by priority: {why}") and f"auto: slow by priority: {why}" in told
    else:
        assert "auto: fast for forward at" in told


def test_inside_a_compiler_lengths_may_be_symbols_so_auto_goes_by_priority(add, monkeypatch):
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    choice = selection.choose_for(attention())
    assert choice.backend.name == "slow" and "torch.compile" in choice.reason


def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv("ATTNZOO_AUTO", "fastest")
    with pytest.raises(attnzoo.InvalidArgumentError, match="ATTNZOO_AUTO: got 'fastest'; allowed: 'measured' or 'pri"):
        selection.choose_for(attention())
    model = gpt_neox()
    for backend in ("auto", {"*.0.*": "auto"}):
        with pytest.raises(attnzoo.InvalidArgumentError, match="ATTNZOO_AUTO: got 'fastest'"):
            attnzoo.patch(model, backend)
    assert not any("forward" in vars(module) for module in model.modules())
    with attnzoo.patch(model, "sdpa"):
        pass  # which is asked for by name


# What can be seen of it


def test_a_handle_shows_what_auto_took_and_why(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    model = gpt_neox()
    tune(clock, model)
    handle = attnzoo.patch(model)
    assert str(handle).splitlines()[1].startswith("auto  ") and handle.sites[0].ran == "auto"
    with torch.no_grad():
        model(**neox_inputs())
        model(**neox_inputs(50))
        model(**neox_inputs(21))
    twin = copy.deepcopy(model)
    site = handle.sites[0]
    assert (site.backend, site.ran, site.kernel) == ("auto", "auto: fast+slow", "fast-kernel+slow-kernel")
    assert "auto: fast+slow" in str(handle)
    assert [(choice.backend.name, count) for choice, count in site.selections.most_common()] == [
        ("fast", 2),
        ("slow", 1),
    ]
    assert str(site.selections.most_common()[0][0]) == "fast: measured 1 s; slow 4 s"
    with torch.no_grad():
        twin(**neox_inputs())
    assert site.selections.total() == 3, "the copy counts its own"


def test_what_was_asked_for_by_name_is_no_choice(add):
    add("one"), add("two")
    model = gpt_neox()
    with attnzoo.patch(model, "two") as handle:
        model(**neox_inputs())
    assert handle.sites[0].selections == {} and handle.sites[0].ran == "two"


def test_explain_tells_what_was_measured_and_what_goes_by_priority(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    model = gpt_neox()
    assert "  auto: slow by priority: nothing measured yet, see attnzoo tune" in str(attnzoo.explain(model))
    tune(clock, model)
    explanation = attnzoo.explain(model)
    (lines,) = set(explanation.auto.values())
    assert lines == (
        "fast for forward at batch <= 1, queries <= 32, keys <= 32: measured 1 s; slow 4 s",
        "slow for other sizes, by priority",
    )
    assert f"auto: {lines[0]}" in " ".join(str(explanation).split())
    assert "auto:" not in str(attnzoo.explain(model, "fast"))
    assert str(attnzoo.explain(model, "auto")) == str(explanation)
    assert "measured 1 s" not in str(attnzoo.explain(gpt_neox().double())), "of another dtype nothing is known"
    assert "auto: fast" not in str(attnzoo.explain(led())), "nor of other heads"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 us"), (8.19e-5, "81.9 us"), (0.00127, "1.27 ms"), (0.5, "500 ms"), (12.34, "12.3 s"), (1234.5, "1234 s")],
)
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words
