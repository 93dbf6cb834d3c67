import dataclasses
import re
from html.parser import HTMLParser

import pytest
import yaml

from compressor.plugin import Samples
from compressor.report import CalibrationFacts, ExportFacts, ModelFacts, ProofFacts, Report, Structure, write
from compressor.report.page import SHOWN, render

from .conftest import make_group, make_neurons, make_row

ASCII = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{MULTIPLICATION SIGN}": "x"})


class Page(HTMLParser):
    """The elements and the visible text of a page, signs as on a keyboard; checks that what opens is closed."""

    VOID = ("meta", "img", "br", "col")

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words)).translate(ASCII)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    def find(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and attributes.items() <= found.items()]


@pytest.fixture
def page(report: Report, samples: Samples) -> Page:
    return Page(render(report, samples))


def test_the_page_needs_nothing_but_itself(report: Report, samples: Samples):
    html = render(report, samples)
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name, "data:") or "").startswith("data:")
    assert "url(" not in html
    assert "@import" not in html
    assert not re.search(r"https?://", html)


def test_whatever_the_user_wrote_is_escaped(report: Report, samples: Samples):
    evil = "<script>alert('\"x\"')</script>"
    report = dataclasses.replace(
        report,
        recipe={"output": evil},
        versions={evil: evil},
        device=evil,
        model=ModelFacts(*(evil,) * 6),
        layers=(make_row(f"{evil}.x", block=evil, part=evil, role=evil, stream=evil, pruner=evil, notes=(evil,)),),
        times={evil: 1.0},
        peak_memory={evil: 1},
        calibration=CalibrationFacts(1, 1, 1.0, 1, 1, 1, 1, 1, 1, {evil: 1}),
        metrics={evil: {evil: 1.0}},
        exports=(ExportFacts(evil, {evil: 1}, {evil: evil}),),
        structure=Structure((make_group(name=f"{evil}.x", block=evil, kind=evil),), (evil,), ()),
        warnings=(evil,),
    )
    html = render(report, dataclasses.replace(samples, prompts=(evil,) * 4))
    assert "<script" not in html
    page = Page(html)
    assert page.text.count(evil) > 15
    assert len(page.find("img", alt=f"dense: {evil}")) == 4


def test_every_pair_is_shown_with_its_caption_and_psnr(page: Page, samples: Samples):
    assert len(page.find("img")) == 8
    for prompt in samples.prompts:
        assert prompt in page.text
    assert len(re.findall(r"PSNR \d+\.\d dB", page.text)) == 4
    assert "Shown pixel by pixel." in page.text


def test_an_equal_pair_is_called_so(report: Report, samples: Samples):
    page = Page(render(report, dataclasses.replace(samples, pruned=samples.dense)))
    assert page.text.count("bit for bit equal") == 4


def test_of_many_pairs_the_first_are_shown(report: Report, samples: Samples):
    many = Samples(samples.prompts * 10, *(getattr(samples, name).repeat(10, 1, 1, 1) for name in
                   ("dense", "pruned", "dense_latents", "pruned_latents")))  # fmt: skip
    page = Page(render(report, many))
    assert len(page.find("img")) == 2 * SHOWN
    assert "The first 24 of 40 pairs." in page.text


def test_without_samples_there_are_no_pictures(report: Report):
    page = Page(render(report, None))
    assert not page.find("img")
    assert "Pictures" not in page.text


def test_large_pictures_say_that_they_were_made_smaller(report: Report, samples: Samples):
    large = dataclasses.replace(
        samples, dense=samples.dense.repeat(1, 1, 4, 4), pruned=samples.pruned.repeat(1, 1, 4, 4)
    )
    assert "Shown as JPEG of at most 512 pixels." in Page(render(report, large)).text


def test_the_headline_has_what_was_asked_and_what_was_reached(page: Page):
    assert "builtin:shapes, pruned by obs_diff" in page.text
    assert "Zeros in the pruned layers 50.0 % asked for 50.0 %" in page.text
    assert "Zeros in the whole transformer 55.0 % before: 0.0 %" in page.text
    assert "Non-zero parameters 4.50 k before: 10.0 k" in page.text
    assert "PSNR, pruned against dense 31.23 ± 0.50 dB mean of 4 pairs" in page.text


def test_the_judges_verdict_is_in_the_headline_and_in_the_table(report: Report):
    one_object = {"dense_one_object": 0.95, "dense_one_object_se": 0.01} | {
        "pruned_one_object": 0.9,
        "pruned_one_object_se": 0.02,
    }
    shapes = {**one_object, "frechet": 1.5, "images": 300.0}
    page = Page(render(dataclasses.replace(report, metrics={"shapes": shapes}), None))
    assert "Images all right, one object 90.0 ± 2.0 % dense: 95.0 ± 1.0 %" in page.text
    assert "dense pruned pruned against dense Judge of shapes, 300 pairs" in page.text
    assert "Everything right, one object 95.0 ± 1.0 % 90.0 ± 2.0 %" in page.text
    assert "Frechet distance of the judge's features (0 is equal) 1.50" in page.text


