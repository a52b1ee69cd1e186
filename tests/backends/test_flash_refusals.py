"""What ``flash_attention_2`` refuses, and its messages if a kernel, a package or a device is missing."""

import inspect
import sys

import pytest
import torch

import attnzoo
from attnzoo.backends.varlen import flash_attn_kernel, packed, varlen_kernel
from attnzoo.backends.varlen.flash import FlashBackend
from attnzoo.reporting import doctor
from tests.support.half import HALF, agrees, attention, refusals, unpadded
from tests.support.models import longt5


def test_refusals_name_what_was_got_and_what_is_allowed(flash_attn):
    assert refusals() == {}
    assert refusals(dtype=torch.float32)["dtype"] == ("float32", "bfloat16, float16, or torch.autocast to one of them")
    assert refusals(bias="relative")["bias"] == ("relative", "none")
    assert refusals(mask="dense")["mask"] == ("True", "no dense mask")
    assert refusals(probabilities=True)["attention probabilities"] == ("True", "output_attentions=False")


def wide(dim, pattern, key_mask):
    segment = attnzoo.SegmentRequest(pattern, 2, key_mask=key_mask)
    request = attnzoo.Request("cpu", HALF, 2, dim, 8, (segment,))
    return {refusal.field: (refusal.got, refusal.allowed) for refusal in FlashBackend().refusals(request)}


def test_heads_that_are_too_wide_are_refused(flash_attn):
    assert not wide(256, attnzoo.Causal(), False) and not wide(256, attnzoo.Full(), True)
    assert wide(264, attnzoo.Full(), False)["head_dim"] == ("264", "at most 256")
    assert wide(256, attnzoo.Causal(), True)["head_dim"] == ("256", "at most 255 if the kernel must hide keys")


def test_a_scale_too_small_to_hide_keys_is_refused(flash_attn):
    holes = torch.arange(20)[None].expand(2, 20) != 9
    with pytest.raises(attnzoo.InvalidArgumentError, match=r"scale: got 1e-08; allowed: at least 2\*\*-19"):
        FlashBackend().run(attention(attnzoo.Causal(), key_mask=holes, scale=1e-8))


def test_varlen_refuses_dropout(varlen):
    backend = FlashBackend(kernel="varlen")
    assert refusals(backend, dropout=0.1) == {"dropout": ("a probability above 0 with kernel varlen", "dropout=0.0")}


def test_the_cpu_is_refused(fresh):
    assert refusals()["device"] == ("cpu", "cuda")


def test_an_unknown_kernel_raises(fresh):
    with pytest.raises(
        attnzoo.InvalidArgumentError, match=r"kernel: got 'fa3'; allowed: None, or one of \['flash_attn'"
    ):
        FlashBackend(kernel="fa3")


def test_a_named_kernel_that_is_missing_is_refused(on_cpu, monkeypatch):
    monkeypatch.setattr(flash_attn_kernel.FlashAttnKernel, "unavailable", classmethod(lambda cls: "gone"))
    assert refusals(FlashBackend(kernel="flash_attn")) == {"kernel": ("'flash_attn': gone", "None (any kernel)")}


def test_a_relative_bias_is_refused_by_site_before_anything_is_patched(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    model = longt5()
    with pytest.raises(attnzoo.BackendRefusedError) as caught:
        attnzoo.patch(model, "flash")
    site = "encoder.block.0.layer.0.LocalSelfAttention"
    reasons = {refusal.field: refusal for refusal in caught.value.refusals[site]}
    assert {"availability", "bias", "device", "dtype"} <= set(reasons)
    assert (reasons["bias"].got, reasons["bias"].allowed) == ("relative", "none")
    assert "CUDA" in reasons["availability"].got
    assert {"eager", "sdpa"} <= set(caught.value.alternatives[site])
    assert "flash_attention_2" not in caught.value.alternatives[site]
    assert not any("forward" in vars(module) for module in model.modules())
    fields = {
        verdict.site: {reason.field for reason in verdict.refusals} for verdict in attnzoo.explain(model, "flash")
    }
    assert {"availability", "bias", "device", "dtype"} <= fields[site]


# What is missing


def plant(monkeypatch, tmp_path, text):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


FUNCTION = f"def flash_attn_varlen_func({', '.join(flash_attn_kernel._PUBLIC)}): ...\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (FUNCTION, "flash_attn has loaded no compiled extension (flash_attn_gpu, flash_attn_cuda)"),
        (FUNCTION + "flash_attn_gpu = None", "flash_attn has loaded no compiled extension"),
        (
            FUNCTION + "class flash_attn_gpu: varlen_fwd = len",
            "flash_attn's compiled extension has no varlen_bwd",
        ),
        (
            FUNCTION + "class Lazy:\n    def __getattr__(self, name): raise OSError('undefined symbol: _ZN3c10')\n"
            "flash_attn_cuda = Lazy()",
            "flash_attn's compiled extension does not load: OSError: undefined symbol: _ZN3c10",
        ),
        ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
        ("raise SystemExit('no')", "SystemExit: no"),
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        (
            "def flash_attn_varlen_func(q, keys): ...",
            "flash_attn changed the parameters of flash_attn_varlen_func to q, ",
        ),
        ("", "flash_attn has no flash_attn_varlen_func"),
        ("flash_attn_varlen_func = max", "the parameters of flash_attn_varlen_func from flash_attn cannot be read"),
        ("def __getattr__(name): raise RuntimeError('too lazy')", "RuntimeError: too lazy"),
    ],
    ids=[
        "no extension",
        "none",
        "a symbol missing",
        "a symbol that does not load",
        "import error",
        "system exit",
        "dependency",
        "drift",
        "empty",
        "no signature",
        "lazy",
    ],
)
def test_a_broken_package_only_makes_its_kernel_unavailable(fresh, tmp_path, monkeypatch, text, why):
    plant(fresh, tmp_path, text)
    assert why in flash_attn_kernel.FlashAttnKernel.unavailable()
    fresh.setattr(varlen_kernel, "import_package", lambda *_: (None, "gone"))
    assert why in attnzoo.backends()["flash_attention_2"].reason
    (line,) = [line for line in doctor.examine() if line.name.startswith("flash_attention_2")]
    assert not line.ok and why in line.detail
    assert attnzoo.backends()["sdpa"].available


