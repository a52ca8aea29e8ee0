"""speed.py: its measurements, its tables and targets, and its sweep of batch sizes."""
