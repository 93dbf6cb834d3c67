"""Small text-to-image pipelines of our own, trained from nothing: coloured shapes on plain backgrounds.

    scenes      what a picture can show, and how it is drawn
    captions    what a picture is called in English, and how a caption is read back
    judge       a classifier that reads every attribute from a picture, and scores pictures against captions
    train       the command that makes all of it: `python -m compressor.shapes.train --out FOLDER`

The weights lie beside this file: `pipeline/` is a diffusers folder, found by `compressor.builtin.path("shapes")`, and
`pipeline-NAME/` another, found by `compressor.builtin.path("shapes-NAME")`; `hashes.json` lists them.
"""
