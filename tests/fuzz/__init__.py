"""Random networks by every implementation, compared with plain PyTorch: `pytest tests/fuzz --networks 2000`.

A seed stands for one network, its inputs and the way it is used (draw.py). Each implementation runs it for two steps
(run.py). Plain PyTorch's own rounding errors decide how far results may differ (compare.py, noise.py).
"""