def test_varlen_is_unavailable_if_torch_lacks_flash_attention(varlen, monkeypatch):
    assert varlen_kernel.VarlenKernel.unavailable() is None
    varlen_kernel._function.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    why = f"torch {torch.__version__} is built without FlashAttention: install "
    assert varlen_kernel.VarlenKernel.unavailable().startswith(why)


def test_varlen_runs_if_the_flash_attn_package_is_broken(on_cpu, varlen, tmp_path):
    plant(on_cpu, tmp_path, "def __getattr__(name): raise RuntimeError('too lazy')")
    assert FlashBackend.unavailable() is None
    assert agrees(attention(attnzoo.Causal()), FlashBackend()) == "varlen"


class HidesFlashAttn:
    """An import finder that hides an installed flash_attn."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "flash_attn":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_missing_package_names_what_to_install(fresh):
    fresh.setattr(sys, "meta_path", [HidesFlashAttn, *sys.meta_path])
    why = flash_attn_kernel.FlashAttnKernel.unavailable()
    assert why == "flash_attn is not installed: pip install flash-attn"


def test_an_old_torch_names_the_version_needed(fresh, monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert "varlen_attn has no scale, window_size: install torch>=2.11" in varlen_kernel.VarlenKernel.unavailable()


def test_the_backend_is_unavailable_without_a_device(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    info = attnzoo.backends()["flash_attention_2"]
    assert not info.available and f"torch {torch.__version__}" in info.reason and "CUDA" in info.reason


def test_an_old_device_names_the_capability_needed(fresh):
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.version, "cuda", "12.8")
    fresh.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    fresh.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert packed.no_device() == "Tesla T4 has compute capability 7.5; needed: >= 8.0"


@pytest.mark.parametrize("lost", [flash_attn_kernel._FORWARD, flash_attn_kernel._BACKWARD])
def test_only_unions_need_the_private_functions(flash_attn, monkeypatch, lost):
    monkeypatch.delattr(flash_attn, lost)
    backend = FlashBackend(kernel="flash_attn")
    assert refusals(backend, mask="globals")["segments"][0].endswith(f"has no {lost}")
    assert (
        refusals(backend, pattern=attnzoo.Causal(), mask="keys")["segments"][1]
        == "one segment, no key mask, no SortedChunks"
    )
    for query_mask in (None, unpadded(20, 7)):  # several calls on different rows: no union
        assert agrees(attention(attnzoo.Window(4, 4), query_mask=query_mask), FlashBackend()) == "flash_attn"
    assert not refusals(mask="globals")  # varlen supports a union of segments


def test_the_private_operators_of_torch_have_the_expected_parameters():
    assert varlen_kernel._parts_unavailable() is None
    changed = flash_attn_kernel.changed_signature(torch.ops.torch_attn, {"_varlen_attn": ("query", "keys")}, "torch")
    assert changed is not None and changed.startswith("torch changed the parameters of _varlen_attn to query, key, ")


def test_the_fake_has_the_expected_signatures(flash_attn):
    for name, names in {**flash_attn_kernel._PARTS, "flash_attn_varlen_func": flash_attn_kernel._PUBLIC}.items():
        assert tuple(inspect.signature(getattr(flash_attn, name)).parameters)[: len(names)] == names
