"""``auto`` selects the fastest measured backend, else by priority, and gives the reason."""

import copy
from dataclasses import replace

import pytest
import torch

import attnzoo
from attnzoo.auto import cache, environment, selection
from attnzoo.auto.environment import code_of
from attnzoo.auto.measurements import Measurement, Outcome, format_seconds, size_class, to_plain_data
from attnzoo.registry import registry
from attnzoo.spec.patterns import SortedChunks
from attnzoo.spec.segments import SegmentRequest
from tests.support.models import gpt_neox, led
from tests.support.tuning import OURS, attention, forget, measured, neox_inputs, took, tune

# Selection


def test_without_measurements_auto_selects_by_priority(add):
    add("slow", rank=5)
    add("fast")
    choice = took()
    assert choice.backend.name == "slow"
    assert choice.reason == (
        "by priority: no measurement for forward at batch <= 1, queries <= 32, keys <= 32; to measure, run attnzoo tune"
    )


def test_after_tuning_auto_selects_the_fastest(add, clock):
    slow, fast = add("slow", seconds=4.0, rank=5), add("fast", seconds=0.25)
    tune(clock)
    choice = took()
    assert choice.backend == fast()
    assert choice.reason == "measured 250 ms; slow 4 s"
    slow.runs.clear(), fast.runs.clear()
    took()
    assert (len(slow.runs), len(fast.runs)) == (0, 2), "one per layer"


def test_a_measurement_holds_for_the_functional_call(add, clock):
    add("slow", seconds=4.0, rank=5)
    fast = add("fast", seconds=0.25)
    q = torch.randn(1, 2, 21, 4)
    tune(clock, inputs=lambda: attnzoo.attention(q, q, q))
    fast.runs.clear()
    attnzoo.attention(q, q, q)
    assert fast.runs == [], "only attentions of a model are measured"
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
def test_a_measurement_holds_for_no_other_request(add, change):
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    assert selection.choose_for(attention()).backend.name == "fast"
    assert selection.choose_for(change(attention())).backend.name == "slow"


ENVIRONMENTS = {
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 5),
    "version": lambda patch: patch.setattr(torch, "__version__", "9.9"),
    "processor": lambda patch: patch.setattr(environment, "_cpu_model", lambda: "another"),
    "instructions": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another"),
    "package with kernels": lambda patch: patch.setattr(environment, "_version", lambda package: "9.9"),
}


