"""Halting rules: when thinking stops. One file a rule; a rule has no parameters, no model and no loop.

`fixed.Fixed` runs every step, `act.Act` is adaptive computation time (Graves 2016), `pondernet.PonderNet` is PonderNet
(Banino et al. 2021). `ponder.protocols.Rule` says what a rule must answer. Rules are configuration too, so these files
load without jax.
"""
