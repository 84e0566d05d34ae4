"""Figures say what they show: names of the tables, legends beside the data, marks for what is missing."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from decur_core.data import modality
from decur_core.losses import METHODS
from decur_core.report import figures as plots
from decur_core.report import pictures, styles


@pytest.fixture
def random():
    return np.random.default_rng(0)


def legend_of(figure) -> list[str]:
    assert not any(axis.get_legend() for axis in figure.axes), "it would cover data"
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_methods_have_the_names_and_the_order_of_the_tables():
    methods = ["decur", "supervised", "barlow_twins", "random"]
    expected = ["Random initialisation", "Supervised", "Barlow Twins", "DeCUR"]
    same = {"inputs": "both", "fraction": 1.0, "protocol": "linear", "mean": 50.0, "deviation": None}
    assert legend_of(plots.scores([{"method": m, **same} for m in methods])) == expected
    assert legend_of(plots.per_class({m: [1.0, None] for m in methods}, classes=["a", "b"])) == expected
    assert [styles.title(m) for m in METHODS] == [m.title for m in METHODS.values()]
    assert len({styles.colour(m) for m in METHODS}) == len(METHODS)


def test_a_label_tells_its_method():
    assert styles.method_of("Barlow Twins, single modality, sar, seed 0") == "barlow_twins_single"
    assert styles.method_of("Barlow Twins, seed 3") == "barlow_twins" and styles.method_of("DeCUR") == "decur"
    assert styles.method_of("within modality 1") is None
    assert styles.title("rgb, common") == "RGB, common" and styles.title("depth") == "depth"
    assert styles.title("sar+dem") == "SAR + elevation" and styles.title("intra/hha") == "intra-modal, HHA"
    assert styles.colour("intra/sar") == styles.colour("sar") and styles.colour("nobody") == styles.colour("nobody")


def test_only_matrices_of_decur_and_of_no_run_have_a_border():
    names = ["DeCUR, seed 0", "VICReg, seed 0", "Barlow Twins, single modality, sar, seed 0", "across modalities"]
    figure = plots.correlation({name: np.eye(4) for name in names}, dim_common=3)
    assert [len(axis.lines) for axis in figure.axes[:4]] == [2, 0, 0, 2]
    assert "\n" in figure.axes[2].get_title()


def test_losses_have_plain_ticks_and_one_legend():
    runs = {"DeCUR": [{"step": k, "total": 30.0 - k, "unique": 0.1} for k in range(10)]}
    runs["CLIP"] = [{"step": k, "total": 5.8 - k / 10} for k in range(10)]
    figure = plots.history(runs, smooth=2)
    assert legend_of(figure) == ["total", "unique"]
    figure.canvas.draw()
    for axis in figure.axes:
        texts = [t.get_text() for t in axis.get_yticklabels(which="both")]
        assert any(texts) and all(float(t) > 0 for t in texts if t)


def test_terms_that_begin_later_are_drawn_from_there_on():
    """A run with ``dim_common: auto`` begins with intra-modal terms alone; the others come with the split."""
    lines = [{"step": k, "total": 9.0 - k, "intra/sar": 5.0} for k in (1, 2)]
    lines += [{"step": k, "total": 9.0 - k, "common": 1.0, "unique": 2.0, "intra/sar": 5.0} for k in (3, 4, 5)]
    figure = plots.history({"DeCUR, auto": lines}, smooth=2)
    drawn = {line.get_label(): line.get_xdata().tolist() for line in figure.axes[0].lines if line.get_linewidth() > 1}
    late, whole = [4, 5], [2, 3, 4, 5]
    assert drawn == {"total": whole, "intra-modal, SAR": whole, "common": late, "unique": late}


def test_without_a_run_there_is_an_empty_panel():
    """Chapters draw runs of seed 0, which a profile need not have."""
    assert not plots.history({}).axes[0].axison and not plots.correlation({}, dim_common=2).axes[0].axison


def test_a_dollar_in_the_name_of_a_class_is_a_dollar():
    classes = ["fares of $1 to $5", r"$\frac$"]
    sample = {"id": "x", "mask": np.eye(8, dtype=np.uint8)}
    for made in (
        plots.per_class({"decur": [1.0, 2.0]}, classes=classes),
        pictures.scenes([sample], ["mask"], classes=classes),
    ):
        made.draw_without_rendering()


def test_losses_are_named_by_their_modalities_and_told_apart():
    terms = ["total", "intra/sar", "intra/dem", "common/sar+dem", "rest/sar+dem", "rest/sar+optical"]
    line = {"step": 1, "learning_rate": 0.1, "pairs_per_second": 5.0, "scale": 3.0, **dict.fromkeys(terms, 1.0)}
    figure = plots.history({"a run": [line, line | {"step": 2}]})
    expected = ["total", "intra-modal, SAR", "intra-modal, elevation", "common, SAR + elevation"]
    assert legend_of(figure) == [*expected, "rest, SAR + elevation", "rest, SAR + optical"]
    drawn = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines if line.get_linewidth() > 1]
    assert len(set(drawn)) == len(terms)


def test_dimensions_of_a_pair_say_which_modality_is_the_first(random):
    points = {"rgb_dem": random.normal(size=(8, 2)), "a run": random.normal(size=(8, 2))}
    pair = {"rgb": {"rgb+dem": slice(0, 3), "rgb": slice(3, 4)}, "dem": {"rgb+dem": slice(0, 3), "dem": slice(3, 4)}}
    figure = plots.dimensions(points, blocks={"rgb_dem": pair, "a run": pair})
    assert [axis.get_title() for axis in figure.axes] == ["RGB (first), elevation (second)", "a run"]
    assert len(legend_of(figure)) == 4
    drawn = [np.asarray(c.get_offsets()) for c in figure.axes[0].collections]
    place = points["rgb_dem"]
    for found, expected in zip(drawn, (place[:3], place[3:4], place[4:7], place[7:]), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_dimensions_of_three_modalities_of_unequal_widths(random):
    layout = {"a": {"a": slice(0, 1), "a+b": slice(1, 3)}, "b": {"a+b": slice(0, 2), "b": slice(2, 2)}}
    layout["c"] = {"c": slice(0, 4)}
    figure = plots.dimensions({"x": random.normal(size=(9, 2))}, blocks={"x": layout})
    assert [len(c.get_offsets()) for c in figure.axes[0].collections] == [2, 1, 2, 0, 0, 4]
    with pytest.raises(ValueError, match="10 points for 9 dimensions of a, b, c"):
        plots.dimensions({"x": random.normal(size=(10, 2))}, blocks={"x": layout})


def test_alignment_has_the_colours_of_methods_and_says_what_it_cuts(random):
    figure = plots.alignment({"DeCUR, seed 0": random.uniform(0, 1.5, 50), "something": random.uniform(0, 1, 50)})
    assert figure.axes[0].patches[0].get_edgecolor() == plt.matplotlib.colors.to_rgba(styles.colour("decur"))
    assert figure.axes[0].get_xticklabels()[-1].get_text() == "≥ 1"


def test_panels_on_one_scale_show_the_highest_of_all():
    made = plots.curve_panels(
        {"low": {"a": {0: [0.1], 1: [0.2]}}, "high": {"a": {0: [0.1], 1: [0.9]}}}, xlabel="x", ylabel="y"
    )
    assert all(axis.get_ylim()[0] == -0.03 and axis.get_ylim()[1] > 0.9 for axis in made.axes)


def test_a_legend_of_long_names_is_no_wider_than_its_figure():
    """A page scales a figure that is wider than its column, and with it the text."""
    names = [f"drawn world of radar and optical images, {way}, with all labels" for way in ("finetune", "linear")]
    made = plots.curves({name: {0: [1.0], 32: [2.0]} for name in names}, xlabel="x", ylabel="y")
    made.canvas.draw()
    assert made.legends[0].get_window_extent().width <= made.bbox.width


def test_series_of_one_seed_are_marked():
    figure = plots.curves({"many": {1: [1, 2], 2: [3]}, "few": {1: [1], 2: [2]}}, xlabel="x", ylabel="y")
    assert legend_of(figure) == ["many", "few (one seed)"]


def test_histograms_share_bins_of_whole_numbers_and_name_bands(random):
    images = random.integers(0, 200, (3, 13, 8, 8)).astype(np.uint8)
    images[:, 10] = 3
    axis = plots.histograms({"optical": images}, unit="8-bit value").axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axis.lines}
    assert list(lines)[-3:] == ["B10", "B11", "B12"] and axis.get_yscale() == "log"
    assert len({str(line.get_color()) for line in axis.lines}) == 13
    assert all(np.nansum(points[:, 1]) == pytest.approx(1) for points in lines.values())
    assert np.nanmax(lines["B10"][:, 1]) == 1 and np.allclose(np.diff(lines["B1"][:, 0]), 4)
    real = plots.histograms({"sar": random.normal(size=(3, 2, 8, 8))}, unit="dB").axes[0]
    assert [np.nansum(line.get_ydata()) for line in real.lines] == pytest.approx([1, 1])
    flat = plots.histograms({"dem": np.full((3, 1, 8, 8), 7, np.uint8)}, unit="8-bit value").axes[0]
    assert np.nansum(flat.lines[0].get_ydata()) == 1


def test_empty_saliency_and_the_range_of_radar_are_written_in(random):
    image, heat = random.random((3, 8, 8)), random.random((8, 8))
    row = {"rgb": image, "rgb, common": (image, heat), "rgb, unique": (image, np.zeros((8, 8)))}
    axes = pictures.saliency([row], list(row)).axes
    assert [[t.get_text() for t in axis.texts] for axis in axes] == [[], [], ["empty"]]
    assert axes[1].get_title() == "RGB,\ncommon"
    radar = np.stack([np.full((8, 8), -12.0), np.full((8, 8), -20.0)])
    axes = pictures.pairs([{"id": "a/b", "optical": random.random((1, 13, 8, 8)), "sar": radar[None]}]).axes
    assert [axis.get_title() for axis in axes] == ["b", "-12 to -12 dB", "-20 to -20 dB"]


def test_what_is_not_a_number_is_a_dash_and_zero_has_no_sign():
    axis = plots.matrix({"a": {"row": {"x": np.nan, "y": -0.001, "z": 0.5}}}, unit="R2").axes[0]
    assert [text.get_text() for text in axis.texts] == ["–", "0.00", "0.50"]


def test_no_text_of_a_figure_is_smaller_than_7_points():
    """At 7 inches, the page's column, that is 9 px."""
    sources = [Path(module.__file__).read_text() for module in (plots, pictures, styles)]
    sizes = [int(size) for text in sources for size in re.findall(r'fontsize"?[=:] ?(\d+)', text)]
    assert len(sizes) > 20 and min(sizes) >= 7 and styles.WIDEST == 7