def test_figures_of_pairs_alone_need_no_columns_for_either_side(page: Page):
    assert "pruned against dense Pairs of images, 4 pairs PSNR (higher is nearer) 31.23 ± 0.50 dB" in page.text
    assert "dense pruned pruned against dense" not in page.text


def test_figures_of_a_metric_from_elsewhere_are_shown_under_their_own_names(report: Report):
    page = Page(render(dataclasses.replace(report, metrics={"clip": {"pruned_clip_score": 0.3, "gap": 0.01}}), None))
    assert "clip clip score 0.300 gap 0.0100" in page.text


def test_zeros_alone_are_said_to_buy_nothing_by_themselves(page: Page):
    assert "5.50 k of 10.0 k parameters are zero." in page.text
    assert "neither the files smaller (20.0 kB on disk before, 20.0 kB after) nor dense kernels faster" in page.text
    assert "they are counted, not timed" in page.text
    for word in ("What left the network", "parameters left with", "removed", "outputs x inputs", "gone"):
        assert word not in page.text


def test_the_error_map_has_a_cell_for_each_layer(page: Page, report: Report):
    titles = {cell["title"] for cell in page.find("td") if "title" in cell}
    for row in report.layers:
        assert any(title and title.startswith(f"{row.name}: relative error") for title in titles)
        assert f"{row.name}: 50.0 % zeros" in titles


def test_equal_sparsity_is_said_in_a_sentence_and_its_map_folded(page: Page, report: Report):
    assert "50.0 % of the weights of every layer are zero." in page.text
    assert [("open" in details) for details in page.find("details")] == [False, False, True]
    other = dataclasses.replace(report, layers=(*report.layers, make_row("transformer_blocks.0.x", zeros=600)))
    uneven = Page(render(other, None))
    assert "of the weights of every layer" not in uneven.text
    assert "(asked for 500)" in uneven.text
    assert [("open" in details) for details in uneven.find("details")] == [True, False, True]


def test_without_calibration_that_is_said(report: Report):
    plain = tuple(dataclasses.replace(row, error=None, damping=None, pruner="magnitude") for row in report.layers)
    page = Page(render(dataclasses.replace(report, layers=plain, calibration=None), None))
    assert "No layer's error is known: the pruner gathered no inputs." in page.text
    assert "None: the pruner looks at weights alone." in page.text


def test_every_layer_is_in_the_table(page: Page, report: Report):
    assert f"All {len(report.layers)} layers as a table" in page.text
    for row in report.layers:
        assert f"{row.name} {row.stream} {row.role} {row.pruner} 1.00 k 500 50.0 %" in page.text


def test_times_memory_calibration_exports_versions_and_warnings_are_told(page: Page):
    for words in (
        "load 1.2 s calibrate 3 min 20 s together 3 min 21 s",
        "Peak memory, CPU resident 1.40 GB",
        "Prompts 128, 16 at a time Sampling 20 steps, guidance 3 Packages 4",
        "Forwards of the transformer 160, of which 107 differentiated; 480 further calls were held, and got the last",
        "Tokens skipped as not finite 7",
        "transformer_blocks.0.attn.to_q 7",
        "onnx, 2.5 s onnx/transformer.onnx 18.4 MB shapes 1, largest 1e-06 2:4 yes",
        "torch 2.13.0",
        "1 thing to know the calibration has few tokens",
    ):
        assert words in page.text
    assert "GPU" not in page.text.replace("NVIDIA GPUs", "")


def test_where_no_gradients_were_gathered_forwards_are_just_counted(report: Report):
    assert report.calibration is not None
    plain = dataclasses.replace(report.calibration, differentiated=0, held=0)
    page = Page(render(dataclasses.replace(report, calibration=plain), None))
    assert "Forwards of the transformer 160 Tokens gathered" in page.text


def test_the_recipe_can_be_copied_from_the_page(report: Report):
    html = render(report, None)
    assert yaml.safe_load(html.partition("<pre>")[2].partition("</pre>")[0]) == report.recipe


def test_tables_have_headers_and_pictures_have_words(page: Page):
    assert all(cell.get("scope") for cell in page.find("th"))
    assert all(image.get("alt") for image in page.find("img"))
    assert page.find("html", lang="en")


