"""Tests of 2:4 on GPUs; what is done on a GPU is stood in for by dense products where there is none."""
