"""``auto`` decides for each call whether a module runs the model's code, and shows the reason."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, StaticCache

import attnzoo
from attnzoo.auto import cache, rule
from attnzoo.auto.calls import DECODING, FORWARD, TRAINING, ModuleCall, describe_call
from attnzoo.auto.environment import code_of, environment_of
from attnzoo.auto.measurements import Measurement, Outcome
from attnzoo.auto.modules import MARGIN, codes_of, request_of
from attnzoo.backends.sdpa.backend import SdpaBackend
from attnzoo.patching.sites import find_sites
from attnzoo.registry import Registry, registry
from tests.support.models import gpt_bigcode, gpt_neox, ids, led, led_inputs, longt5, longt5_inputs, reformer
from tests.support.tuning import neox_inputs


@pytest.fixture(autouse=True)
def real_backends(own_cache):
    with registry.replaced_by(Registry()):
        yield


def site_of(model, inputs, grad=False, **changes):
    with attnzoo.patch(model, **changes) as handle, torch.set_grad_enabled(grad):
        model(**inputs)
    return handle.sites[0]


def first_point(model):
    target = next(target for target in find_sites(model) if target.point.attends)
    return target.point, target.module


def measured(model, size, native, patched, mode=FORWARD, code=None):
    """Store a measurement of the first site of a model: seconds, or the reason why there is no time."""
    point, module = first_point(model)
    call = ModuleCall(mode, *size, "cpu")
    codes = {"native": code_of(type(module)), "auto": codes_of([SdpaBackend()]) if code is None else code}
    outcomes = {
        name: Outcome(codes[name], None, reason=value) if isinstance(value, str) else Outcome(codes[name], value)
        for name, value in (("native", native), ("auto", patched))
    }
    measurement = Measurement(request_of(point, module, call), call.size, outcomes, "by hand")
    cache.add(environment_of(torch.device("cpu")), [measurement], save=True)


# What is decided


def test_by_rule_a_short_input_runs_the_models_code():
    site = site_of(gpt_neox(), neox_inputs())
    assert (site.kernel, site.calls, site.ran) == ("native", 1, "auto: native")
    (choice,) = site.selections
    assert choice.reason == "by rule: forward of dense in sdpa on cpu; to measure, run attnzoo tune"


def test_from_a_limit_on_a_backend_runs(ours_everywhere):
    site = site_of(gpt_neox(), neox_inputs())
    assert "native" not in site.kernel and site.ran == "auto: sdpa"


@pytest.mark.parametrize(
    ("native", "patched", "ran"),
    [(2.0, 1.0, "sdpa"), (1.0, 2.0, "native"), (1.0, 0.98, "native"), (1.0, MARGIN, "sdpa"),
     (1.0, "output: error", "native"), ("raised OutOfMemoryError", 5.0, "sdpa")],
)  # fmt: skip
def test_a_measurement_of_the_module_decides(native, patched, ran):
    """The model's code also runs if the times differ by less than noise, or if the backend was wrong."""
    model = gpt_neox()
    measured(model, (1, 21, 21), native, patched)
    site = site_of(model, neox_inputs(21))
    assert site.ran == f"auto: {ran}"
    if ran == "native":
        (choice,) = site.selections
        assert choice.reason.startswith("measured in the module: native 1 s; ")
    assert site_of(model, neox_inputs(33)).ran == "auto: native", "another size follows the rule"


def test_dropout_in_training_runs_the_models_code(ours_everywhere):
    """The decision follows the dropout of the module, which may change between two calls."""
    model, inputs = gpt_neox(attention_dropout=0.1), neox_inputs()
    assert site_of(model.eval(), inputs, grad=True).ran == "auto: sdpa"
    with attnzoo.patch(model.train()) as handle:
        model(**inputs)
        for layer in model.gpt_neox.layers:
            layer.attention.attention_dropout = 0.0
        model(**inputs)
    assert handle.sites[0].kernels == {"native": 1, "flash": 1}
    reason = next(iter(handle.sites[0].selections)).reason
    assert reason.startswith("by rule: forward+backward of dense in sdpa with dropout on cpu; ")


