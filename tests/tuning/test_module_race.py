"""``tune`` times whole modules with the model's code and with backends, and ``auto`` uses the faster."""

import json

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import attnzoo
from attnzoo.auto.modules import NATIVE, PATCHED
from attnzoo.auto.native import NativeChooser
from attnzoo.auto.selection import AutoBackend
from attnzoo.tuning import module_race, tuner
from attnzoo.tuning.module_race import ModuleCalls
from attnzoo.tuning.recorded_calls import RecordedCall, copied, recording_calls
from tests.support.models import gpt_bigcode, gpt_neox, ids, longt5, longt5_inputs, reformer
from tests.support.tuning import neox_inputs, tune


@pytest.fixture
def native_takes(monkeypatch, clock):
    """A function that lets each call of the model's code advance the clock by some seconds."""
    choose, seconds = NativeChooser.choose, [0.0]

    def advance(self, *call):
        choice = choose(self, *call)
        clock.now += seconds[0] if choice is not None else 0.0
        return choice

    monkeypatch.setattr(NativeChooser, "choose", advance)
    return lambda value: seconds.__setitem__(0, value)


def ran(model, inputs=None, grad=False):
    with attnzoo.patch(model) as handle, torch.set_grad_enabled(grad):
        model(**(inputs or neox_inputs()))
    return handle.sites[0].ran


@pytest.mark.parametrize(("native", "taken"), [(1.0, "auto: native"), (9.0, "auto: fast")])
def test_auto_takes_the_faster_of_both(add, clock, native_takes, native, taken):
    native_takes(native)
    add("slow", seconds=4.0, rank=5), add("fast", seconds=2.0)
    model = gpt_neox()
    (module,) = tune(clock, model).modules
    assert {name: outcome.seconds for name, outcome in module.outcomes.items()} == {NATIVE: native, PATCHED: 2.0}
    assert module.outcomes[PATCHED].kernel == "fast-kernel", "the backend that is fastest in the attention"
    assert (module.mode, module.where) == ("forward", "GPTNeoXAttention, causal, whole module")
    assert ran(model) == taken
    assert ran(gpt_neox(), neox_inputs(70)) == "auto: native", "another size follows the rule"


def test_the_report_shows_both_times(add, clock, native_takes):
    native_takes(3.0)
    add("only", seconds=2.0)
    report = tune(clock)
    lines = [line.split() for line in str(report).splitlines()]
    assert ["auto", "2", "s", "only-kernel"] in lines and ["native", "3", "s", "native"] in lines
    (module,) = json.loads(json.dumps(report.to_dict()))
    assert module["scope"] == "module" and module["fresh"] and module["outcomes"]["native"]["seconds"] == 3.0


def test_training_counts_the_backward(add, clock, native_takes):
    native_takes(3.0)
    add("only", seconds=2.0, backward=2.0)
    model = gpt_neox()
    (inference,) = tune(clock, model).modules
    (training,) = tune(clock, model, gradients=True).modules
    assert (inference.mode, training.mode) == ("forward", "forward+backward")
    assert inference.ranking() == [(2.0, PATCHED), (3.0, NATIVE)]
    assert training.ranking() == [(3.0, NATIVE), (4.0, PATCHED)]
    assert (ran(model), ran(model, grad=True)) == ("auto: only", "auto: native")


