"""What several backends share: blocks of queries, rows, masks, the union of partial softmaxes."""
