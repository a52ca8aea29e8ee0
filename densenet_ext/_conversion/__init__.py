"""Modules of other libraries that run fused in place: how they are found, proved, changed, and what they do then.

specs, heads    tables: the parts of dense layers, and what networks call after their features
recognition     finds the parts of a model; checks proves by comparison what they compute
classes         changes a module's class, and back; settings is what a changed module knows
modules         what changed modules do; views reads other libraries' modules under this package's names
"""
