"""``tune`` runs a model once, and leaves everything as it was."""

import pytest
import torch

import attnzoo
from tests.support.models import gpt_neox, led, led_inputs, reformer
from tests.support.tuning import neox_inputs, tune


def test_tuning_leaves_the_model_and_the_random_streams_as_they_were(add, clock):
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


def test_a_model_that_fails_is_left_unpatched(add, clock):
    add("slow"), add("fast")
    model = gpt_neox()
    with pytest.raises(IndexError):
        tune(clock, model, dict(input_ids=torch.tensor([[10**6]])))
    assert not any("forward" in vars(module) for module in model.modules())


def test_reversible_layers_ask_for_gradients_in_their_backward(add, clock):
    """Reformer's forward runs without gradients and again with them in its backward; buckets are not configured."""
    add("slow"), add("fast")
    model = reformer(num_buckets=None).train()
    found = tune(clock, model, dict(input_ids=torch.arange(3, 67)[None]))
    assert {one.mode for one in found} == {"forward", "forward+backward"}
    assert model.config.num_buckets is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_function_can_run_the_model_in_its_own_way(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    model = gpt_neox()
    prompt = dict(input_ids=torch.arange(3, 15)[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)
    found = attnzoo.tune(model, lambda: model.generate(**prompt), clock=clock)
    assert {one.size.q_len for one in found} == {16, 1}, "the prompt, and then one token at a time"
    with attnzoo.patch(model) as handle:
        model.generate(**prompt)
    assert {choice.backend.name for choice in handle.sites[0].selections} == {"fast"}


def test_it_tunes_for_the_dtype_of_autocast(add, clock):
    add("slow"), add("fast")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = tune(clock)
    assert found.request["dtype"] == "bfloat16"


def test_a_patched_model_is_tuned_too_and_keeps_its_patch(add, clock):
    add("slow", seconds=4.0, rank=5), add("fast")
    model = gpt_neox()
    with attnzoo.patch(model) as handle:
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
def test_bad_arguments(arguments, message):
    with pytest.raises(attnzoo.InvalidArgumentError, match=message):
        attnzoo.tune(**{**dict(model=gpt_neox(), inputs=neox_inputs()), **arguments})


def test_gradients_cannot_be_tuned_in_inference_mode():
    model = gpt_neox()
    with torch.inference_mode(), pytest.raises(attnzoo.InvalidArgumentError, match="gradients: got True inside torch"):
        attnzoo.tune(model, neox_inputs(), gradients=True)
