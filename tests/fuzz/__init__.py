"""Random networks by every implementation, compared with plain PyTorch: `pytest tests/fuzz --networks 2000`.

A seed means one network, what goes into it and how it is used (draw.py), which each implementation does for two steps
(run.py). What may differ is measured on plain PyTorch itself (compare.py, noise.py).
"""
