"""Predict the times of attention modules on a GPU, on a machine without a GPU. A prediction is not a measurement.

``python -m attnzoo.benchmarks.gpu.prediction`` runs modules on the device ``meta``, where tensors have no values, and
counts what a GPU would have to do: launches, FLOPs of matrix products, and bytes read and written.

- work: what one operator, or one kernel of Triton, computes and moves.
- card: the data sheet of a GPU, and the assumptions that turn works into seconds.
"""
