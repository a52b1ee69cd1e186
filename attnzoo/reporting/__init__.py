"""Reports for people: ``explain``, ``doctor`` and the support matrix."""