def test_a_measurement_of_other_code_is_ignored(ours_everywhere):
    model = gpt_neox()
    measured(model, (1, 21, 21), 1.0, 2.0, code="some.package:OldBackend 0.1")
    assert site_of(model, neox_inputs()).ran == "auto: sdpa"
    measured(model, (1, 21, 21), 1.0, 2.0)
    assert site_of(model, neox_inputs()).ran == "auto: native"


def test_a_new_measurement_changes_the_next_call():
    model = gpt_neox()
    with attnzoo.patch(model) as handle, torch.no_grad():
        model(**neox_inputs())
        measured(copy.deepcopy(gpt_neox()), (1, 21, 21), 2.0, 1.0)
        model(**neox_inputs())
        cache.clear()
        model(**neox_inputs())
    assert handle.sites[0].kernels == {"native": 2, "flash": 1}


@pytest.mark.parametrize(
    ("variable", "deterministic", "ran"),
    [("priority", False, "sdpa"), ("priority", True, "sdpa"), (None, True, "native"), ("measured", True, "sdpa"),
     ("measured", False, "sdpa"), (None, False, "sdpa")],
)  # fmt: skip
def test_priority_never_runs_the_models_code(monkeypatch, variable, deterministic, ran):
    """With deterministic algorithms, ``auto`` ignores measurements and follows the rule."""
    model = gpt_neox()
    measured(model, (1, 21, 21), 2.0, 1.0)
    if variable is not None:
        monkeypatch.setenv("ATTNZOO_AUTO", variable)
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert site_of(model, neox_inputs()).ran == f"auto: {ran}"
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_mode_of_a_call():
    """Modules in training mode always count as training, because checkpointing runs them without gradients first."""
    model = gpt_neox()
    point, module = first_point(model)
    states, filled = torch.randn(2, 1, 32), DynamicCache()
    filled.update(torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16), 0)

    def mode(states=states, grad=False, training=False, **kwargs):
        with torch.set_grad_enabled(grad):
            return describe_call(point, module.train(training), states, kwargs)

    assert mode(layer_past=filled) == (DECODING, 2, 1, 16, "cpu")
    assert mode(layer_past=DynamicCache())[:1] == (DECODING,)
    assert mode() == (FORWARD, 2, 1, 1, "cpu")
    assert mode(states.expand(2, 5, 32), layer_past=filled) == (FORWARD, 2, 5, 16, "cpu"), "a prompt in parts"
    for changes in (dict(grad=True), dict(training=True), dict(grad=True, training=True)):
        assert mode(layer_past=filled, **changes).mode == TRAINING


def test_a_static_cache_counts_as_full():
    model = gpt_neox()
    point, module = first_point(model)
    static = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(input_ids=ids(1, 3), past_key_values=static)
        assert describe_call(point, module.eval(), torch.randn(1, 1, 32), dict(layer_past=static)).kv_len == 64


# Where the model's code must not run


def test_wrong_code_never_runs():
    model = gpt_bigcode(multi_query=False, add_cross_attention=True)
    states, mask = torch.randn(1, 6, 32), torch.ones(1, 6)
    with attnzoo.patch(model) as handle, torch.no_grad():
        model(input_ids=ids(1, 5), encoder_hidden_states=states, encoder_attention_mask=mask)
    ran = {site.pattern: site.ran for site in handle.sites}
    assert ran == {"causal, multi-head": "auto: native", "cross, key padding (repaired)": "auto: sdpa"}
    assert any("never native: transformers' cross" in " ".join(lines) for lines in attnzoo.explain(model).auto.values())


def test_a_requested_backend_never_runs_the_models_code():
    for backend in ("sdpa", "eager", {"*.0.*": "sdpa", "*": "eager"}):
        assert "native" not in site_of(gpt_neox(), neox_inputs(), backend=backend).kernel


def test_probabilities_are_computed_although_the_models_code_would_drop_them():
    model = gpt_neox()
    with attnzoo.patch(model) as handle, torch.no_grad():
        weights = model(**neox_inputs(), output_attentions=True).attentions
    assert weights[0].shape == (1, 2, 21, 21) and handle.sites[0].ran == "auto: eager"


