"""On a GPU, a patched module does not let the host wait for the device, and it launches few kernels.

These tests need no GPU: they run each module on a device whose values nobody can read.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from attnzoo.errors import BackendRefusedError
from attnzoo.spec.transforms import hides_nothing, readable_at_once
from tests.support.device_without_data import WaitError, Waits, modules_of, run_module
from tests.support.models import FAMILIES

# Where a module still waits, each at most once for a mask and forward of the model. An entry needs a reason:
# - The number of global keys is a size of tensors. The model's own code waits for the same number.
# - LSH attention has one more bucket if there is padding. The model's own code waits for the same answer.
# - A mask that its module cannot pass on is compared with the only form that the backends compute.
# - A dense mask is read: as a pattern, it runs on backends without dense masks and skips half of the work.
DENSE_MASK = {"attnzoo/spec/masks.py: _hides_nothing"}
WAITS = {
    "LEDEncoderSelfAttention": {"attnzoo/spec/global_keys.py: find_global_keys"},
    "LongformerSelfAttention": {"attnzoo/spec/global_keys.py: find_global_keys"},
    "LSHSelfAttention": {"adapters/reformer_hashing.py: hash_queries"},
    "LongT5LocalAttention": {"adapters/longt5_blocks.py: _is_window_mask"},
    "LongT5TransientGlobalAttention": {"adapters/longt5_blocks.py: read_flat_mask"},
    "BigBirdAttention": {"adapters/bigbird.py: _real"},
    "BigBirdPegasusEncoderAttention": {"adapters/bigbird.py: _real"},
    "PegasusXGlobalLocalAttention": {"adapters/pegasus_x.py: _real"},
    **dict.fromkeys(("LEDDecoderAttention", "LongT5Attention", "PegasusXAttention"), DENSE_MASK),
    "BigBirdPegasusDecoderAttention": DENSE_MASK,
}
# FlashAttention takes the lengths of samples without padding, so the host must know them, and copies them back.
CALLS = "attnzoo/backends/varlen/calls.py"
LENGTHS = {f"{CALLS}: _plan", f"{CALLS}: <genexpr>"}
WAITS_OF_FLASH = {
    **dict.fromkeys(("LEDEncoderSelfAttention", "LongformerSelfAttention"), LENGTHS),
    "LocalSelfAttention": LENGTHS | {f"{CALLS}: rows_of"},
    "LSHSelfAttention": LENGTHS | {"attnzoo/backends/varlen/sorted_calls.py: sorted_rows"},
    "PegasusXGlobalLocalAttention": LENGTHS | {f"{CALLS}: _chunk_calls", f"{CALLS}: rows_of"},
}
# FlexAttention computes neither dense biases nor sorted chunks, and FlashAttention computes no biases.
REFUSED = {
    "flex_attention": {"LongT5Attention", "LSHSelfAttention"},
    "flash_attention_2": {
        *("LongT5Attention", "LongT5LocalAttention", "LongT5TransientGlobalAttention"),
        *("BigBirdAttention", "BigBirdPegasusEncoderAttention"),
    },
}
# Without padding, transformers makes no mask for these.
MASK_FOR_PADDING = {"GPTNeoXAttention", "GPTBigCodeAttention"}
LOCAL = [
    *("LEDEncoderSelfAttention", "LongformerSelfAttention", "LongT5LocalAttention"),
    *("LongT5TransientGlobalAttention", "LocalSelfAttention", "LSHSelfAttention"),
]
MOST_FORWARD, MOST_TRAINING = 6, 14


@pytest.fixture(scope="module")
def captured():
    """The modules of a family with the arguments of a call, made once for each family and padding."""
    known = {}

    def get(family, side):
        if (family, side) not in known:
            known[family, side] = modules_of(family, side)
        return known[family, side]

    return get


@pytest.mark.parametrize(
    ("backend", "side"),
    [("triton", "none"), *((name, "right") for name in ("triton", "sdpa", "flex_attention", "flash_attention_2"))],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_host_waits_only_where_this_file_says_so(captured, family, backend, side):
    modules, refused = captured(family, side), REFUSED.get(backend, set())
    for cls in refused & modules.keys():
        with pytest.raises(BackendRefusedError):
            run_module(*modules[cls], backend)
    waits = {cls: run_module(*call, backend).waits for cls, call in modules.items() if cls not in refused}
    expected = {**WAITS, **(dict.fromkeys(MASK_FOR_PADDING, DENSE_MASK) if side == "right" else {})}
    of_flash = WAITS_OF_FLASH if backend == "flash_attention_2" else {}
    assert waits == {cls: expected.get(cls, set()) | of_flash.get(cls, set()) for cls in waits} and modules


@pytest.mark.parametrize("family", ["gpt_neox", "longt5-local", "reformer"])
def test_original_code_under_a_patch_adds_no_wait(captured, family):
    for call in captured(family, "none").values():
        assert run_module(*call, "native").waits == set()


@pytest.mark.parametrize("family", ["led", "longformer", "longt5-local", "longt5-tglobal", "reformer"])
def test_local_attention_launches_few_kernels(captured, family):
    local = {cls: call for cls, call in captured(family, "right").items() if cls in LOCAL}
    assert local
    for cls, call in local.items():
        ran = run_module(*call, "triton")
        forward, backward = (
            [name for name in names if name.endswith("_kernel")] for names in (ran.forward, ran.backward)
        )
        assert 1 <= len(forward) <= MOST_FORWARD, f"{cls}: {forward}"
        assert 3 <= len(forward + backward) <= MOST_TRAINING, f"{cls}: {forward + backward}"


def test_every_way_to_read_a_value_is_noticed():
    """Otherwise the tests above prove nothing."""
    flags, numbers = torch.ones(3, dtype=torch.bool, device="meta"), torch.ones(3, device="meta")
    with Waits() as waits:
        assert bool(flags.all()) and not bool(flags.any()) and torch.equal(flags, flags)
        assert int(numbers.sum()) == numbers.sum().item() == 1 and isinstance(float(numbers.sum()), float)
        torch.tensor([1, 2], device="meta"), torch.tensor(0.5, device=torch.device("meta")), torch.tensor(1)
        assert len(waits.places) == 8
        for read in (flags.nonzero, numbers.tolist, lambda: numbers[flags], lambda: numbers.masked_select(flags)):
            with pytest.raises(WaitError):
                read()


def test_masks_are_read_on_the_cpu_only():
    visible = torch.ones(2, 3, dtype=torch.bool)
    assert readable_at_once(visible) and hides_nothing(visible) and not hides_nothing(~visible)
    assert not readable_at_once(visible.to("meta")) and not hides_nothing(visible.to("meta"))
    inside = []
    torch.vmap(lambda row: inside.append(hides_nothing(row)) or row)(visible)
    assert inside == [False]
