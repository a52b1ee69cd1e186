"""Shared by several backends: blocks of queries, block lists, rows, masks, and the union of partial softmaxes."""
