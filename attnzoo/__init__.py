"""attnzoo runs the attention of Hugging Face models on interchangeable backends.

``attnzoo.patch(model, backend="sdpa")`` makes a model run its attention on another kernel. ``attnzoo.verify`` checks
the result against a float64 oracle. Importing attnzoo has no effect on transformers.
"""

# The package attnzoo.backends is imported first: a later import would replace the function attnzoo.backends.
import attnzoo.backends  # noqa: F401
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
from attnzoo.spec.masks import read_attention_mask
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, Window
from attnzoo.spec.segments import Attention, Request, Result, Segment, SegmentRequest
from attnzoo.tuning.tuner import tune
from attnzoo.verification.verify import verify

from attnzoo import testing  # isort: skip  (after the modules that testing imports)

__version__ = "0.1.0"

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
