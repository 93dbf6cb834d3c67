"""Benchmarks: how fast a network of a known model's size runs here, dense and made smaller; weights are random."""
