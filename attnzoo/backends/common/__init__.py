"""Code that several backends share: blocks of queries, block lists, rows, masks, the union of partial softmaxes."""
