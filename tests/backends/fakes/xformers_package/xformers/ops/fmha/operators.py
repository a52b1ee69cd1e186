"""The operators of xformers 0.0.35 on a kernel in plain torch."""

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import torch

from tests.backends.fakes import kernel
from xformers.ops.fmha.attn_bias import (
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
)

HALF = {torch.half, torch.bfloat16}
DENSE = (LocalAttentionFromBottomRightMask,)


def sequences(query, key, bias):
    """The sequence starts, longest sequences, causality and window of a bias."""
    if isinstance(bias, BlockDiagonalMask):
        q, k = bias.q_seqinfo, bias.k_seqinfo
        lengths = (q.seqstart, k.seqstart, q.max_seqlen, k.max_seqlen)
        causal = isinstance(bias, BlockDiagonalCausalFromBottomRightMask)
        local = isinstance(bias, BlockDiagonalCausalLocalAttentionFromBottomRightMask)
        return lengths, (causal, bias._window_size - 1 if local else -1, -1)
    (samples, n), m = query.shape[:2], key.shape[1]
    starts = [torch.arange(0, samples * length + 1, length, dtype=torch.int32) for length in (n, m)]
    return (*starts, n, m), (False, bias.window_left, bias.window_right)


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: object = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False


# Whether the compiled extension loaded. With a wheel for another CUDA, operators are registered and so "available".
EXTENSION = SimpleNamespace(loaded=True)


class Operator:
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = None
    SUPPORTED_DEVICES = frozenset({"cuda", "cpu"})  # the CPU stands for CUDA
    SUPPORTED_ATTN_BIAS_TYPES = ()
    SUPPORTED_DTYPES = HALF
    SUPPORTED_MAX_K = 256
    IS_DETERMINISTIC = True
    VARLEN_LSE_PACKED = True
    BUILT = True

    @classmethod
    def is_available(cls):
        return cls.BUILT

    @classmethod
    def not_supported_reasons(cls, d):
        """Why the operator does not support its inputs, with xformers' messages."""
        reasons = []
        if max(d.query.shape[-1], d.value.shape[-1]) > cls.SUPPORTED_MAX_K:
            reasons.append(f"max(query.shape[-1], value.shape[-1]) > {cls.SUPPORTED_MAX_K}")
        if d.query.device.type not in cls.SUPPORTED_DEVICES:
            reasons.append(f"device={d.query.device.type} (supported: {cls.SUPPORTED_DEVICES})")
        if not EXTENSION.loaded:
            reasons.append("xFormers wasn't build with CUDA support")
        newest, found = cls.CUDA_MAXIMUM_COMPUTE_CAPABILITY, (8, 0)
        if torch.cuda.is_available():
            found = torch.cuda.get_device_capability()
        if newest is not None and found > newest:
            reasons.append(f"requires device with capability <= {newest} but your GPU has capability {found} (too new)")
        if d.query.dtype not in cls.SUPPORTED_DTYPES:
            reasons.append(f"dtype={d.query.dtype} (supported: {cls.SUPPORTED_DTYPES})")
        if type(d.attn_bias) not in cls.SUPPORTED_ATTN_BIAS_TYPES:
            reasons.append(f"attn_bias type is {type(d.attn_bias)}")
        if not cls.is_available():
            reasons.append("operator wasn't built - see `python -m xformers.info` for more info")
        if not cls.IS_DETERMINISTIC and torch.are_deterministic_algorithms_enabled():
            reasons.append("operator is non-deterministic, but `torch.use_deterministic_algorithms` is set")
        for name, tensor in dict(query=d.query, key=d.key, value=d.value).items():
            if tensor.shape[-1] % 8 or tensor.stride(-2) % 8 or tensor.stride(-1) > 1:
                reasons.append(f"{name}.shape[-1] % 8 != 0, or its strides")
        return reasons

    @classmethod
    def check(cls, query, key, value, bias):
        """Raise on inputs that the operator does not support, as xformers does."""
        reasons = cls.not_supported_reasons(Inputs(query, key, value, bias))
        if reasons:
            raise ValueError(f"Operator {cls.NAME} does not support inputs: {reasons}")
        if isinstance(bias, BlockDiagonalMask) and query.shape[0] != 1:
            raise ValueError("Expected batch_size=1 when using block-diagonal bias")
        if query.ndim != 4 or key.shape != value.shape or query.shape[2:] != key.shape[2:]:
            raise ValueError(f"Incompatible shapes for attention inputs: {query.shape}, {key.shape}, {value.shape}")

    @classmethod
    def lse_out(cls, lse, query, bias):
        """``(heads, rows)`` as the operator returns it: packed, or one row per sample or sequence."""
        if isinstance(bias, BlockDiagonalMask) and not cls.VARLEN_LSE_PACKED:
            starts = bias.q_seqinfo.seqstart_py
            width = -(-bias.q_seqinfo.max_seqlen // 32) * 32
            padded = torch.full((len(starts) - 1, lse.shape[0], width), torch.nan)
            for number, (start, stop) in enumerate(pairwise(starts)):
                padded[number, :, : stop - start] = lse[:, start:stop]
            return padded
        return lse.unflatten(1, (query.shape[0], -1)).transpose(0, 1)

    @classmethod
    def lse_in(cls, lse, query, bias):
        """The inverse of :meth:`lse_out`."""
        if isinstance(bias, BlockDiagonalMask) and not cls.VARLEN_LSE_PACKED:
            starts = bias.q_seqinfo.seqstart_py
            if lse.shape[0] != len(starts) - 1 or lse.shape[2] < bias.q_seqinfo.max_seqlen:
                raise ValueError(f"Wrong LSE format for {cls.NAME}: {tuple(lse.shape)}")
            assert lse.shape[2] % 32 == 0 and lse.is_contiguous()
            rows = []
            for number, (start, stop) in enumerate(pairwise(starts)):
                assert (lse[number, :, stop - start :] == torch.inf).all()
                rows.append(lse[number, :, : stop - start])
            return torch.cat(rows, dim=1)
        if tuple(lse.shape) != (query.shape[0], query.shape[2], query.shape[1]):
            raise ValueError(f"Wrong LSE format for {cls.NAME}: {tuple(lse.shape)}")
        return lse.transpose(0, 1).flatten(1)

    @classmethod
    def forward(cls, query, key, value, bias, scale):
        cls.check(query, key, value, bias)
        lengths, seen = sequences(query, key, bias)
        rows = [tensor.flatten(0, 1) for tensor in (query, key, value)]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse, _ = kernel.forward(*rows, *lengths, 0.0, scale, *seen, check=lambda *_: None)
        return out.view(query.shape), cls.lse_out(lse, query, bias)

    @classmethod
    def backward(cls, grad, out, lse, query, key, value, bias, scale):
        cls.check(query, key, value, bias)
        lengths, seen = sequences(query, key, bias)
        rows = [tensor.flatten(0, 1) for tensor in (grad, query, key, value, out)]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        packed_lse = cls.lse_in(lse, query, bias).contiguous()
        state = torch.zeros(2, dtype=torch.long)
        grads = kernel.backward(*rows, packed_lse, *lengths, 0.0, scale, *seen, state, check=lambda *_: None)
        return tuple(grad.view(tensor.shape) for grad, tensor in zip(grads, (query, key, value), strict=True))
