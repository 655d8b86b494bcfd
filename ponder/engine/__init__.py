"""Executors: where the thinking steps run. `masked.masked` is the reference that every other one must agree with."""
