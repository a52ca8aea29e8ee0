"""Data sets, their images, and batches of them on the device."""
