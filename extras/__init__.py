"""What one need not read to understand FAR. Run as `python -m extras.NAME` from the folder above."""
