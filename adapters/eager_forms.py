"""The eager attention functions of transformers, by fingerprint, and what each of them computes.

Every modeling file of transformers has a copy of an eager attention function. The copies fall into a few forms. A
module that calls a function of another form is refused, because the form may compute something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from attnzoo.errors import PatchError
from attnzoo.originals.fingerprint import fingerprint

NAME_ENDS_WITH = "eager_attention_forward"


@dataclass(frozen=True)
class EagerForm:
    """What an eager attention function computes beyond ``softmax(scaling * query @ key.T + attention_mask) @ value``.

    Attributes:
        reads_mask: whether the function adds ``attention_mask`` to the scores.
        position_bias: whether the function adds the argument ``position_bias`` to the scores.
        softcap: whether the function limits scores to ``softcap * tanh(scores / softcap)`` if ``softcap`` is not None.
        sinks: where the function gets attention sinks from. A sink is a score without a key: it takes a part of the
            softmax weight. ``"module"`` is the parameter ``sinks`` ``(heads,)`` of the module, ``"argument"`` is the
            argument ``sinks`` ``(batch, heads, q_len, 1)``, and an empty string means no sinks.
        scale_of_module: whether the factor is ``module.head_dim ** -0.5`` instead of the argument ``scaling``.
        weights_with_sinks: whether the returned weights are those that multiply the values. Otherwise the function
            returns the weights of a softmax without sinks, which attnzoo does not compute.
    """

    reads_mask: bool = True
    position_bias: bool = False
    softcap: bool = False
    sinks: str = ""
    scale_of_module: bool = False
    weights_with_sinks: bool = True


# For each form, functions by path, without the prefix "transformers.models.", and their fingerprints. Further models of
# transformers have copies of these functions.
FORMS: Mapping[EagerForm, Mapping[str, str]] = {
    EagerForm(): {
        "llama.modeling_llama:eager_attention_forward": "42cea156abecab2a",
        "bert.modeling_bert:eager_attention_forward": "4933327352701038",
        "align.modeling_align:eager_attention_forward": "b6f558dbd1b962c2",
        "qwen2_vl.modeling_qwen2_vl:eager_attention_forward": "092b81b99e8fc6eb",
        "opt.modeling_opt:eager_attention_forward": "fdc1eb0290d671fb",
        "beit.modeling_beit:eager_attention_forward": "bc5bfa9f73bdda75",
        "blip_2.modeling_blip_2:eager_attention_forward": "d6bf32ebbc5ae6e9",
        "whisper.modeling_whisper:eager_attention_forward": "8a6df67d884259b8",
        "clip.modeling_clip:eager_attention_forward": "108bb3808e792652",
        "gpt2.modeling_gpt2:eager_attention_forward": "bd016ae0bd3923f6",
        "internvl.modeling_internvl:eager_attention_forward": "478ff6a06de885be",
        "timesfm.modeling_timesfm:simple_eager_attention_forward": "a543e622e092f6c6",
        "bigbird_pegasus.modeling_bigbird_pegasus:eager_attention_forward": "a1c8f529c890fa16",
        "evolla.modeling_evolla:eager_attention_forward": "354759f4f32e261d",
        "gpt_neox.modeling_gpt_neox:eager_attention_forward": "d5065bf8d8c78290",
        "idefics2.modeling_idefics2:eager_attention_forward": "5e3104b5054d00ed",
        "llama4.modeling_llama4:eager_attention_forward": "dcdc84e27063f92c",
        "modernbert_decoder.modeling_modernbert_decoder:eager_attention_forward": "d736738be8d54d2e",
        "gptj.modeling_gptj:eager_attention_forward": "cb235c0255929e28",
        "tipsv2.modeling_tipsv2:text_eager_attention_forward": "6b998235c1f3c159",
    },
    EagerForm(reads_mask=False): {"vjepa2.modeling_vjepa2:eager_attention_forward": "22a2e24886439cfe"},
    EagerForm(position_bias=True): {
        "t5.modeling_t5:eager_attention_forward": "cbe822ba4dc3de42",
        "inkling.modeling_inkling:eager_attention_forward": "d60d48aab560f1b0",
    },
    EagerForm(softcap=True): {"gemma2.modeling_gemma2:eager_attention_forward": "e39d815d743e6a0a"},
    EagerForm(sinks="module"): {
        "gpt_oss.modeling_gpt_oss:eager_attention_forward": "c5825be0377e664f",
        "flint.modeling_flint:eager_attention_forward": "963be73b83d4d130",
        "mimo_v2_flash.modeling_mimo_v2_flash:eager_attention_forward": "397b943093341732",
        "openai_privacy_filter.modeling_openai_privacy_filter:eager_attention_forward": "fc9db04ae339161b",
    },
    EagerForm(sinks="module", weights_with_sinks=False): {
        "granite_swa.modeling_granite_swa:eager_attention_forward": "311ec17f3d1bb1d9",
    },
    EagerForm(position_bias=True, sinks="argument"): {
        "inkling2.modeling_inkling2:eager_attention_forward": "401403331ea5ae01",
    },
    EagerForm(scale_of_module=True): {"llama4.modeling_llama4:vision_eager_attention_forward": "5664baaccaccd8ba"},
}
_BY_FINGERPRINT = {code: form for form, functions in FORMS.items() for code in functions.values()}


def form_of(cls: Any) -> EagerForm:
    """Return the form of the eager attention function that the forward of a class uses.

    Raises:
        PatchError: the forward uses no eager attention function or several, or a function of an unknown form.
    """
    forward: Any = inspect.unwrap(cls.forward)
    names = [name for name in forward.__code__.co_names if name.endswith(NAME_ENDS_WITH)]
    if len(names) != 1 or names[0] not in forward.__globals__:
        got = ", ".join(names) or "none"
        raise PatchError(f"eager attention function of {cls.__name__}: got {got}; allowed: one global function")
    function = forward.__globals__[names[0]]
    code = _fingerprint(function)
    if code not in _BY_FINGERPRINT:
        raise PatchError(
            f"{function.__module__}.{names[0]}, which {cls.__name__} calls: got fingerprint {code}; allowed: a form "
            "that the generic adapter knows, or an adapter for this model (attnzoo.register_adapter)"
        )
    return _BY_FINGERPRINT[code]


@lru_cache(maxsize=1024)
def _fingerprint(function: Callable[..., Any]) -> str:
    return fingerprint(function)
