"""Engines for the dense part: softmax attention between sibling spans, with its log-sum-exp."""
