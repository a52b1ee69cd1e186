"""Reports as text: ``explain``, ``doctor`` and the support matrix."""
