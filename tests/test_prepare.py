"""What is found out before anything slow is done."""

from __future__ import annotations

import pytest

from compressor import pipeline
from compressor.calibration import sampling
from compressor.errors import CompressorError
from compressor.recipe import Model
from tests import tiny


def test_a_shorter_t5_part_gives_the_network_fewer_text_tokens():
    folder = tiny.folder("sd3")
    loaded = pipeline.load(Model(source=str(folder)), "cpu")
    for length in (None, 10):
        encoded = sampling.encode(loaded, ["a cat"], 3.0, 0, "pictures", length)
        assert encoded[0].tensors["prompt_embeds"].shape[1] == loaded.folder.text_tokens(length)
        assert encoded[0].tensors["negative_prompt_embeds"].shape[1] == loaded.folder.text_tokens(length)
    assert loaded.folder.text_tokens() - loaded.folder.text_tokens(10) == 246


@pytest.mark.parametrize(
    ("kind", "length", "message"),
    [
        ("sd2", 10, "calibration.max_sequence_length has no effect: StableDiffusionPipeline takes none; remove it"),
        ("flux", 513, "calibration.max_sequence_length: should be at most 512, found 513"),
    ],
)
def test_a_length_that_does_not_fit_the_pipeline_is_refused(kind: str, length: int, message: str):
    folder = pipeline.open_folder(Model(source=str(tiny.folder(kind))))
    with pytest.raises(CompressorError) as error:
        folder.check_sequence(length)
    assert str(error.value) == message
