"""The attention as one operator in the graphs of ``torch.compile`` and ``torch.export``."""
