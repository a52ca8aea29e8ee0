"""gpu.py: its parts, the devices that they run on, and its tables."""
