"""Feed-forward layers beside patched attention run in slices if that changes no result."""

import pytest
import torch

import attnzoo
from attnzoo.originals import slots
from attnzoo.patching import companions
from attnzoo.patching.forwards import PatchedForward
from tests.support.models import causal_inputs, longt5, longt5_inputs, reformer

LENGTH, AT_ONCE = 48, 8
CASES = {
    # builds the model, its inputs, the class of its feed-forward layers
    "longt5-local": (longt5, longt5_inputs, "LongT5LayerFF"),
    "longt5-tglobal": (lambda **changes: longt5(kind="transient-global", **changes), longt5_inputs, "LongT5LayerFF"),
    "longt5-relu": (lambda **changes: longt5(feed_forward_proj="relu", **changes), longt5_inputs, "LongT5LayerFF"),
    "reformer": (reformer, causal_inputs, "ChunkReformerFeedForward"),
}
cases = pytest.mark.parametrize(("build", "inputs", "cls"), CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def few_tokens_at_once(monkeypatch):
    monkeypatch.setattr(companions, "TOKENS_AT_ONCE", AT_ONCE)


def layers(model, cls):
    return [module for module in model.modules() if type(module).__name__ == cls]


def lengths(model, cls, inputs, grad=False):
    """Return the output of the model and the lengths of the slices in its first feed-forward layer."""
    taken, first = [], layers(model, cls)[0]
    norm = next(module for name, module in first.named_modules() if name.endswith("layer_norm"))
    hook = norm.register_forward_pre_hook(lambda module, args: taken.append(args[0].shape[1]))
    with torch.set_grad_enabled(grad):
        output = model(**inputs)[0]
    hook.remove()
    return output, taken


@cases
@pytest.mark.parametrize("side", ["none", "left", "every"])
@pytest.mark.parametrize("length", [AT_ONCE, 2 * AT_ONCE - 1, 2 * AT_ONCE, LENGTH])
def test_slices_equal_the_whole(build, inputs, cls, side, length):
    model, given = build().double(), inputs(length, side)
    with attnzoo.patch(model, "eager"):
        output, taken = lengths(model, cls, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(companions, "TOKENS_AT_ONCE", 1000)
        with attnzoo.patch(model, "eager"):
            expected, whole = lengths(model, cls, given)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert sum(taken) == sum(whole) and len(whole) == 1
    assert len(taken) == max(1, whole[0] // AT_ONCE) and min(taken) >= min(AT_ONCE, whole[0])


@cases
def test_all_tokens_at_once_with_gradients_and_in_training(build, inputs, cls):
    model, given = build(), inputs(LENGTH, "none")
    with attnzoo.patch(model, "eager"):
        assert len(lengths(model.train(), cls, given)[1]) == 1
        if cls.startswith("LongT5"):  # the forward of Reformer's layers runs without gradients
            assert len(lengths(model.eval(), cls, given, grad=True)[1]) == 1


@cases
def test_slices_are_used_only_beside_patched_attention(build, inputs, cls):
    model, given = build(), inputs(LENGTH, "none")
    with attnzoo.patch(model, "native"):
        assert len(lengths(model, cls, given)[1]) == 1
    with attnzoo.patch(model, "eager") as handle:
        last = handle.sites[-1].name
    with attnzoo.patch(model, {last: "eager"}):
        *others, beside = (isinstance(slots.current(layer), PatchedForward) for layer in layers(model, cls))
    assert beside and not any(others)


@cases
def test_undo_is_exact(build, inputs, cls):
    model, given = build(), inputs(LENGTH, "left")
    expected, _ = lengths(model, cls, given)
    with attnzoo.patch(model, "eager"):
        pass
    output, taken = lengths(model, cls, given)
    assert torch.equal(output, expected) and len(taken) == 1
    assert not any("forward" in vars(layer) for layer in layers(model, cls))


def test_slices_of_the_original_are_kept():
    model, given = reformer(chunk_size_feed_forward=3), causal_inputs(LENGTH, "none")
    with attnzoo.patch(model, "eager"):
        _, taken = lengths(model, "ChunkReformerFeedForward", given)
    assert set(taken) == {3}
