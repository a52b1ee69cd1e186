from xformers.ops.fmha import attn_bias
from xformers.ops.fmha.operators import Operator


class FwOp(Operator):
    NAME = "fa2F@2.8.3"
    SUPPORTED_ATTN_BIAS_TYPES = (
        attn_bias.BlockDiagonalMask,
        attn_bias.BlockDiagonalCausalFromBottomRightMask,
        attn_bias.BlockDiagonalCausalLocalAttentionFromBottomRightMask,
        attn_bias.LocalAttentionFromBottomRightMask,
    )


class BwOp(FwOp):
    NAME = "fa2B@2.8.3"
    IS_DETERMINISTIC = False
