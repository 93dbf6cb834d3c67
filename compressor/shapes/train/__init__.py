"""Trains the pipelines and their judge from nothing: `python -m compressor.shapes.train --out FOLDER`."""
