"""GPT-Neo (Black et al. 2021, doi:10.5281/zenodo.5297715): layers of causal and of causal sliding-window attention.

transformers computes both kinds of layers with one dense function. The smallest part to replace is the method ``_attn``
of the attention module. The original code still computes projections, heads and caches.
"""

from typing import Any

from torch import Tensor

import attnzoo

_MODULE = "transformers.models.gpt_neo.modeling_gpt_neo"


class GPTNeoAttention(attnzoo.PatchPoint):
    """Patch point of causal attention. In local layers, a query sees only the tokens in a window."""

    cls = f"{_MODULE}:GPTNeoSelfAttention"
    # Fingerprints of the functions that this point relies on. If a release of transformers changes one of these
    # functions, patches raise until a developer has read the change and added the new fingerprint here.
    verified = {
        f"{_MODULE}:GPTNeoSelfAttention.forward": ("32c25ae9bcab8eba",),
        f"{_MODULE}:GPTNeoSelfAttention._attn": ("3923e8104a326804",),
        f"{_MODULE}:GPTNeoModel.forward": ("7a0ec434559688d8", "027cd2e3d87fe45a"),
    }

    def describe(self, module: Any) -> str:
        return f"causal, {module.attention_type}"

    def requests(self, module: Any) -> tuple[attnzoo.Request, ...]:
        weight, heads, dim = module.q_proj.weight, module.num_heads, module.head_dim
        segment = attnzoo.SegmentRequest(_pattern(module), heads)
        return (attnzoo.Request(weight.device.type, weight.dtype, heads, dim, dim, (segment,)),)

    def dropout(self, module: Any) -> float:
        return float(module.attn_dropout.p)

    def forward(self, module: Any, attend: attnzoo.Attend, *args: Any, **kwargs: Any) -> Any:
        twin = _Twin(module, attend, bool(kwargs.get("output_attentions")))
        return type(module).forward(twin, *args, **kwargs)


class _Twin:
    """Replacement for the module as ``self`` of the original forward. Only the method ``_attn`` differs."""

    def __init__(self, module: Any, attend: attnzoo.Attend, probabilities: bool) -> None:
        self._module, self._attend, self._probabilities = module, attend, probabilities

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output ``(batch, heads, length, head_dim)``, and the weights if the call requests them."""
        try:
            return self._compute(query, key, value, attention_mask)
        except attnzoo.BackendRefusedError:
            # The forward has already filled the cache, so only this method falls back to the original.
            if not self._attend.falls_back():
                raise
            return self._module._attn(query, key, value, attention_mask)

    def _compute(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        module = self._module
        key_mask = mask = bias = None
        if attention_mask is not None:
            sizes = (query.shape[0], query.shape[2], key.shape[2])
            # All layers get the same mask, so read the mask once per forward of the model.
            read = self._attend.cached_per_forward(
                attention_mask, "read", lambda given: attnzoo.read_attention_mask(given, sizes)
            )
            key_mask, mask, bias = read.key_mask, read.mask, read.bias
            # Every layer is causal up to the last key, so these patterns hide nothing more.
            if read.pattern not in (attnzoo.Full(), attnzoo.Causal(), attnzoo.Causal(offset=sizes[2] - sizes[1])):
                allowed = "a mask whose last query sees the last key"
                raise attnzoo.InvalidArgumentError("attention_mask", str(read.pattern), allowed)
        query, key, value = (tensor.to(attnzoo.compute_dtype(query)) for tensor in (query, key, value))
        segment = attnzoo.Segment(key, value, _pattern(module), key_mask, mask, bias)
        dropout = module.attn_dropout.p if module.training else 0.0
        # GPT-Neo does not scale its scores.
        result = self._attend(attnzoo.Attention(query, (segment,), 1.0, dropout), self._probabilities)
        return result.output, None if result.dropped is None else result.dropped[0]


def _pattern(module: Any) -> attnzoo.Pattern:
    # A query of a local layer sees `window_size` tokens, including itself.
    return attnzoo.Window(module.config.window_size - 1, 0) if module.attention_type == "local" else attnzoo.Causal()


GPT_NEO = attnzoo.Adapter(model_types=("gpt_neo",), versions="5.17 to 5.24", points=(GPTNeoAttention(),))