def test_two_pruners_have_a_row_each(report: Report):
    layers = (*report.layers, make_row("transformer_blocks.0.x", pruner="wanda", asked=250, zeros=250))
    page = Page(render(dataclasses.replace(report, layers=layers), None))
    assert "pruned by obs_diff and wanda" in page.text
    assert "wanda 1 1.00 k 25.0 % 25.0 %" in page.text


def test_the_headline_of_a_structured_run_has_sizes_and_shares_before_and_after(shrunk: Report):
    text = Page(render(shrunk, None)).text
    assert "Weights gone in the pruned layers 33.3 % asked for 30.0 %: heads 33.3 %, neurons 33.3 %" in text
    assert "Parameters of the transformer 8.00 k before: 10.0 k (-20.0 %)" in text
    assert "Multiply-adds of one forward 600 k before: 800 k (-25.0 %)" in text
    assert "zero" not in text.partition("Figures")[0]


def test_shares_that_no_option_asked_for_are_told_alone(shrunk: Report):
    groups = (make_group(asked=None), make_neurons(asked=None))
    text = Page(render(dataclasses.replace(shrunk, structure=Structure(groups, (), ())), None)).text
    assert "Weights gone in the pruned layers 33.3 % heads 33.3 %, neurons 33.3 %" in text
    assert "asked for" not in text.partition("What each pruner was asked for")[0]
    assert "Proof" not in text


def test_shares_that_differ_are_asked_for_kind_by_kind(shrunk: Report):
    groups = (make_group(asked=0.25), make_group(1, asked=0.35), make_neurons(asked=0.4))
    text = Page(render(dataclasses.replace(shrunk, structure=Structure(groups, (), ())), None)).text
    assert "heads 33.3 %, asked for 30.0 %; neurons 33.3 %, asked for 40.0 %" in text


def test_an_unknown_share_beside_a_known_one_is_a_dash(shrunk: Report):
    groups = (make_group(), make_neurons(asked=None))
    text = Page(render(dataclasses.replace(shrunk, structure=Structure(groups, (), ())), None)).text
    assert "heads 33.3 %, asked for 30.0 %; neurons 33.3 %" in text
    assert "heads 1 attention 6 4 33.3 % 30.0 % neurons 1 feed-forward 768 512 33.3 % -" in text


def test_a_run_of_both_kinds_tells_what_is_gone_from_what_is_zero(mixed: Report):
    page = Page(render(mixed, None))
    assert "Weights gone or zero in the pruned layers 33.4 % 33.3 % gone, 0.1 % zero" in page.text
    assert "Non-zero parameters 5.00 k before: 10.0 k" in page.text
    assert (
        "pruner layers weights removed zeros asked for zeros counted obs_diff 8 737 k 33.3 % 0.0 % 0.0 %" in page.text
    )
    assert "wanda 1 1.00 k 0.0 % 50.0 % 50.0 %" in page.text
    assert "What the removal and the zeros buy, and what they do not" in page.text
    assert "2.00 k of 10.0 k parameters left with heads and neurons." in page.text
    assert "3.00 k of 8.00 k parameters are zero. Zeros are stored like any other number" in page.text
    assert "neither the files smaller nor dense kernels faster" in page.text
    assert "Multiply-adds of one forward, dense 800 k 600 k -25.0 % Multiply-adds on non-zero weights only" in page.text
    assert "The share of each layer's weights that is gone or zero, in percent" in page.text


def test_seven_tiles_stand_in_rows_of_four(mixed: Report):
    metrics = {"pairs": {"psnr": 31.0}, "shapes": {"pruned_one_object": 1.0, "dense_one_object": 1.0,
               "pruned_two_objects": 1.0, "dense_two_objects": 1.0}}  # fmt: skip
    page = Page(render(dataclasses.replace(mixed, metrics=metrics), None))
    assert page.find("dl", style="--n:4")
    assert len(page.find("div", **{"class": "tile"})) == 7


def test_removal_alone_says_what_it_buys_and_nothing_of_zeros(shrunk: Report):
    page = Page(render(shrunk, None))
    assert "What the removal buys 2.00 k of 10.0 k parameters left with heads and neurons." in page.text
    assert "the files are smaller (20.0 kB on disk before, 16.0 kB after) and every runtime" in page.text
    assert "counted, not timed: how much faster they are done depends on the device" in page.text
    assert "pruner layers weights removed obs_diff 8 737 k 33.3 %" in page.text
    assert "zero weights" not in page.text.replace("kernels for sparse weights", "")
    assert "Non-zero parameters" not in page.text
    assert "Multiply-adds of one forward 800 k 600 k -25.0 % Bytes on disk" in page.text


