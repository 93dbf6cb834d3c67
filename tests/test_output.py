"""Files written in one step."""

from pathlib import Path

import pytest

from compressor.output import write_whole


def test_a_file_is_whole_at_every_moment_of_its_being_replaced(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    write_whole(file, "former")
    write_text = Path.write_text

    def ended_half_way(self: Path, text: str, **options: str) -> int:
        write_text(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", ended_half_way)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "the new text")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert file.read_text() == "former"
    write_whole(file, "grün")
    assert file.read_bytes() == "grün".encode()