def test_ways_of_a_benchmark_differ_in_colour():
    axis = plots.bars([""], {"published": [9], "ours": [2], "ours, gravity given": [1]}, unit="ms").axes[0]
    assert len({bar.get_facecolor() for bar in axis.patches}) == 3


def test_histograms_take_any_number_of_bands():
    random = np.random.default_rng(0)
    values = {"optical": random.integers(0, 256, (2, 4, 8, 8), np.uint8), "sar": random.normal(size=(2, 1, 8, 8))}
    optical, sar = plots.histograms(values, unit="x").axes
    assert [line.get_label() for line in optical.lines] == [f"band {k}" for k in (1, 2, 3, 4)] and len(sar.lines) == 1


def test_images_without_a_unit_are_shown_without_one(monkeypatch):
    own = {"radar": modality.declared("radar", {"bands": ["a", "b"], "unit": ""})}
    monkeypatch.setattr(pictures, "modalities", lambda: own)
    sample = {"id": "x", "radar": np.stack([np.full((8, 8), 3.0), np.full((8, 8), 9.0)])}
    assert [axis.get_title() for axis in pictures.pairs([sample]).axes] == ["x\n3 to 3", "9 to 9"]


def test_pictures_of_any_modality(random):
    sample = {"id": "x", "dem": random.normal(300, 5, (1, 8, 8)), "rgb": random.integers(0, 255, (3, 8, 8), np.uint8)}
    axes = pictures.pairs([sample]).axes
    assert [axis.get_ylabel() for axis in axes] == ["red green blue", "elevation"]
    assert np.array_equal(axes[0].images[0].get_array(), sample["rgb"].transpose(1, 2, 0))
    assert axes[1].get_title().endswith(" m")
    with pytest.raises(ValueError, match="no known modality among id, thermal"):
        pictures.pairs([{"id": "x", "thermal": sample["dem"]}])
    optical = random.random((13, 8, 8))
    np.testing.assert_array_equal(pictures.picture(optical, "optical"), pictures.stretch(optical[[3, 2, 1]], 1, 99))
    grey = pictures.picture(optical[:2], "sar")
    assert grey.shape == (8, 8, 3) and np.ptp(grey, axis=2).max() == 0
    seasons = {"dem": np.stack([sample["dem"]] * 3), "rgb": np.stack([sample["rgb"]] * 3)}
    titles = [axis.get_title() for axis in pictures.seasons(seasons | {"dates": {"rgb": ["20200101", "b", "c"]}}).axes]
    assert titles == ["RGB 20200101", "RGB b", "RGB c", *(f"elevation season {k}" for k in (1, 2, 3))]
    scenes = pictures.scenes(
        [sample | {"mask": np.eye(8, dtype=np.uint8)}], ["rgb", "dem", "mask"], classes=["none", "some"]
    )
    assert scenes.axes[1].get_title().endswith(" m") and legend_of(scenes) == ["none", "some"]
    every = sample | {"mask": np.arange(256, dtype=np.uint8).reshape(16, 16)}
    many = legend_of(pictures.scenes([every], ["rgb", "mask"], classes=[f"class {k}" for k in range(256)]))
    assert many[0] == "class 0" and many[-1] == "class 255"
    assert len(pictures.bands(random.random((3, 8, 8)), "abc", unit="x").axes) == 3
    assert [a.get_ylabel() for a in pictures.views({"dem": random.random((2, 3, 8, 8))}).axes] == ["elevation", ""]