def test_the_number_of_buckets_is_never_written_into_the_config():
    model = reformer(num_buckets=None)
    with attnzoo.patch(model) as handle, torch.no_grad():
        model(input_ids=ids(1, 16))
    assert model.config.num_buckets is None
    assert {site.cls: site.ran for site in handle.sites} == {
        "LocalSelfAttention": "auto: native", "LSHSelfAttention": "auto: sdpa",
    }  # fmt: skip


def test_hooks_of_projections_run_in_cached_decoding():
    """The original would ignore the hooks, because it multiplies by the weights of the projections."""
    model, called = reformer(), []
    model.reformer.encoder.layers[1].attention.self_attention.value.register_forward_hook(
        lambda *args: called.append(1)
    )
    with attnzoo.patch(model) as handle, torch.no_grad():
        model.generate(ids(1, 16), max_new_tokens=3, do_sample=False)
    assert handle.sites[1].kernels["native"] == 1, "the prompt"
    assert len(called) == 3 and handle.sites[1].calls == 3


def test_a_length_that_the_original_rejects_is_computed():
    model = led()
    layer = model.led.encoder.layers[0].self_attn.longformer_self_attn
    states, flags = torch.randn(1, 13, 32), torch.zeros(1, 13, dtype=torch.bool)
    arguments = dict(
        hidden_states=states, attention_mask=torch.zeros(1, 13), is_index_masked=flags, is_index_global_attn=flags,
        is_global_attn=False,
    )  # fmt: skip
    with attnzoo.patch(model) as handle, torch.no_grad():
        assert layer(**arguments)[0].shape == states.shape
    assert handle.sites[0].ran == "auto: sdpa"
    with pytest.raises(AssertionError):
        layer(**arguments)


@pytest.mark.parametrize(("size", "dtype", "native"), [(4, torch.float32, True), (6, torch.float32, False),
                                                       (4, torch.bfloat16, False)])  # fmt: skip
def test_global_blocks_that_the_original_rounds_wrong_are_computed(size, dtype, native):
    model = longt5(kind="transient-global", global_block_size=size)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        site = site_of(model, longt5_inputs(16, "none"))
    finally:
        torch.set_default_dtype(before)
    assert site.ran == ("auto: native" if native else "auto: sdpa")


def test_refusals_stay_errors_and_name_every_reason():
    model = gpt_neox()
    with attnzoo.patch(model), pytest.raises(attnzoo.KeywordRefusedError, match="block_table"):
        model(**neox_inputs(), block_table=1)
    with attnzoo.patch(model, "sdpa"), pytest.raises(attnzoo.BackendRefusedError, match="attention probabilities"):
        model(**neox_inputs(), output_attentions=True)
    with attnzoo.patch(model, fallback="native") as handle, torch.no_grad():
        model(**neox_inputs(), block_table=1)
        model(**neox_inputs())
    assert (handle.sites[0].fallbacks, handle.sites[0].kernels["native"]) == (1, 1), "counted separately"


def test_a_transform_runs_a_backend():
    model = gpt_neox()
    embeds = torch.randn(1, 5, 32)
    with attnzoo.patch(model) as handle:
        torch.func.grad(lambda x: model(inputs_embeds=x, use_cache=False).logits.sum())(embeds)
    assert handle.sites[0].ran == "auto: sdpa"


# Around the decision


def test_the_models_code_returns_the_models_values_bit_for_bit():
    model, inputs = led(), led_inputs(24, "left")
    with torch.no_grad():
        expected = model(**inputs).logits
        with attnzoo.patch(model) as handle:
            got = model(**inputs).logits
    assert torch.equal(got, expected) and {site.kernel for site in handle.sites} == {"native"}


