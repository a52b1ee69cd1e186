"""Runs of a whole model for ``verify``: copied inputs, rows of real tokens, and forwards with and without a graph."""

import pytest
import torch
from torch import nn

from attnzoo.errors import InvalidArgumentError
from attnzoo.verification.model_runs import GRADIENT, WITH_GRAPH, cast, real_tokens, rows_of_modules, run_model

SOURCE = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])  # the second sample is only padding
TARGET = torch.tensor([[0, 1, 1], [1, 1, 1]])
IDS = {"input_ids": torch.ones(2, 5, dtype=torch.long), "decoder_input_ids": torch.ones(2, 3, dtype=torch.long)}


def states(length, *more, batch=2):
    return torch.zeros(batch, length, *more)


# Arguments


def test_cast_converts_floating_point_tensors_everywhere():
    given = {"x": torch.ones(2), "list": [torch.ones(2), (torch.ones(1, dtype=torch.long),)], "flag": True, "n": None}
    got = cast(given, torch.float64)
    assert got["x"].dtype == got["list"][0].dtype == torch.float64
    assert got["list"][1][0].dtype == torch.long and type(got["list"][1]) is tuple
    assert got["flag"] is True and got["n"] is None


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=str)
def test_cast_copies_every_tensor(dtype):
    given = {"x": torch.ones(2, requires_grad=True), "ids": torch.ones(2, dtype=torch.long)}
    got = cast(given, dtype)
    for name, tensor in given.items():
        assert torch.equal(got[name], tensor.detach()) and not got[name].requires_grad
        assert got[name].data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_lowest_number_of_a_mask_stays_the_lowest(dtype):
    mask = torch.tensor([0.0, torch.finfo(torch.float32).min, -3.0])
    assert cast(mask, dtype).tolist() == [0.0, torch.finfo(dtype).min, -3.0]


# Rows of real tokens


def test_encoder_rows_have_the_mask_of_the_source():
    inputs = {**IDS, "attention_mask": SOURCE, "decoder_attention_mask": TARGET}
    assert torch.equal(real_tokens(inputs, False, states(5, 4)), SOURCE.bool())


def test_decoder_rows_without_any_source_token_are_not_real():
    both = {**IDS, "attention_mask": SOURCE, "decoder_attention_mask": TARGET}
    assert real_tokens(both, True, states(3, 4)).tolist() == [[False, True, True], [False] * 3]
    source = {**IDS, "attention_mask": SOURCE}
    assert real_tokens(source, True, states(3, 4)).tolist() == [[True] * 3, [False] * 3]
    assert real_tokens(source, True, states(3)).tolist() == [[True] * 3, [False] * 3], "an output without channels"
    target = {**IDS, "decoder_attention_mask": TARGET}
    assert torch.equal(real_tokens(target, True, states(3, 4)), TARGET.bool())


@pytest.mark.parametrize(
    ("inputs", "decoder", "output"),
    [
        ({}, False, states(5, 4)),
        ({}, True, states(3, 4)),
        ({"attention_mask": SOURCE}, False, states(4, 4)),
        ({"attention_mask": SOURCE}, True, torch.zeros(2)),
        ({"attention_mask": SOURCE[:, None]}, False, states(5, 4)),
    ],
    ids=["no mask", "no mask of the decoder", "another length", "one number per sample", "a mask of another rank"],
)
def test_without_a_mask_of_its_rows_all_rows_of_an_output_are_real(inputs, decoder, output):
    assert real_tokens({**IDS, **inputs}, decoder, output) is None


