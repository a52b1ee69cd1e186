"""Reports as HTML pages: one file that works without a network, for the JSON of ``attnzoo bench`` and ``verify``."""
