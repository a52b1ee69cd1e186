"""attnzoo: a pluggable attention-backend registry for Hugging Face models.

One line, ``attnzoo.patch(model, backend="sdpa")``, and the model attends with another kernel; ``attnzoo.verify``
proves that nothing else changed. Importing attnzoo has no effect on transformers.
"""

import attnzoo.backends  # noqa: F401  loaded first: a later import of it would rebind `attnzoo.backends`, the function
from attnzoo.adapter import Adapter, Seam
from attnzoo.backend import Backend, BackendInfo, Capabilities
from attnzoo.bias import DenseBias, RelativeBias
from attnzoo.errors import (
    AttnzooError,
    BackendRefusedError,
    DriftError,
    InvalidArgumentError,
    PatchError,
    Refusal,
    UnknownNameError,
)
from attnzoo.explanation import explain
from attnzoo.functional import attention
from attnzoo.patching import Handle, patch, unpatch
from attnzoo.patterns import Causal, Chunks, Full, Pattern, Window
from attnzoo.registry import backends, register_adapter, register_backend, unregister_adapter, unregister_backend
from attnzoo.segments import Attention, Request, Result, Segment
from attnzoo.sites import Site
from attnzoo.verification import verify

from attnzoo import testing  # isort: skip  (after what it imports)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Attention",
    "AttnzooError",
    "Backend",
    "BackendInfo",
    "BackendRefusedError",
    "Capabilities",
    "Causal",
    "Chunks",
    "DenseBias",
    "DriftError",
    "Full",
    "Handle",
    "InvalidArgumentError",
    "PatchError",
    "Pattern",
    "Refusal",
    "RelativeBias",
    "Request",
    "Result",
    "Seam",
    "Segment",
    "Site",
    "UnknownNameError",
    "Window",
    "attention",
    "backends",
    "explain",
    "patch",
    "register_adapter",
    "register_backend",
    "testing",
    "unpatch",
    "unregister_adapter",
    "unregister_backend",
    "verify",
]
