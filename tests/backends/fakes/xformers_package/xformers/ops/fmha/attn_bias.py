"""The biases of xformers 0.0.35 that attnzoo uses, with their constructors and errors."""

import torch


class AttentionBias:
    pass


class _SeqLenInfo:
    def __init__(self, lengths, device):
        assert not isinstance(lengths, torch.Tensor) and device is not None
        self.lengths = list(lengths)
        self.seqstart_py = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        self.seqstart = torch.tensor(self.seqstart_py, dtype=torch.int32, device=device)
        self.max_seqlen = max(self.lengths)


class LocalAttentionFromBottomRightMask(AttentionBias):
    def __init__(self, window_left, window_right):
        if window_left < 0 or window_right < 0:
            raise ValueError("Invalid window value passed to `LocalAttentionFromBottomRightMask`")
        self.window_left, self.window_right = window_left, window_right


class BlockDiagonalMask(AttentionBias):
    def __init__(self, q_seqinfo, k_seqinfo, _batch_sizes=None):
        self.q_seqinfo, self.k_seqinfo = q_seqinfo, k_seqinfo

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert kv_seqlen is None or len(q_seqlen) == len(kv_seqlen)
        kv_seqlen = q_seqlen if kv_seqlen is None else kv_seqlen
        return cls(_SeqLenInfo(q_seqlen, device), _SeqLenInfo(kv_seqlen, device))

    def make_causal_from_bottomright(self):
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo)

    def make_local_attention_from_bottomright(self, window_size):
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, window_size)


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def __init__(self, q_seqinfo, k_seqinfo):
        super().__init__(q_seqinfo, k_seqinfo)
        for queries, keys in zip(q_seqinfo.lengths, k_seqinfo.lengths, strict=True):
            if keys < queries:
                raise ValueError(f"num_keys={keys} and num_queries={queries}. Expected `num_keys >= num_queries`")


class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    def __init__(self, q_seqinfo, k_seqinfo, _window_size):
        super().__init__(q_seqinfo, k_seqinfo)
        if _window_size <= 0:
            raise ValueError(f"Expected `window_size > 0`, but window_size={_window_size}")
        self._window_size = _window_size