def test_what_left_is_told_by_kind_and_by_block(shrunk: Report):
    page = Page(render(shrunk, None))
    assert "where any left before after gone asked for heads 2 attentions 12 8 33.3 % 30.0 %" in page.text
    assert "neurons 2 feed-forwards 1.54 k 1.02 k 33.3 % 30.0 %" in page.text
    assert "transformer_blocks 1 512 of 768 4 of 6 (192 → 128)" in page.text
    assert "and for heads the attention's width before → after. The colour is the share that left." in page.text
    assert page.find("td", title="transformer_blocks.2.attn.heads: 33.3 % of its heads removed, indices 1, 4")


def test_neurons_alone_need_no_words_on_widths(shrunk: Report):
    structure = Structure((make_neurons(1),), (), ())
    text = Page(render(dataclasses.replace(shrunk, structure=structure), None)).text
    assert "How many are kept of how many there were. The colour is" in text
    assert "parameters left with neurons." in text


def test_the_proof_is_a_sentence_with_the_worst_of_all_entries(shrunk: Report):
    assert shrunk.structure
    text = Page(render(shrunk, None)).text
    assert "Proof that nothing else changed: given the same inputs, every layer and block computes without what" in text
    assert (
        "off by 1.5e-7 (tolerated: 1e-4) of its output's norm, the whole network by 0.0022 (tolerated: 0.01)." in text
    )
    proofs = (*shrunk.structure.proofs, ProofFacts(3e-6, 1e-4, 0.0, 1e-2))
    both = dataclasses.replace(shrunk, structure=dataclasses.replace(shrunk.structure, proofs=proofs))
    text = Page(render(both, None)).text
    assert "off by 3.0e-6 (tolerated: 1e-4) of its output's norm, the whole network by 0.0022" in text


def test_where_the_dependency_graph_was_overridden_is_told_with_the_reason(shrunk: Report):
    assert shrunk.structure
    assert "torch-pruning's dependency graph agrees with all of it." in Page(render(shrunk, None)).text
    why = "attn.heads: the graph takes nothing; the table counts: it lost the place"
    structure = dataclasses.replace(shrunk.structure, overrides=(why,))
    text = Page(render(dataclasses.replace(shrunk, structure=structure), None)).text
    assert f"agrees with torch-pruning's dependency graph but for this, where the graph is overridden: {why}" in text
    assert "agrees with all of it" not in text


def test_layers_that_lost_rows_or_columns_have_their_shapes_before_and_after(shrunk: Report):
    text = Page(render(shrunk, None)).text
    assert "outputs x inputs weights removed share error damping time notes" in text
    start = "transformer_blocks.1."
    assert f"{start}attn.to_q image query obs_diff 192 x 192 → 128 x 192 36.9 k 12288 33.3 % - - -" in text
    assert f"{start}attn.to_out.0 image output obs_diff 192 x 192 → 192 x 128 36.9 k 12288 33.3 % 0.0500" in text
    assert f"{start}ff.net.0.proj image up obs_diff 768 x 192 → 512 x 192 147 k 49152 33.3 % - - -" in text
    assert f"{start}ff.net.2 image down obs_diff 192 x 768 → 192 x 512 147 k 49152 33.3 % 0.0500" in text


def test_a_layer_that_kept_its_shape_has_one(mixed: Report):
    text = Page(render(mixed, None)).text
    assert "transformer_blocks.3.attn.to_q image query wanda 50 x 20 1.00 k 0 500 50.0 %" in text


def test_zeros_that_nobody_asked_for_are_counted_beside_what_left(shrunk: Report):
    first, *others = shrunk.layers
    odd = dataclasses.replace(first, zeros=3, notes=("3 more weights are zero than asked",))
    text = Page(render(dataclasses.replace(shrunk, layers=(odd, *others)), None)).text
    assert "weights removed zeros share" in text
    assert "12288 3 (asked for 0) 33.3 %" in text
    assert "Weights gone in the pruned layers" in text


def test_the_error_map_shows_what_left_a_layer_that_has_no_error_of_its_own(shrunk: Report):
    page = Page(render(shrunk, None))
    assert "A layer that only lost rows has no error of its own; without colour, the share of its weights" in page.text
    (cell,) = page.find(
        "td", title="transformer_blocks.1.attn.to_q: no error of its own, 33.3 % of its weights removed"
    )
    assert cell["class"] == "bare"
    assert "transformer_blocks 1 -33.3 % 0.050 -33.3 % 0.050" in page.text


def test_what_is_gone_by_layer_is_folded_where_the_blocks_tell_it(shrunk: Report):
    page = Page(render(shrunk, None))
    assert "33.3 % of the weights of every layer are gone." in page.text
    assert [("open" in details) for details in page.find("details")] == [False, False, True]
    assert page.find("div", **{"aria-label": "Share of weights gone, table 1"})


def test_writing_gives_the_same_bytes_twice(report: Report, samples: Samples, tmp_path):
    for name in ("a", "b"):
        write(report, samples, tmp_path / name)
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()
