import dataclasses

import pytest

from compressor import units
from compressor.report.heat import Cell, Map, _blend, _text_on, error_map, sparsity_map, structure_map

from .conftest import make_group, make_neurons, make_row, make_rows, make_shrunk_rows


def cells(heat: Map) -> list[Cell]:
    return [cell for table in heat.tables for line in table.lines for cell in line.cells if cell]


def test_every_layer_has_a_cell():
    rows = make_rows(3)
    for heat in (error_map(rows), sparsity_map(rows)):
        assert heat is not None
        assert sorted(cell.title.partition(":")[0] for cell in cells(heat)) == sorted(row.name for row in rows)


def test_rows_are_blocks_and_columns_their_linears_grouped_by_module_and_stream():
    heat = error_map(make_rows(3))
    assert heat is not None
    (table,) = heat.tables
    assert [line.label for line in table.lines] == [
        "transformer_blocks 0",
        "transformer_blocks 1",
        "transformer_blocks 2",
    ]
    assert table.groups == (("attn · image", 2), ("attn · text", 1), ("ff · image", 1))
    assert [column.title for column in table.columns] == ["query", "output", "key", "down"]
    assert [cell is None for cell in table.lines[2].cells] == [False, False, True, False]


def test_two_attentions_of_one_block_have_columns_of_their_own():
    block = "down_blocks.1.attentions.0.transformer_blocks.3"
    rows = [make_row(f"{block}.{attn}.to_q", block=block) for attn in ("attn1", "attn2")]
    heat = error_map(rows)
    assert heat is not None
    (table,) = heat.tables
    assert table.groups == (("attn1 · image", 1), ("attn2 · image", 1))
    assert table.lines[0].label == "down_blocks 1.0.3"


def test_blocks_of_another_kind_have_a_table_of_their_own():
    single = make_row("single_transformer_blocks.0.proj_mlp", block="single_transformer_blocks.0", part="feed_forward",
                      role="up", stream="joint")  # fmt: skip
    heat = sparsity_map([*make_rows(2), single])
    assert [len(table.lines) for table in heat.tables] == [2, 1]
    assert heat.tables[1].groups == (("feed forward · joint", 1),)


def test_a_layer_pruned_twice_shows_the_last():
    heat = error_map([make_row(error=0.1), make_row(error=0.2)])
    assert heat is not None
    assert [cell.text for cell in cells(heat)] == ["0.20"]


def test_colours_are_logarithmic():
    errors = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    rows = [make_row(f"transformer_blocks.0.{i}", error=error) for i, error in enumerate(errors)]
    heat = error_map(rows)
    assert heat is not None
    paints = [cell.paint for cell in cells(heat)]
    assert paints == [paint for _, paint in heat.legend]
    assert [text for text, _ in heat.legend] == ["1.0e-4", "0.0010", "0.010", "0.10", "1.0"]
    assert len(set(paints)) == 5


def test_nearly_equal_errors_look_nearly_equal():
    heat = error_map([make_row("transformer_blocks.0.a", error=0.1), make_row("transformer_blocks.0.b", error=0.1001)])
    assert heat is not None
    assert heat.legend[0][0] == "0.010"


