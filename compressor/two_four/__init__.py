"""2:4 sparse products on NVIDIA GPUs: the table of what they gain, and a runtime that uses what gains."""
