"""``torch.compile`` and ``torch.export`` record patched modules, with the same results.

Most tests run the traced graph unchanged (the compiler backend ``eager``), because they concern the tracing.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers
from torch._dynamo.backends.registry import lookup_backend

import attnzoo
from attnzoo.backends.eager import EagerBackend
from tests.support.fake_backends import fake_backend
from tests.support.models import FAMILIES, causal_inputs, gpt_neox, llama, longt5, reformer


def families(*names):
    return pytest.mark.parametrize("family", [FAMILIES[name] for name in names], ids=str)


def run(model, inputs):
    """Outputs, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(**inputs)[0]
    logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [logits.detach(), *(gradient.clone() for gradient in gradients)]


def counting(backend="eager"):
    """Return a compiler backend, and the list to which it appends each graph."""
    graphs, compile_graph = [], lookup_backend(backend)

    def count(graph, example):
        graphs.append(graph)
        return compile_graph(graph, example)

    return count, graphs


@dataclass(frozen=True)
class Whole:
    """A model that compiles to one graph, and how its test runs.

    Attributes:
        build, inputs: as in :class:`Family`.
        lengths: three lengths. The second is of another kind, e.g. no multiple of a block, if one graph serves both.
        compiler: ``"aot_eager"`` also compiles the backward.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int, str], dict]
    lengths: tuple[int, int, int] = (20, 33, 40)
    compiler: str | None = None


WHOLE = {
    "gpt_neox": Whole(gpt_neox, causal_inputs, compiler="aot_eager"),
    "gpt_bigcode-mqa": Whole(FAMILIES["gpt_bigcode-mqa"].build, causal_inputs),
    "llama": Whole(llama, causal_inputs),
    "longt5-local": Whole(partial(longt5, "LongT5EncoderModel"), causal_inputs, (24, 40, 56)),
    "longt5-tglobal": Whole(
        partial(longt5, "LongT5EncoderModel", "transient-global"), causal_inputs, (24, 40, 56), "aot_eager"
    ),
    "reformer-local": Whole(partial(reformer, attn_layers=["local"]), causal_inputs, (24, 40, 56)),
    "pegasus_x": Whole(FAMILIES["pegasus_x"].build, FAMILIES["pegasus_x"].inputs, (24, 40, 56)),
}


@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE)
def test_a_patched_model_is_one_graph_for_all_lengths(whole):
    """One graph per compilation, and at most two compilations: one for a length, one for all lengths."""
    model, sides = whole.build(), ("none", "left", "right")
    inputs = [whole.inputs(length, side) for length, side in zip(whole.lengths, sides, strict=True)]
    compile_graph, graphs = counting(whole.compiler or "eager")
    torch.compiler.reset()
    trains = whole.compiler is not None
    with attnzoo.patch(model, "sdpa") as handle, torch.set_grad_enabled(trains):
        evaluate = run if trains else lambda model, given: [model(**given)[0]]
        expected = [evaluate(model, given) for given in inputs]
        calls = [site.calls for site in handle.sites]
        compiled = torch.compile(model, backend=compile_graph, fullgraph=True)
        outputs = [evaluate(compiled, given) for given in inputs]
        assert [site.calls for site in handle.sites] == [2 * count for count in calls]
        assert all("unknown" not in site.kernel for site in handle.sites)
    assert len(graphs) <= 2
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt_bigcode-mqa", "longt5-local"])
def test_a_static_cache_gives_the_same_tokens(name):
    """``generate`` compiles the forward of a decoding step."""
    family = FAMILIES[name]
    model, prompt = family.build(), family.prompt("left")
    arguments = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = model.generate(**prompt, **arguments)
    compile_graph, graphs = counting()
    config = transformers.CompileConfig(fullgraph=True, backend=compile_graph, mode=None)
    config._compile_all_devices = True  # by default, transformers compiles on accelerators only
    torch.compiler.reset()
    with attnzoo.patch(model, "sdpa") as handle:
        tokens = model.generate(**prompt, **arguments, cache_implementation="static", compile_config=config)
        assert all(site.calls for site in handle.sites)
    assert torch.equal(tokens, expected)
    assert len(graphs) == 1


@families("gpt_neox")
def test_auto_compiles(family):
    """``auto`` decides for each call, so its modules run between graphs."""
    model, inputs = family.build(), family.inputs(20, "left")
    with attnzoo.patch(model, "auto") as handle, torch.no_grad():
        expected = model(**inputs).logits
        calls = handle.sites[0].calls
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, expected)
        assert handle.sites[0].calls == 2 * calls


def test_a_model_with_global_tokens_compiles_around_its_encoder():
    """The original breaks the graph too: it branches on whether there are global tokens. Equal calls compile once."""
    family = FAMILIES["led"]
    model, given = family.build(), family.inputs(20, "left")
    compile_graph, graphs = counting()
    torch.compiler.reset()
    with attnzoo.patch(model, "sdpa") as handle:
        expected = run(model, given)
        calls = [site.calls for site in handle.sites]
        compiled = torch.compile(model, backend=compile_graph)
        counts = []
        for _ in range(2):
            torch.testing.assert_close(run(compiled, given), expected)
            counts.append(len(graphs))
        assert [site.calls for site in handle.sites] == [3 * count for count in calls]
    assert counts[0] == counts[1]


def test_a_second_model_compiles():
    """Both models run copies of one original function. Compiled code for the first copy must not serve the second."""
    for build in (gpt_neox, partial(gpt_neox, num_hidden_layers=1)):
        model, inputs = build(), causal_inputs(20, "left")
        with attnzoo.patch(model, "sdpa"), torch.no_grad():
            expected = model(**inputs).logits
            assert torch.equal(torch.compile(model, backend="eager")(**inputs).logits, expected)


def test_requested_weights_are_no_part_of_a_graph_made_without_them():
    model = gpt_neox(attn_implementation="eager")
    with attnzoo.patch(model, "eager"), torch.no_grad():
        attention = model.gpt_neox.layers[0].attention
        states, rotary = torch.randn(1, 5, model.config.hidden_size), torch.zeros(2, 1, 5, 4).unbind()
        compiled = torch.compile(attention, backend="eager")
        assert compiled(states, None, position_embeddings=rotary)[1] is None
        model.config.output_attentions = True
        weights = compiled(states, None, position_embeddings=rotary)[1]
    assert weights is not None and weights.shape[-2:] == (5, 5)


def test_a_backend_without_windows_computes_the_dense_mask_that_a_graph_contains(add_backend):
    patterns = EagerBackend.capabilities.patterns - {attnzoo.Window, attnzoo.Causal}
    add_backend("dense-only", patterns=patterns)
    model, inputs = llama(), causal_inputs(12, "none")
    expected = model(**inputs).logits
    with attnzoo.patch(model, "dense-only", fallback="native") as handle, torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(site.calls + site.fallbacks for site in handle.sites)


def test_a_refused_call_runs_uncompiled_and_raises():
    """The refusal comes before the call, as without a compiler."""
    model, inputs = gpt_neox(), causal_inputs(12, "left")
    attnzoo.register_backend(fake_backend("no-gradients", grad=False))
    torch.compiler.reset()
    try:
        with attnzoo.patch(model, "no-gradients"):
            compiled = torch.compile(model, backend="eager")
            with torch.no_grad():
                compiled(**inputs)
            with pytest.raises(attnzoo.BackendRefusedError, match="grad: got True"):
                compiled(**inputs)
        with attnzoo.patch(model, "no-gradients", fallback="native") as handle:
            compiled(**inputs)
            assert all(site.fallbacks == 1 for site in handle.sites)
    finally:
        attnzoo.unregister_backend("no-gradients")


@pytest.mark.slow
def test_inductor_compiles_a_patched_model():
    model, inputs = gpt_neox(), [causal_inputs(length, "left") for length in (20, 33)]
    torch.compiler.reset()
    with attnzoo.patch(model, "sdpa") as handle:
        expected = [run(model, given) for given in inputs]
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        outputs = [run(compiled, given) for given in inputs]
        assert all(site.calls == 4 for site in handle.sites)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


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


@families("gpt_neox", "gpt_bigcode-mqa")
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


@families("led")
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
        cache = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **cache)[0]


def trace(model, inputs):
    return torch.jit.trace(model, tuple(inputs.values()), check_trace=False)


def export(model, inputs):
    return torch.export.export(model, tuple(inputs.values())).module()


EXPORTED = {
    "gpt_neox": gpt_neox,
    "gpt_bigcode-mqa": FAMILIES["gpt_bigcode-mqa"].build,
    "llama": llama,
    "longt5-local": partial(longt5, "LongT5EncoderModel"),
    "longt5-tglobal": partial(longt5, "LongT5EncoderModel", "transient-global"),
    "reformer-local": partial(reformer, attn_layers=["local"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", EXPORTED.values(), ids=EXPORTED)
def test_an_exported_model_computes_the_same_without_its_patch(build):
    """The program contains masks as tensors, so it is right for other masks too."""
    model = build()
    wrapped, example, other = Logits(model), causal_inputs(24, "none"), causal_inputs(24, "left")
    with torch.no_grad():
        with attnzoo.patch(model, "sdpa"):
            program = export(wrapped, example)
            expected = wrapped(*other.values())
        torch.testing.assert_close(program(*other.values()), expected)
        assert "attnzoo.attend" in program.code


@dataclass(frozen=True)
class WithOption(fake_backend("with-option")):
    """An exact backend whose name alone does not define it."""

    size: int = 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "options"), [("auto", {}), ("blocked-local", {"window": 8}), ("with-option", {})])
def test_a_backend_that_its_name_does_not_define_is_not_exported(backend, options):
    model = gpt_neox()
    allowed = r"to trace or export; allowed: .*\"native\", or .*unpatch"
    attnzoo.register_backend(WithOption)
    try:
        refused = pytest.raises(attnzoo.PatchError, match=allowed)
        with torch.no_grad(), attnzoo.patch(model, backend, **options), refused:
            export(Logits(model), causal_inputs(24, "none"))
    finally:
        attnzoo.unregister_backend("with-option")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("record", [trace, export])
def test_a_forward_that_reads_values_is_not_recorded(record):
    model = FAMILIES["longformer"].build()
    wrapped, example = Logits(model), causal_inputs(24, "none")
    with torch.no_grad(), attnzoo.patch(model, "sdpa"), pytest.raises(attnzoo.PatchError, match="to trace or export"):
        record(wrapped, example)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [gpt_neox, lambda: longt5("LongT5EncoderModel")], ids=["function", "forward"])
def test_tracing_is_refused_except_for_native(build):
    model = build()
    wrapped, example, other = Logits(model), causal_inputs(24, "none"), causal_inputs(24, "left")
    with torch.no_grad():
        with attnzoo.patch(model, "eager"), pytest.raises(attnzoo.PatchError, match="to trace or export"):
            trace(wrapped, example)
        with attnzoo.patch(model, "native"):
            recorded = trace(wrapped, example)
        torch.testing.assert_close(recorded(*other.values()), wrapped(*other.values()))


def test_nothing_inside_an_untraceable_attention_module_is_compiled():
    """Otherwise the compiler would compile adapters and backends frame by frame, again for each form of attention."""
    model, inputs, compiling = gpt_neox(), causal_inputs(20, "left"), []
    torch.compiler.reset()
    with attnzoo.patch(model, "blocked-local", window=5) as handle, torch.no_grad():
        handle.sites[0].observer = lambda *_: compiling.append(torch.compiler.is_compiling())
        torch.compile(model, backend="eager")(**inputs)
    assert compiling == [False]


def test_modules_between_patched_modules_are_compiled():
    """A module patched to check masks attends nothing: its layers are compiled, except their attention."""
    model, compiled = FAMILIES["led"].build(), []

    def count(graph, example):
        compiled.extend(node for node in graph.graph.nodes if getattr(node.target, "__name__", "") == "linear")
        return graph.forward

    torch.compiler.reset()
    with attnzoo.patch(model, "sdpa"), torch.no_grad():
        torch.compile(model, backend=count)(**FAMILIES["led"].inputs(24, "none"))
    assert len(compiled) >= 6