def test_copies_decide_and_count_separately(ours_everywhere, monkeypatch):
    model = gpt_neox()
    handle = attnzoo.patch(model)
    twin = copy.deepcopy(model)
    shallow = copy.copy(model.gpt_neox.layers[0].attention)
    with torch.no_grad():
        model(**neox_inputs())
        monkeypatch.setattr(rule, "LIMITS", {})
        twin.double()(**neox_inputs())
        states = torch.randn(1, 3, 32)
        embeddings = (torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
        shallow(states, attention_mask=None, position_embeddings=embeddings)
    assert handle.sites[0].kernels == {"flash": 1, "native": 1}, "a shallow copy counts at the site of its original"
    assert attnzoo.handle(twin).sites[0].kernels == {"native": 1}
    attnzoo.unpatch(twin)


def test_threads_decide_independently(ours_everywhere):
    model, errors = gpt_neox(), []
    lengths = [5, 9, 17, 33]
    with torch.no_grad():
        expected = {length: model(**neox_inputs(length)).logits for length in lengths}

    def run(length):
        try:
            with torch.no_grad():
                for _ in range(5):
                    torch.testing.assert_close(model(**neox_inputs(length)).logits, expected[length])
        except Exception as error:
            errors.append(error)

    with attnzoo.patch(model) as handle:
        threads = [threading.Thread(target=run, args=(length,)) for length in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and handle.sites[0].calls == 20


def test_many_lengths_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("attnzoo.auto.native._MOST_DECISIONS", 3)
    model = gpt_neox()
    with attnzoo.patch(model) as handle, torch.no_grad():
        for length in range(1, 9):
            model(**neox_inputs(length))
        (chooser, *_) = (forward._chooser for forward in handle.forwards if forward.point.attends)
        assert len(chooser._decisions) <= 3
    assert handle.sites[0].kernels == {"native": 8}


def test_many_lengths_give_few_reasons():
    model = gpt_neox()
    model.set_attn_implementation("eager")
    with attnzoo.patch(model) as handle, torch.no_grad():
        for length in range(2, 40):
            model(**neox_inputs(length))
    assert handle.sites[0].kernels == {"native": 38}
    assert len(handle.sites[0].selections) <= 10


def test_a_change_of_the_models_attention_function_changes_the_decision(monkeypatch):
    monkeypatch.setattr(rule, "LIMITS", {("dense in eager", "cpu", FORWARD): rule.Limit(0, 0)})
    model = gpt_neox()
    model.set_attn_implementation("eager")
    with attnzoo.patch(model) as handle, torch.no_grad():
        model(**neox_inputs())
        model.set_attn_implementation("sdpa")
        model(**neox_inputs())
    assert handle.sites[0].kernels["native"] == 1 and handle.sites[0].calls == 2


def test_a_call_without_described_states_runs_the_models_code(ours_everywhere):
    model = gpt_neox()
    module, states = model.gpt_neox.layers[0].attention, torch.randn(1, 5, model.config.hidden_size)
    rotary = model.gpt_neox.rotary_emb(states, torch.arange(5)[None])
    with attnzoo.patch(model) as handle, torch.no_grad():
        chooser = next(forward._chooser for forward in handle.forwards if forward.point.attends)
        keywords = dict(attention_mask=None, position_embeddings=rotary)
        assert chooser.choose(module, (states,), keywords) is None, "the rule selects a backend"
        choice = chooser.choose(module, (states[0],), keywords)
    assert choice.backend.name == "native" and "no hidden states (batch, length, embed)" in choice.reason


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_is_another_measurement(autocast):
    model = gpt_neox()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        measured(model, (1, 21, 21), 2.0, 1.0)
    assert site_of(model, neox_inputs()).ran == ("auto: native" if autocast else "auto: sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        assert site_of(model, neox_inputs()).ran == ("auto: sdpa" if autocast else "auto: native")


def test_checkpointed_layers_decide_the_same_in_both_runs(monkeypatch):
    """If ``auto`` decided otherwise in the second run, dropout would drop other weights."""
    modes = []
    original = rule.native_because
    monkeypatch.setattr(
        "attnzoo.auto.native.native_because", lambda *args: (modes.append(args[2].mode), original(*args))[1]
    )
    model = gpt_neox(attention_dropout=0.5).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with attnzoo.patch(model) as handle:
        model(**neox_inputs()).logits.sum().backward()
    assert set(modes) == {TRAINING} and handle.sites[0].kernels == {"native": 2}


def test_verify_checks_the_models_code_where_auto_ran_it():
    report = attnzoo.verify(gpt_neox(), {"input_ids": ids(1, 8)}, backend="auto", fast=True)
    assert report.ok and {site.kernel for site in report.sites} == {"native"}