class EncoderDecoder(nn.Module):
    """A model with the names of transformers."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleDict({"attention": nn.Identity()}) for _ in range(2))

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
        raise NotImplementedError


def test_modules_of_the_decoder_have_the_rows_of_the_target():
    inputs = {**IDS, "attention_mask": SOURCE, "decoder_attention_mask": TARGET}
    rows = rows_of_modules(nn.ModuleDict({"model": EncoderDecoder()}), inputs)
    assert torch.equal(rows("model.decoder.attention", states(5, 4)), SOURCE.bool()), "forward takes no decoder ids"
    rows = rows_of_modules(EncoderDecoder(), inputs)
    assert rows("decoder.attention", states(3, 4)).tolist() == [[False, True, True], [False] * 3]
    assert torch.equal(rows("encoder.attention", states(5, 4)), SOURCE.bool())
    assert torch.equal(rows("decoder_like.attention", states(5, 4)), SOURCE.bool())


@pytest.mark.parametrize("ids", ["input_ids", "inputs_embeds"])
def test_rows_after_the_inputs_are_padding(ids):
    inputs = {ids: torch.ones(2, 3, 4) if ids == "inputs_embeds" else torch.ones(2, 3, dtype=torch.long)}
    rows = rows_of_modules(nn.Identity(), inputs)
    assert rows("attention", states(3, 4)) is None
    assert rows("attention", states(5, 4)).tolist() == [[True, True, True, False, False]] * 2
    masked = rows_of_modules(nn.Identity(), {**inputs, "attention_mask": TARGET})
    assert masked("attention", states(5, 4))[0].tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("output", [torch.zeros(2), states(2, 4), states(3, 4, batch=4)], ids=["1-D", "short", "batch"])
def test_outputs_without_a_row_for_each_token_are_compared_as_a_whole(output):
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": TARGET}
    assert rows_of_modules(nn.Identity(), inputs)("attention", output) is None
    assert rows_of_modules(nn.Identity(), {"attention_mask": TARGET})("attention", states(3, 4)) is None


# Forwards


class Counting(nn.Module):
    """A linear model that records whether each forward builds a graph. Each forward draws a random number."""

    def __init__(self, trains=True):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=trains)
        self.graphs = []

    def forward(self, x):
        self.graphs.append(torch.is_grad_enabled())
        return {"y": x * self.weight + torch.rand(()), "ids": x.long()}


Y, GRAPH = "y", f"y{WITH_GRAPH}"


@pytest.mark.parametrize(
    ("options", "graphs", "names"),
    [
        (dict(gradients=False), [False], [Y]),
        (dict(gradients=False, inference=True), [False], [Y]),
        (dict(gradients=False, graph=True), [False, True], [Y]),
        (dict(gradients=True), [True], [Y, GRADIENT]),
        (dict(gradients=True, inference=True), [False, True], [Y, GRAPH, GRADIENT]),
        (dict(gradients=True, graph=True), [True], [Y, GRADIENT]),
    ],
    ids=str,
)
def test_forwards_with_and_without_a_graph(options, graphs, names):
    model = Counting()
    results = run_model(model, {"x": torch.tensor([[1.0, 3.0]])}, seed=3, **options)
    assert model.graphs == graphs and results.keys() == set(names)
    torch.manual_seed(3)
    expected = torch.tensor([[1.0, 6.0]]) + torch.rand(())
    for name in set(names) - {GRADIENT}:
        assert torch.equal(results[name], expected), "every forward starts with the seed"
    if GRADIENT in names:
        weights = torch.randn(1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        assert torch.allclose(results[GRADIENT], (weights * torch.tensor([[1.0, 3.0]]))[0].float())


def test_a_frozen_model_has_no_gradient():
    model = Counting(trains=False)
    assert run_model(model, {"x": torch.ones(1, 2)}, gradients=True, seed=0).keys() == {Y}
    assert model.graphs == [False]


# Outputs


class Returning(nn.Module):
    """A linear model that returns its output, and the number of its tokens, in any container."""

    def __init__(self, container):
        super().__init__()
        self.weight, self.container = nn.Parameter(torch.tensor([1.0, 2.0])), container

    def forward(self, x, attention_mask=None):
        return self.container(x * self.weight)


@pytest.mark.parametrize(
    ("container", "names"),
    [
        (lambda y: y, ["output"]),
        (lambda y: (y,), ["output[0]"]),
        (lambda y: [y, y.long(), None, 2 * y], ["output[0]", "output[3]"]),
        (lambda y: {"encoder_output": y}, ["encoder_output"]),
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_every_floating_point_tensor_is_an_output(container, names):
    x = torch.arange(12.0).reshape(2, 3, 2)
    results = run_model(Returning(container), {"x": x, "attention_mask": TARGET}, gradients=True, seed=0)
    assert list(results) == [*names, GRADIENT]
    assert torch.equal(results[names[0]], (x * torch.tensor([1.0, 2.0]))[TARGET.bool()]), "without padding tokens"
    assert results[GRADIENT].abs().min() > 0


@pytest.mark.parametrize(
    ("container", "kind"), [(lambda y: (y.long(),), "a tuple"), (lambda y: None, "None")], ids=["tuple", "None"]
)
def test_model_without_a_floating_point_tensor_is_refused(container, kind):
    message = rf"inputs: got \['x'\], for which the model returns {kind} without a floating-point tensor; allowed: "
    with pytest.raises(InvalidArgumentError, match=message):
        run_model(Returning(container), {"x": torch.ones(1, 2)}, gradients=False, seed=0)


class TupleOfBoth(EncoderDecoder):
    """An encoder-decoder model that returns a tuple: the output of the decoder, then the output of the encoder."""

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
        return decoder_input_ids[..., None].float(), None, input_ids[..., None].float()


@pytest.mark.parametrize(("source", "decoder", "encoder"), [(5, [1, 2], [0, 1, 2]), (3, [1, 2], [1, 2])])
def test_the_length_of_an_item_decides_whether_its_rows_are_those_of_the_encoder(source, decoder, encoder):
    inputs = dict(
        input_ids=torch.arange(source)[None],
        attention_mask=SOURCE[:1, :source],
        decoder_input_ids=torch.arange(3)[None],
        decoder_attention_mask=TARGET[:1],
    )
    results = run_model(TupleOfBoth(), inputs, gradients=False, seed=0)
    assert {name: rows.flatten().tolist() for name, rows in results.items()} == {
        "output[0]": decoder,
        "output[2]": encoder,
    }