@pytest.mark.parametrize(("error", "text"), [(0.0, "0"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_odd_errors_are_printed_and_break_no_scale(error: float, text: str):
    heat = error_map([make_row("transformer_blocks.0.a", error=error), make_row("transformer_blocks.0.b", error=0.1)])
    assert heat is not None
    assert cells(heat)[0].text == text
    assert (cells(heat)[0].paint is None) == (error != 0)


def test_errors_that_are_all_zero_have_a_map():
    heat = error_map([make_row(error=0.0)])
    assert heat is not None
    assert cells(heat)[0].text == "0"


def test_a_layer_without_error_is_a_dash_with_its_zeros():
    heat = error_map([make_row("transformer_blocks.0.a", error=None), make_row("transformer_blocks.0.b")])
    assert heat is not None
    assert cells(heat)[0] == Cell("\N{EN DASH}", "transformer_blocks.0.a: no calibration error, 50.0 % zeros", None)


def test_a_layer_that_lost_rows_shows_the_share_that_left_in_place_of_an_error():
    heat = error_map(make_shrunk_rows())
    assert heat is not None
    query, output, up, down = cells(heat)
    name = "transformer_blocks.0"
    assert query == Cell(
        f"{units.MINUS}33.3 %", f"{name}.attn.to_q: no error of its own, 33.3 % of its weights removed", None
    )
    assert up.text == f"{units.MINUS}33.3 %"
    assert output.title == f"{name}.attn.to_out.0: relative error 0.0500, 33.3 % of its weights removed"
    assert output.paint
    assert output.paint == down.paint


def test_a_layer_that_lost_columns_and_was_not_calibrated_is_a_dash():
    down = make_shrunk_rows()[3]
    heat = error_map([dataclasses.replace(down, error=None), make_row()])
    assert heat is not None
    title = f"{down.name}: no calibration error, 33.3 % of its weights removed"
    assert cells(heat)[0] == Cell(units.DASH, title, None)


def test_weights_that_left_and_zeros_are_told_apart_and_coloured_together():
    (cell,) = cells(sparsity_map([make_row(removed=250, asked=500, zeros=250)]))
    assert cell.text == "50.0"
    assert cell.title == "transformer_blocks.0.attn.to_q: 25.0 % of its weights removed, 25.0 % zeros"


def test_what_was_kept_is_told_by_block_with_heads_and_neurons_apart():
    rows = (make_group(1), make_neurons(1), make_neurons(1, "ff_context"), make_group(2, after=3, removed=(0, 1, 5)))
    (table,) = structure_map(rows).tables
    assert table.groups == (("heads", 1), ("neurons", 2))
    assert [column.title for column in table.columns] == ["attn", "ff", "ff_context"]
    first, second = table.lines
    assert [cell and cell.text for cell in first.cells] == ["4 of 6 (192 → 128)", "512 of 768", "512 of 768"]
    assert [cell and cell.text for cell in second.cells] == ["3 of 6 (192 → 96)", None, None]
    assert second.cells[0]
    assert second.cells[0].title == "transformer_blocks.2.attn.heads: 50.0 % of its heads removed, indices 0, 1, 5"
    assert second.cells[0].paint == structure_map(rows).legend[2][1]


def test_a_group_that_kept_all_is_told_so():
    (cell,) = cells(structure_map([make_group(after=6, removed=())]))
    assert cell.text == "6 of 6 (192 → 192)"
    assert cell.title == "transformer_blocks.0.attn.heads: 0.0 % of its heads removed, indices none"


def test_without_any_error_there_is_no_error_map():
    assert error_map([make_row(error=None)]) is None


def test_pointing_at_a_cell_tells_the_layer_its_error_and_its_zeros():
    heat = error_map([make_row(error=0.01234)])
    assert heat is not None
    assert cells(heat)[0].title == "transformer_blocks.0.attn.to_q: relative error 0.0123, 50.0 % zeros"


def test_ramps_end_at_their_ends_and_blend_between():
    stops = ("#000000", "#102030", "#ffffff")
    assert [_blend(stops, at) for at in (0, 0.25, 0.5, 1)] == ["#000000", "#081018", "#102030", "#ffffff"]


def test_text_contrasts_with_its_background():
    rows = [make_row(f"transformer_blocks.0.{i}", error=10.0 ** (-i / 10), zeros=25 * i) for i in range(41)]
    errors = error_map(rows)
    assert errors is not None
    for cell in (*cells(errors), *cells(sparsity_map(rows))):
        assert cell.paint
        assert contrast(cell.paint.light, cell.paint.light_text) > 4.5
        assert contrast(cell.paint.dark, cell.paint.dark_text) > 4.5
    assert _text_on("#ffffff") == "#000000"


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4)
                   for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))  # fmt: skip

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
