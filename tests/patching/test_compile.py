"""``torch.compile`` compiles the code around patched modules, with the same results.

The compiler backend runs the traced graph unchanged, so these tests concern the tracing only.
"""

import copy

import pytest
import torch

import attnzoo
from tests.support.models import FAMILIES, causal_inputs, gpt_neox, longt5


def families(*names):
    return pytest.mark.parametrize("family", [FAMILIES[name] for name in names], ids=str)


def run(model, inputs):
    """Outputs, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(**inputs).logits
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [logits.detach(), *(gradient.clone() for gradient in gradients)]


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@families("gpt_neox", "led")  # an attention function, and a forward
def test_a_patched_model_compiles(family, backend):
    model, inputs = family.build(), [family.inputs(20, "left"), family.inputs(33, "right")]
    with attnzoo.patch(model, backend) as handle:
        expected = [run(model, given) for given in inputs]
        calls = handle.sites[0].calls
        compiled = torch.compile(model, backend="eager")
        outputs = [run(compiled, given) for given in inputs]
        assert handle.sites[0].calls == 2 * calls
    torch.testing.assert_close(outputs, expected)


def test_a_second_model_compiles():
    """Both models run copies of one original function. Compiled code for the first copy must not serve the second."""
    family = FAMILIES["led"]
    for _ in range(2):
        model, inputs = family.build(), family.inputs(20, "left")
        with attnzoo.patch(model, "sdpa"), torch.no_grad():
            expected = model(**inputs).logits
            assert torch.equal(torch.compile(model, backend="eager")(**inputs).logits, expected)


@pytest.mark.parametrize("grad", [False, True])
@families("gpt_neox", "gpt_bigcode-mqa", "longt5-local", "led")
def test_equal_calls_do_not_recompile(family, grad):
    model, given, graphs = family.build(), family.inputs(20, "left"), []
    torch.compiler.reset()
    with attnzoo.patch(model, "sdpa"), torch.set_grad_enabled(grad):
        expected = model(**given).logits
        compiled = torch.compile(model, backend=lambda graph, example: graphs.append(1) or graph)
        counts = []
        for _ in range(3):
            assert torch.equal(compiled(**given).logits, expected)
            counts.append(len(graphs))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("backend", ["sdpa", "native"])
def test_a_compiled_shallow_copy_computes_with_its_own_weights(backend):
    model = gpt_neox()
    module = model.gpt_neox.layers[0].attention
    states = torch.randn(1, 5, model.config.hidden_size)
    rotary = model.gpt_neox.rotary_emb(states, torch.arange(5)[None])
    torch.compiler.reset()
    with attnzoo.patch(model, backend), torch.no_grad():
        twin, dense = copy.copy(module), copy.deepcopy(module.dense)
        twin._modules = {**module._modules, "dense": dense}
        dense.weight.zero_(), dense.bias.zero_()
        compiled = torch.compile(twin, backend="eager")
        for _ in range(2):
            assert compiled(states, None, position_embeddings=rotary)[0].abs().max() == 0.0
        assert module(states, None, position_embeddings=rotary)[0].abs().max() > 0.0


@families("gpt_neox", "gpt_bigcode-mqa", "longt5-local")
def test_native_compiles_to_one_graph_if_the_original_does(family):
    """Calls inside the graph are not counted: counting would break the graph."""
    model, given = family.build(), family.inputs(20, "none")
    with torch.no_grad():
        expected = torch.compile(model, backend="eager", fullgraph=True)(**given).logits
        torch.compiler.reset()
        with attnzoo.patch(model, "native") as handle:
            assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(**given).logits, expected)
            assert not any(site.calls for site in handle.sites)
            model(**given)
            assert all(site.calls for site in handle.sites)


@families("led", "longformer")
def test_a_patched_module_around_attention_is_compiled(family):
    """The encoder is patched for its mask. Everything else in it is compiled as in a patch of its layers alone."""

    def compiled_calls(model):
        counted = []

        def count(graph, example):
            counted.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
            return graph

        torch.compiler.reset()
        torch.compile(model, backend=count)(**family.inputs(24, "left"))
        return sum(counted)

    model, ends = family.build(), ("encoder.layers", "encoder.layer")
    layers = next(module for name, module in model.named_modules() if name.endswith(ends))
    with torch.no_grad():
        with attnzoo.patch(layers, "sdpa"):
            expected = compiled_calls(model)
        with attnzoo.patch(model, {"*encoder.*": "sdpa"}):
            assert compiled_calls(model) == expected


class Logits(torch.nn.Module):
    """A model with tensors as arguments and a tensor as output, as tracers need it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


RECORDERS = {
    "trace": lambda model, inputs: torch.jit.trace(model, tuple(inputs.values()), check_trace=False),
    "export": lambda model, inputs: torch.export.export(model, tuple(inputs.values())).module(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
@pytest.mark.parametrize("build", [gpt_neox, lambda: longt5("LongT5EncoderModel")], ids=["function", "forward"])
def test_tracing_and_exporting_are_refused(build, record):
    model = build()
    wrapped, example, other = Logits(model), causal_inputs(24, "none"), causal_inputs(24, "left")
    with torch.no_grad():
        allowed = r"to trace or export; allowed: .*\"native\", or .*unpatch"
        with attnzoo.patch(model, "eager"), pytest.raises(attnzoo.PatchError, match=allowed):
            record(wrapped, example)
        with attnzoo.patch(model, "native"):
            recorded = record(wrapped, example)
        torch.testing.assert_close(recorded(*other.values()), wrapped(*other.values()))


@pytest.mark.parametrize(("name", "fewest"), [("gpt_neox", 3), ("led", 6)])
def test_modules_between_patched_modules_are_compiled(name, fewest):
    """Layers inside a module that is patched to check masks are compiled, except their attention."""
    model, compiled = FAMILIES[name].build(), []

    def count(graph, example):
        compiled.extend(node for node in graph.graph.nodes if getattr(node.target, "__name__", "") == "linear")
        return graph.forward

    torch.compiler.reset()
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        torch.compile(model, backend=count)(**FAMILIES[name].inputs(24, "none"))
    assert len(compiled) >= fewest
