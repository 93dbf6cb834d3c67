"""Tests of the benchmarks: what is timed and how it is told, never how long it took."""
