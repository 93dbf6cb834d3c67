"""Keeps the libraries' own chatter off the terminal; their errors still come through."""

from __future__ import annotations

import logging
import warnings


def silence_libraries() -> None:
    """For the command line only: progress bars and log lines of diffusers and transformers, and their warnings."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|torch|torchmetrics|huggingface_hub)\b")