def test_decoding_is_measured_by_the_number_of_cached_keys(add, clock, native_takes):
    native_takes(3.0)
    add("only", seconds=2.0)
    model = gpt_neox()
    prompt = dict(input_ids=ids(1, 14), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    report = attnzoo.tune(model, lambda: model.generate(**prompt), clock=clock)
    sizes = {(module.mode, module.size.q_len, module.size.kv_lens) for module in report.modules}
    assert sizes == {("forward", 16, (16,)), ("decoding", 1, (16,)), ("decoding", 1, (32,))}
    with attnzoo.patch(model) as handle:
        model.generate(**prompt)
    assert handle.sites[0].ran == "auto: only"


def test_a_wrong_backend_never_wins(add, clock, native_takes):
    native_takes(100.0)
    add("wrong", seconds=0.1, spoils=lambda output: output * 1.01)
    model = gpt_neox()
    (module,) = tune(clock, model).modules
    assert module.outcomes[PATCHED].wrong and "output: error" in module.outcomes[PATCHED].reason
    assert ran(model) == "auto: native"


def test_a_backend_that_raises_in_the_module_never_wins(add, clock, native_takes, monkeypatch):
    native_takes(100.0)
    add("only")
    model, run = gpt_neox(), module_race._run

    def fails(calls, grad):
        if any(isinstance(module.forward.plan.backend, AutoBackend) and module.forward.plan.backend.native == "never"
               for module, _ in calls):  # fmt: skip
            raise OSError("broken")
        run(calls, grad)

    monkeypatch.setattr(module_race, "_run", fails)
    (module,) = tune(clock, model).modules
    assert module.outcomes[PATCHED].reason == "raised OSError: broken" and module.outcomes[PATCHED].wrong
    assert ran(model) == "auto: native"


def test_a_stored_measurement_is_used_again(add, clock):
    add("only")
    first = tune(clock)
    second = tune(clock)
    assert first.modules == second.modules and not second.fresh and first.fresh
    assert tune(clock, again=True).fresh
    add("only", version="2")
    assert tune(clock).fresh, "other code"


def test_one_module_of_a_kind_is_measured_unless_modules_share_values(add, clock):
    """In LongT5, the first layer computes the bias of all layers. So one run repeats the calls of all layers."""
    add("only")
    model = longt5(num_layers=4)
    calls = ModuleCalls(model)
    with calls.finding(), torch.no_grad(), attnzoo.patch(model, module_race.CONTENDERS[PATCHED]):
        model(**longt5_inputs(16, "none"))
    runs = {group.target.cls.__name__ + group.request["pattern"]: group.runs() for group in calls.groups}
    (local,) = (run for name, run in runs.items() if name.startswith("LongT5LocalAttention"))
    assert [identity[0] for identity in local] == [
        f"encoder.block.{number}.layer.0.LocalSelfAttention" for number in (0, 3, 3, 3)
    ]
    model = gpt_neox()
    calls = ModuleCalls(model)
    with calls.finding(), torch.no_grad(), attnzoo.patch(model, module_race.CONTENDERS[PATCHED]):
        model(**neox_inputs())
    (group,) = calls.groups
    assert len(group.names) == 2 and len(group.runs()) == 1
    assert set(calls.backends().values()) == {module_race.CONTENDERS[NATIVE]}


@pytest.mark.parametrize("gradients", [False, True])
def test_every_module_of_an_encoder_decoder_is_measured(add, clock, gradients):
    add("only")
    model = longt5()
    modules = tune(clock, model, longt5_inputs(16, "left"), gradients=gradients).modules
    assert {module.request["pattern"] for module in modules} == {
        "window 7 + 7, relative bias", "masked, relative bias", "masked (cross)",
    }  # fmt: skip
    assert all(outcome.seconds is not None for module in modules for outcome in module.outcomes.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_original_cannot_compute_is_not_measured(add, clock):
    add("only")
    model = reformer(num_buckets=None)
    modules = tune(clock, model, dict(input_ids=ids(1, 16))).modules
    assert {module.request["module"].rpartition(":")[2] for module in modules} == {"LocalSelfAttention"}
    assert model.config.num_buckets is None
    model = gpt_bigcode(multi_query=False, add_cross_attention=True)
    inputs = dict(
        input_ids=ids(1, 5), encoder_hidden_states=torch.randn(1, 6, 32), encoder_attention_mask=torch.ones(1, 6)
    )
    modules = tune(clock, model, inputs).modules
    assert {module.request["pattern"] for module in modules} == {"causal, multi-head"}


def test_reversible_layers_count_as_training(add, clock):
    add("only")
    modules = tune(clock, reformer().train(), dict(input_ids=ids(1, 16))).modules
    assert {module.mode for module in modules} == {"forward+backward"} and len(modules) == 2


def test_dense_scores_that_need_too_much_memory_do_not_run_the_models_code(add, clock, monkeypatch):
    add("only")
    monkeypatch.setattr(module_race, "DENSE_BYTES", 1)
    assert {module.request["pattern"] for module in tune(clock, longt5(), longt5_inputs(16, "none")).modules} == {
        "window 7 + 7, relative bias"
    }


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), OSError("other")], ids=["memory", "other"])
def test_full_memory_in_the_models_code_is_no_error(add, clock, monkeypatch, error):
    add("slow", seconds=2.0), add("fast")
    run = tuner._run_model

    def fails(model, inputs, gradients):
        if attnzoo.handle(model).forwards[-1].plan.backend == module_race.CONTENDERS[NATIVE]:
            raise error
        run(model, inputs, gradients)

    monkeypatch.setattr(tuner, "_run_model", fails)
    if isinstance(error, OSError):
        with pytest.raises(OSError, match="other"):
            tune(clock)
        return
    report = tune(clock)
    assert len(report) == 1 and report.modules == ()


