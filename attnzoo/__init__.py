"""attnzoo runs the attention of Hugging Face models on interchangeable backends.

``attnzoo.patch(model, backend="sdpa")`` makes a model run its attention on another kernel. ``attnzoo.verify`` checks
the result against a float64 oracle. Importing attnzoo has no effect on transformers, and loads nothing: each exported
name is imported at first use, so ``import attnzoo`` and ``attnzoo --help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import attnzoo.backends  # noqa: F401

if TYPE_CHECKING:
    from attnzoo import testing
    from attnzoo.adapter import Adapter, Attend, PatchPoint
    from attnzoo.backend import Backend, BackendInfo, Capabilities, Choice
    from attnzoo.errors import (
        AttnzooError,
        BackendRefusedError,
        CacheError,
        DriftError,
        InvalidArgumentError,
        KeywordRefusedError,
        PatchError,
        Refusal,
        UnknownNameError,
    )
    from attnzoo.functional import attention, compute_dtype
    from attnzoo.installing.install import install, installed, uninstall
    from attnzoo.installing.variants import register_variant, unregister_variant
    from attnzoo.patching.patch import Handle, handle, is_patched, patch, unpatch
    from attnzoo.patching.sites import Site
    from attnzoo.patching.tally import stats
    from attnzoo.registry import (
        backends,
        configure,
        register_adapter,
        register_backend,
        unregister_adapter,
        unregister_backend,
    )
    from attnzoo.reporting.explain import explain
    from attnzoo.spec.bias import DenseBias, RelativeBias
    from attnzoo.spec.masks import ReadMask, read_attention_mask
    from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, Window
    from attnzoo.spec.segments import Attention, Request, Result, Segment, SegmentRequest
    from attnzoo.tuning.tuner import tune
    from attnzoo.verification.verify import verify

__version__ = "0.2.0"  # pyproject.toml reads it here

__all__ = [
    "Adapter",
    "Attend",
    "Attention",
    "AttnzooError",
    "Backend",
    "BackendInfo",
    "BackendRefusedError",
    "CacheError",
    "Capabilities",
    "Causal",
    "Choice",
    "Chunks",
    "DenseBias",
    "DriftError",
    "Full",
    "Handle",
    "InvalidArgumentError",
    "KeywordRefusedError",
    "PatchError",
    "PatchPoint",
    "Pattern",
    "ReadMask",
    "Refusal",
    "RelativeBias",
    "Request",
    "Result",
    "Segment",
    "SegmentRequest",
    "Site",
    "UnknownNameError",
    "Window",
    "attention",
    "backends",
    "compute_dtype",
    "configure",
    "explain",
    "handle",
    "install",
    "installed",
    "is_patched",
    "patch",
    "read_attention_mask",
    "register_adapter",
    "register_backend",
    "register_variant",
    "stats",
    "testing",
    "tune",
    "uninstall",
    "unpatch",
    "unregister_adapter",
    "unregister_backend",
    "unregister_variant",
    "verify",
]

# Module: the names that attnzoo exports from it. Type checkers read the imports above instead.
_EXPORTS = {
    "attnzoo.adapter": "Adapter Attend PatchPoint",
    "attnzoo.backend": "Backend BackendInfo Capabilities Choice",
    "attnzoo.errors": "AttnzooError BackendRefusedError CacheError DriftError "
    "InvalidArgumentError KeywordRefusedError PatchError Refusal UnknownNameError",
    "attnzoo.functional": "attention compute_dtype",
    "attnzoo.installing.install": "install installed uninstall",
    "attnzoo.installing.variants": "register_variant unregister_variant",
    "attnzoo.patching.patch": "Handle handle is_patched patch unpatch",
    "attnzoo.patching.sites": "Site",
    "attnzoo.patching.tally": "stats",
    "attnzoo.registry": "backends configure register_adapter register_backend unregister_adapter unregister_backend",
    "attnzoo.reporting.explain": "explain",
    "attnzoo.spec.bias": "DenseBias RelativeBias",
    "attnzoo.spec.masks": "ReadMask read_attention_mask",
    "attnzoo.spec.patterns": "Causal Chunks Full Pattern Window",
    "attnzoo.spec.segments": "Attention Request Result Segment SegmentRequest",
    "attnzoo.tuning.tuner": "tune",
    "attnzoo.verification.verify": "verify",
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names.split()}

# The package attnzoo.backends and the exported function ``backends`` have the same name. The import system stores the
# package under this name once, at its first import. So the package is imported above, and its entry is removed here.
del globals()["backends"]


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name == "testing":
            return importlib.import_module("attnzoo.testing")
        if name not in _MODULES:
            raise AttributeError(f"module 'attnzoo' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
