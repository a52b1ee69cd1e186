"""``tune`` measures the attentions of a model, and changes nothing in the model."""

import pytest
import torch

import attnzoo
from tests.support.models import gpt_neox, led, led_inputs, reformer
from tests.support.tuning import OURS, neox_inputs, tune


def test_tune_leaves_the_model_and_the_random_streams_unchanged(add, clock):
    add("slow"), add("fast")
    model = led(dropout=0.1).train()
    model.led.encoder.eval()
    model.register_buffer("counted", torch.zeros(1))
    model.register_forward_hook(lambda module, *_: (module.counted.add_(1), None)[1])
    parameter = next(model.parameters())
    parameter.grad = torch.full_like(parameter, 0.5)
    grad, random, config = parameter.grad, torch.get_rng_state(), model.config.to_dict()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    assert tune(clock, model, led_inputs(26, "left"))
    assert parameter.grad is grad and bool((grad == 0.5).all())
    assert all(other.grad is None for other in model.parameters() if other is not parameter)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config.to_dict() == config
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any("forward" in vars(module) for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_model_that_fails_stays_unpatched(add, clock):
    add("slow"), add("fast")
    model = gpt_neox()
    with pytest.raises(IndexError):
        tune(clock, model, dict(input_ids=torch.tensor([[10**6]])))
    assert not any("forward" in vars(module) for module in model.modules())


def test_reversible_layers_request_gradients_in_their_backward(add, clock):
    """Reformer's forward runs without gradients, and again with gradients in its backward."""
    add("slow", seconds=2.0, backward=5.0), add("fast", seconds=1.0, backward=7.0)
    model = reformer(num_buckets=None).train()
    report = tune(clock, model, dict(input_ids=torch.arange(3, 67)[None]))
    rankings = {"forward": [(1.0, "fast"), (2.0, "slow")], "forward+backward": [(7.0, "slow"), (8.0, "fast")]}
    assert all(measurement.ranking() == rankings[measurement.mode] for measurement in report), str(report)
    assert {measurement.mode for measurement in report} == {"forward", "forward+backward"}
    assert model.config.num_buckets is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_may_be_a_function_that_runs_the_model(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    model = gpt_neox()
    prompt = dict(input_ids=torch.arange(3, 15)[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    report = attnzoo.tune(model, lambda: model.generate(**prompt), clock=clock)
    assert {measurement.size.q_len for measurement in report} == {16, 1}, "the prompt, then one token per step"
    with attnzoo.patch(model, OURS) as handle:
        model.generate(**prompt)
    assert {choice.backend.name for choice in handle.sites[0].selections} == {"fast"}


def test_tune_uses_the_autocast_dtype(add, clock):
    add("slow"), add("fast")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (measurement,) = tune(clock)
    assert measurement.request["dtype"] == "bfloat16"


def test_patched_model_keeps_its_patch(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    model = gpt_neox()
    with attnzoo.patch(model, OURS) as handle:
        tune(clock, model)
        assert handle.active and handle.sites[0].calls == 0
        with torch.no_grad():
            model(**neox_inputs())
    assert handle.sites[0].ran == "auto: fast"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(model=7), "model: got int; allowed: a torch.nn.Module"),
        (dict(inputs=[1]), "inputs: got list; allowed: a mapping of keyword arguments .* or a function"),
        (dict(inputs=torch.nn.Linear(2, 2)), "inputs: got Linear; allowed: a mapping"),
        (dict(rounds=0), "rounds: got 0; allowed: an integer >= 1"),
        (dict(rounds=2.5), "rounds: got 2.5"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(attnzoo.InvalidArgumentError, match=message):
        attnzoo.tune(**{**dict(model=gpt_neox(), inputs=neox_inputs()), **arguments})


def test_gradients_are_refused_in_inference_mode():
    model = gpt_neox()
    with torch.inference_mode(), pytest.raises(attnzoo.InvalidArgumentError, match="gradients: got True inside torch"):
        attnzoo.tune(model, neox_inputs(), gradients=True)