# Recorded calls


def test_a_copy_of_a_call_shares_nothing_that_a_call_changes():
    source = torch.randn(1, 2, 3, 4, requires_grad=True)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache.self_attention_cache.update(source * 2, source * 3, 0)  # with a history, which deepcopy refuses
    cache.is_updated[0] = True
    call = RecordedCall((source * 2, [torch.ones(2)]), dict(cache=cache, flag=True, nothing=None))
    first, second = call.fresh(), call.fresh()
    for copy in (first, second):
        layer = copy.kwargs["cache"].self_attention_cache.layers[0]
        assert torch.equal(layer.keys, source * 2) and layer.keys.is_leaf and layer.keys.requires_grad
        assert copy.kwargs["cache"].is_updated == {0: True} and copy.kwargs["flag"] is True
        assert copy.args[0].is_leaf and copy.args[0].requires_grad and not copy.args[1][0].requires_grad
    first.kwargs["cache"].self_attention_cache.update(source, source, 0)
    first.args[1][0].zero_()
    assert second.kwargs["cache"].get_seq_length() == call.kwargs["cache"].get_seq_length() == 3
    assert bool(second.args[1][0].all()) and bool(call.args[1][0].all())


def test_leaves_are_hidden_states_and_tensors_with_a_history():
    states, bias, mask = torch.randn(1, 2, 3), torch.randn(2, 5, requires_grad=True), torch.zeros(1, 1, 2, 2)
    call = RecordedCall((states,), dict(bias=bias, mask=mask, ids=torch.arange(3)))
    assert [id(leaf) for leaf in call.leaves()] == [id(states), id(bias)]


def test_calls_are_recorded_by_name_and_number():
    layer = torch.nn.Linear(2, 2)
    with recording_calls({"a": layer}, lambda identity, module, args, kwargs: identity[1] != 1) as calls:
        for value in range(3):
            layer(torch.full((1, 2), float(value)))
    layer(torch.zeros(1, 2))
    assert {identity: call.args[0][0, 0].item() for identity, call in calls.items()} == {("a", 0): 0.0, ("a", 2): 2.0}


def test_a_cycle_in_a_cache_is_copied():
    cache = DynamicCache()
    cache.itself = cache
    assert copied(cache).itself is not cache


def test_copies_of_a_large_call_stay_below_the_limit(monkeypatch):
    cache = DynamicCache()
    states = torch.randn(1, 2, 5, 4)
    cache.update(states, states, 0)
    model = gpt_neox()
    call = RecordedCall((torch.randn(1, 1, 32),), dict(layer_past=cache))
    assert call.nbytes() == 4 * (32 + 2 * 40)  # hidden states, keys and values
    recorded = [("gpt_neox.layers.0.attention", call)]
    monkeypatch.setattr(module_race, "DENSE_BYTES", 3 * call.nbytes())
    for count, prepared in ((2, 2), (50, 3)):
        with module_race._prepared(model, AutoBackend(), recorded, False, count) as steps:
            assert len(steps) == prepared
