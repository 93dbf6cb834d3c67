"""Trains the pipeline and its judge from nothing: `python -m compressor.shapes.train --out FOLDER`."""
