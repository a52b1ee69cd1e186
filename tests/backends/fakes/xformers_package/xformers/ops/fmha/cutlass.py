import torch

from xformers.ops.fmha import attn_bias
from xformers.ops.fmha.operators import HALF, Operator


class FwOp(Operator):
    NAME = "cutlassF-pt"
    CUDA_MAXIMUM_COMPUTE_CAPABILITY = (9, 0)
    SUPPORTED_DTYPES = HALF | {torch.float}
    SUPPORTED_MAX_K = 65536
    VARLEN_LSE_PACKED = False
    SUPPORTED_ATTN_BIAS_TYPES = (
        attn_bias.BlockDiagonalMask,
        attn_bias.BlockDiagonalCausalFromBottomRightMask,
        attn_bias.BlockDiagonalCausalLocalAttentionFromBottomRightMask,
    )


class BwOp(FwOp):
    NAME = "cutlassB-pt"
    SUPPORTED_ATTN_BIAS_TYPES = FwOp.SUPPORTED_ATTN_BIAS_TYPES[:2]