@pytest.mark.parametrize("change", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_a_measurement_holds_in_no_other_environment(add, monkeypatch, change):
    """The selection follows each change of the environment, and each change back, without a new process."""
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    assert selection.choose_for(attention()).backend.name == "fast"
    with monkeypatch.context() as patch:
        change(patch)
        environment._environment.cache_clear()
        assert selection.choose_for(attention()).backend.name == "slow"
        measured(attention(), {"slow": 1.0, "fast": 2.0})
        assert selection.choose_for(attention()).reason == "measured 1 s; fast 2 s"
    environment._environment.cache_clear()
    assert selection.choose_for(attention()).reason == "measured 1 s; slow 2 s"


def test_a_measurement_holds_for_the_device_of_the_query(add):
    """A device without data stands for a device that this machine lacks."""
    add("slow", rank=5, devices={"cpu", "meta"}), add("fast", devices={"cpu", "meta"})
    elsewhere = attention().with_tensors(tuple(tensor.to("meta") for tensor in attention().tensors()))
    measured(elsewhere, {"slow": 2.0, "fast": 1.0})
    assert selection.choose_for(elsewhere).reason == "measured 1 s; slow 2 s"
    assert selection.choose_for(attention()).backend.name == "slow"


def test_a_measurement_holds_with_or_without_probabilities(add):
    """A fused kernel returns no probabilities, so the time without them says nothing about the time with them."""
    add("slow", rank=5, probabilities=True), add("fast", probabilities=True)
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    assert selection.choose_for(attention()).backend.name == "fast"
    assert selection.choose_for(attention(), probabilities=True).backend.name == "slow"


def test_the_latest_measurement_decides(add):
    add("slow", rank=5), add("fast")
    for fast, name in ((1.0, "fast"), (3.0, "slow"), (1.5, "fast")):
        measured(attention(), {"slow": 2.0, "fast": fast})
        assert selection.choose_for(attention()).backend.name == name
        forget()
        assert selection.choose_for(attention()).backend.name == name, "the file has it, too"


def test_a_measured_backend_that_was_wrong_is_never_selected(add):
    add("slow", rank=5), add("fast", rank=1), add("last")
    measured(attention(), {"slow": "output differs", "fast": "output differs"})
    assert selection.choose_for(attention()).backend.name == "last"
    measured(attention(), {"slow": "output differs", "fast": "output differs", "last": "raised"})
    with pytest.raises(attnzoo.BackendRefusedError, match="output differs") as caught:
        selection.choose_for(attention())
    assert "raised" in str(caught.value)
    assert selection.choose_for(attention(70)).backend.name == "slow", "nothing was measured at this size"


def test_offsets_in_patterns_are_rounded_like_lengths(add):
    def key(pattern):
        return to_plain_data(SegmentRequest(pattern, 2))

    assert key(attnzoo.Causal(offset=17)) == key(attnzoo.Causal(offset=30)) != key(attnzoo.Causal(offset=33))
    assert key(attnzoo.Causal(offset=-1)) != key(attnzoo.Causal(offset=1)) != key(attnzoo.Causal())
    assert key(SortedChunks(8, start=100)) == key(SortedChunks(8, start=128)) != key(SortedChunks(8, start=0))
    assert key(attnzoo.Window(5, 0)) != key(attnzoo.Window(8, 0)), "a window is not a length"


def test_a_measurement_does_not_hold_for_other_code_of_the_same_name(add):
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    add("fast", version="2")
    assert selection.choose_for(attention()).backend.name == "slow", "slow is the only measured backend left"


def test_registering_and_unregistering_change_the_selection(add):
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    assert selection.choose_for(attention()).backend.name == "fast"
    attnzoo.unregister_backend("fast")
    assert selection.choose_for(attention()).reason == "measured 2 s"
    add("top", rank=9)
    assert selection.choose_for(attention()).backend.name == "slow", "a backend without a measurement is not selected"
    assert selection.choose_for(attention(70)).backend.name == "top", "nothing was measured here"
    add("summit", rank=10)
    assert selection.choose_for(attention(70)).backend.name == "summit"


def test_a_request_with_one_supporting_backend_is_measured_in_the_module_only(add, clock):
    only = add("only")
    report = tune(clock)
    assert report == () and len(report.modules) == 1 and str(report).count("whole module") == 1
    only.runs.clear()
    assert took() == attnzoo.Choice(only(), "the only backend that supports this request")


# Deterministic selection


@pytest.mark.parametrize(
    ("variable", "deterministic", "taken"),
    [(None, False, "fast"), (None, True, "slow"), ("priority", False, "slow"), ("priority", True, "slow"),
     ("measured", False, "fast"), ("measured", True, "fast")],
)  # fmt: skip
def test_auto_selects_by_priority_on_request(add, clock, monkeypatch, variable, deterministic, taken):
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
        assert choice.reason.startswith(f"by priority: {why}") and f"slow by priority: {why}" in told
    else:
        assert "auto: fast for forward at" in told


def test_under_torch_compile_auto_selects_by_priority(add, monkeypatch):
    add("slow", rank=5), add("fast")
    measured(attention(), {"slow": 2.0, "fast": 1.0})
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    choice = selection.choose_for(attention())
    assert choice.backend.name == "slow" and "torch.compile" in choice.reason


def test_an_unknown_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv("ATTNZOO_AUTO", "fastest")
    with pytest.raises(attnzoo.InvalidArgumentError, match="ATTNZOO_AUTO: got 'fastest'; allowed: 'measured' or 'pri"):
        selection.choose_for(attention())
    model = gpt_neox()
    for backend in ("auto", {"*.0.*": "auto"}):
        with pytest.raises(attnzoo.InvalidArgumentError, match="ATTNZOO_AUTO: got 'fastest'"):
            attnzoo.patch(model, backend)
    assert not any("forward" in vars(module) for module in model.modules())
    with attnzoo.patch(model, "sdpa"):
        pass  # a backend name does not need the variable


# What handle and explain show


def test_a_handle_shows_the_choices_of_auto(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    model = gpt_neox()
    tune(clock, model)
    handle = attnzoo.patch(model, OURS)
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


def test_a_backend_requested_by_name_is_no_choice(add):
    add("one"), add("two")
    model = gpt_neox()
    with attnzoo.patch(model, "two") as handle:
        model(**neox_inputs())
    assert handle.sites[0].selections == {} and handle.sites[0].ran == "two"


def test_explain_shows_measured_and_unmeasured_sizes(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    model = gpt_neox()
    assert "  auto: otherwise slow by priority: nothing measured yet, see attnzoo tune" in str(attnzoo.explain(model))
    tune(clock, model)
    explanation = attnzoo.explain(model)
    (lines,) = set(explanation.auto.values())
    assert lines == (
        "native for forward at batch <= 1, queries <= 32, keys <= 32: "
        "measured in the module: native 0 us; fast-kernel 1 s",
        "the model's own code by rule elsewhere, dense in sdpa on cpu: decoding, forward, forward+backward",
        "fast for forward at batch <= 1, queries <= 32, keys <= 32: measured 1 s; slow 4 s",
        "slow for other sizes, by priority",
    )
    assert f"auto: {lines[2]}" in " ".join(str(explanation).split())
    assert "auto:" not in str(attnzoo.explain(model, "fast"))
    assert str(attnzoo.explain(model, "auto")) == str(explanation)
    assert "measured 1 s" not in str(attnzoo.explain(gpt_neox().double())), "another dtype is not measured"
    assert "auto: fast" not in str(attnzoo.explain(led())), "other heads are not measured"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 us"), (8.19e-5, "81.9 us"), (0.00127, "1.27 ms"), (0.5, "500 ms"), (12.34, "12.3 s"), (1234.5, "1234 s")],
)
def test_format_seconds(seconds, words):
    assert format_seconds(seconds) == words


def neox_attention(heads=2, dim=16, dtype=torch.float32, device="cpu", pattern=None):
    """Return an attention like those of the tiny GPT-NeoX."""
    q, k, v = torch.ones(3, 1, heads, 21, dim, dtype=dtype, device=device)
    return attnzoo.Attention(q, (attnzoo.Segment(k, v, pattern or attnzoo.Causal(offset=0)),), 0.25)


DISSIMILAR = dict(
    heads=dict(heads=4), head_dim=dict(dim=8), dtype=dict(dtype=torch.float64), device=dict(device="meta"),
    pattern=dict(pattern=attnzoo.Window(3, 0)),
)  # fmt: skip


@pytest.mark.parametrize("changes", [{}, *DISSIMILAR.values()], ids=["similar", *DISSIMILAR])
def test_explain_shows_measurements_of_similar_attentions_only(add, changes):
    add("slow", rank=5), add("fast")
    whole = neox_attention(**changes)
    measurement = Measurement(
        to_plain_data(whole.request()), size_class(whole),
        {name: Outcome(code_of(registry.backend_class(name)), time) for name, time in (("slow", 2.0), ("fast", 1.0))},
        "by hand",
    )  # fmt: skip
    cache.add(environment.environment_of(torch.device("cpu")), [measurement], save=False)
    lines = attnzoo.explain(gpt_neox()).auto["gpt_neox.layers.0.attention"]
    assert any(line.startswith("fast for forward") for line in lines) == (not changes)
    assert lines[-1].removeprefix("otherwise ").startswith("slow")
