"""The ``triton`` backend: the softmax over all segments in one kernel, forward and backward."""
