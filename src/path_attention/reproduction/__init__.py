"""The state-tracking results of the PaTH paper, every number a cell: one model, one seed, one training."""
