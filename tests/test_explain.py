"""Attributions and statistics against hand-made formulas, naive loops and interrupted calls."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_store

from decur_core import backbones, explain, pretrain
from decur_core.data.modality import DEM, OPTICAL, SAR
from decur_core.data.raster import DataError
from decur_core.data.store import Store
from decur_core.explain import embeddings, saliency
from decur_core.model import MultimodalModel
from decur_core.report import figures as plots
from decur_core.running import checkpoints
from decur_core.running import folders as runs


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    model = MultimodalModel("small", {"sar": 2, "optical": 13}, (16, 8)).eval()
    z = model.embed("optical", torch.rand(64, 13, 24, 24)).detach()
    return explain.CommonUnique(model, "optical", (range(6), range(6, 8)), z.mean(0), z.std(0))


def test_embeddings_do_not_depend_on_the_batch(tiny, pair_store):
    folder, store = pretrain.run(tiny(), pair_store), Store(pair_store)
    one, two = (embeddings.embeddings(folder, store, samples=7, batch_size=b) for b in (7, 3))
    assert list(one) == list(two) == ["sar", "optical"]
    for name, z in one.items():
        assert z.shape == (7, 8)
        torch.testing.assert_close(z, two[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(explain.embed_members({"a": folder}, pair_store, samples=7)["a"], one)


def test_images_that_were_mapped_otherwise_are_not_explained(tiny, pair_store, tmp_path):
    settings = tiny(epochs=1)
    folder, darker = pretrain.run(settings, pair_store), replace(SAR, mean=(-10.0, -17.0))
    other = make_store(tmp_path / "other", count=8, seasons=1, labels=False, modalities=(darker, OPTICAL))
    for explained in (
        lambda: explain.embed_members({"a": folder}, other, samples=4),
        lambda: explain.statistics(settings, folder, other, samples=4),
        lambda: explain.example_maps(settings, folder, other, count=2),
    ):
        with pytest.raises(DataError, match="sar was converted with another preprocessing"):
            explained()


def test_blocks_are_named_by_those_who_share_them():
    widths = {"sar": 8, "optical": 8}
    decur = explain.blocks({"method": "decur", "dim_common": 6}, widths)
    assert decur["optical"] == {"sar+optical": slice(0, 6), "optical": slice(6, 8)} and list(decur) == [
        "sar",
        "optical",
    ]
    for whole in ({"method": "decur", "dim_common": 6, "decoupling": False}, {"method": "clip", "dim_common": 6}):
        assert explain.blocks(whole, widths)["sar"] == {"sar+optical": slice(0, 8), "sar": slice(8, 8)}
    declared = {"a": 2, "a+b+c": 3, "b+c": 4, "c": 1}
    three = explain.blocks({"method": "decur", "blocks": declared}, {"a": 5, "b": 7, "c": 8})
    assert three == {
        "a": {"a": slice(0, 2), "a+b+c": slice(2, 5)},
        "b": {"a+b+c": slice(0, 3), "b+c": slice(3, 7), "b": slice(7, 7)},
        "c": {"a+b+c": slice(0, 3), "b+c": slice(3, 7), "c": slice(7, 8)},
    }
    with pytest.raises(
        ValueError, match="the embedding of b has 6 dimensions; its blocks have {'a\\+b\\+c': 3, 'b\\+c': 4"
    ):
        explain.blocks({"method": "decur", "blocks": declared}, {"a": 5, "b": 6, "c": 8})
    with pytest.raises(ValueError, match="the embedding of sar has 8 dimensions"):
        explain.blocks({"method": "decur", "dim_common": 9}, widths)
    with pytest.raises(ValueError, match="dim_common = 'auto'; the split"):
        explain.blocks({"method": "decur", "dim_common": "auto"}, widths)


def test_effective_rank_counts_independent_directions():
    z = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    assert explain.effective_rank(z) == pytest.approx(6, abs=0.05)
    assert explain.effective_rank(torch.cat([z[:, :2]] * 3, 1)) == pytest.approx(2, abs=0.01)
    assert explain.effective_rank(torch.cat([z[:, :1], torch.ones(4000, 3)], 1)) == pytest.approx(1, abs=1e-6)
    assert explain.effective_rank(torch.ones(40, 3)) == 0.0


def test_alignment_is_one_minus_the_correlation_squared():
    z1, z2 = torch.randn(2, 50, 5, dtype=torch.float64)
    z2[:, 0], z2[:, 1] = 3 * z1[:, 0] + 1, -z1[:, 1]
    expected = [(1 - np.corrcoef(z1[:, k], z2[:, k])[0, 1]) ** 2 for k in range(5)]
    torch.testing.assert_close(explain.alignment(z1, z2), torch.tensor(expected, dtype=torch.float64))
    assert explain.alignment(z1, z2)[:2].tolist() == pytest.approx([0, 4], abs=1e-9)


def test_tsne_lays_aligned_dimensions_on_top_of_each_other_and_unique_ones_apart():
    torch.manual_seed(0)
    common, own1, own2 = torch.randn(3, 200, 12)
    z1, z2 = torch.cat([common, own1], 1), torch.cat([common + 0.01 * torch.randn(200, 12), own2], 1)
    place = explain.tsne(z1, z2)
    assert place.shape == (48, 2)
    distance = np.linalg.norm(place[:24] - place[24:], axis=1)
    assert distance[:12].max() < distance[12:].min()
    np.testing.assert_array_equal(place, explain.tsne(z1, z2))


def test_embeddings_that_a_network_has_just_made_are_looked_at_as_they_are():
    """As ``model.embed`` gives them: with the graph that leads back to the weights."""
    z1, z2 = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    made = [(each * torch.ones(6, requires_grad=True)) for each in (z1, z2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain.effective_rank(made[0]) == explain.effective_rank(z1)
        np.testing.assert_array_equal(explain.tsne(*made), explain.tsne(z1, z2))
        assert torch.equal(explain.retrieval(*made), explain.retrieval(z1, z2))


DEGENERATE = """
import numpy as np, torch
from decur_core import explain
z = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
cases = {
    "some constant": (z, torch.cat([z[:, :2], torch.full((40, 2), 7.0)], 1)),
    "almost all constant": (torch.cat([z[:, :1], torch.ones(40, 9)], 1),),
    "one and its opposite": (z[:, :1].repeat(1, 6), -z[:, :1].repeat(1, 6)),
    "two samples": (z[:2], -z[:2]),
    "three modalities of unequal widths": (z[:, :1], z[:, 1:2], z[:, 2:4]),
}
for name, both in cases.items():
    place = explain.tsne(*both)
    assert place.shape == (sum(x.shape[1] for x in both), 2) and np.isfinite(place).all(), name
for name, z1 in {"constant": torch.ones(40, 6), "but for rounding": z[:, :1] * torch.tensor([1.0, 3.0, 7.0])}.items():
    try:
        explain.tsne(z1, 0.1 * z1)
    except ValueError as error:
        assert "every dimension has the same values" in str(error), name
    else:
        raise AssertionError(name)
print("done")
"""


def test_no_embedding_takes_the_process_down():
    """In a process of its own, which scikit-learn's compiled code could end."""
    ran = subprocess.run([sys.executable, "-c", DEGENERATE], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and ran.stdout == "done\n", ran.stderr


@pytest.mark.parametrize(
    ("z1", "z2", "reason"),
    [
        (torch.ones(50, 8), torch.ones(50, 8), "every dimension has the same values"),
        (torch.arange(50.0)[:, None].repeat(1, 8), torch.arange(50.0)[:, None].repeat(1, 8), "the same values"),
        (torch.rand(50, 1), torch.rand(50, 2), r"shapes \(50, 1\) and \(50, 2\).* 4 dimensions in all"),
        (torch.rand(50, 8), torch.rand(49, 8), r"shapes \(50, 8\) and \(49, 8\)"),
        (torch.rand(1, 8), torch.rand(1, 8), "2 samples or more"),
        (torch.rand(0, 8), torch.rand(0, 8), "2 samples or more"),
        (torch.rand(50, 8), torch.full((50, 8), torch.nan), "8 dimensions hold NaN or infinity"),
        (torch.rand(50, 8).index_fill(1, torch.tensor([3]), torch.inf), torch.rand(50, 8), "1 dimensions hold NaN"),
    ],
)
def test_embeddings_without_a_map_are_refused(z1, z2, reason):
    """The first of these ends the process in the library behind it."""
    with pytest.raises(ValueError, match=reason):
        explain.tsne(z1, z2)


def test_a_rank_of_nothing():
    assert explain.effective_rank(torch.ones(5, 3)) == 0 == explain.effective_rank(torch.rand(1, 3))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        explain.effective_rank(torch.full((5, 3), torch.nan))


def test_constant_dimensions_lie_together_on_the_map():
    make = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(50, 12, generator=make), torch.randn(50, 12, generator=make)
    z1[:, 6:] = 3.0
    found = explain.tsne(z1, z2, perplexity=3)
    assert found.shape == (24, 2) and np.isfinite(found).all()
    constant, others = found[6:12], np.delete(found, range(6, 12), axis=0)
    assert np.ptp(constant, axis=0).max() < np.ptp(others, axis=0).min()


def test_gradcam_is_the_gradient_weighted_map_of_the_last_convolution(target):
    images, kept, largest = torch.rand(3, 13, 24, 24), {}, []
    layer = target.last_convolution()
    assert layer is target.model.backbones["optical"][6]
    handle = layer.register_forward_hook(lambda module, args, out: kept.update(map=out))
    for part in (0, 1):
        found = explain.gradcam(target, images, part)
        out = target(images)[:, part].sum()
        (gradient,) = torch.autograd.grad(out, kept["map"])
        weighted = (gradient.mean((2, 3), keepdim=True) * kept["map"]).sum(1, keepdim=True).clamp_min(0)
        expected = F.interpolate(weighted, size=(24, 24), mode="bilinear", align_corners=False)[:, 0]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-7)
        assert found.shape == (3, 24, 24) and found.min() >= 0
        largest.append(found.max())
    assert max(largest) > 0
    handle.remove()


def test_a_network_that_overwrites_its_last_map_is_explained_and_left_as_it_is(monkeypatch):
    """Of a convolution without a normalisation, the activation in place takes the map that GradCAM weighs."""

    def build(name, channels):
        return torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 3, 2), torch.nn.ReLU(inplace=True), backbones._Mean())

    monkeypatch.setitem(backbones.BACKBONES, "own", backbones.Backbone(build, (8,), lambda network, images: []))
    torch.manual_seed(0)
    model, images = MultimodalModel("own", {"rgb": 3, "sar": 2}, (4,)).eval(), torch.rand(3, 3, 24, 24)
    target = explain.CommonUnique(model, "rgb", (range(3), range(3, 4)), torch.zeros(4), torch.ones(4))
    layer, _, mean = model.backbones["rgb"]
    assert model.backbones["rgb"][1].inplace
    for part in (0, 1):
        kept = layer(images)
        out = model.projectors["rgb"](mean(kept.relu())) @ target.weights[:, part]
        (gradient,) = torch.autograd.grad(out.sum(), kept)
        weighted = (gradient.mean((2, 3), keepdim=True) * kept).sum(1, keepdim=True).clamp_min(0)
        expected = F.interpolate(weighted, size=(24, 24), mode="bilinear", align_corners=False)[:, 0].detach()
        assert expected.max() > 0
        torch.testing.assert_close(explain.gradcam(target, images, part), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("backbone", "size"), [("resnet18", 64), ("mit_b0", 64)])
def test_gradcam_of_other_backbones_is_spatial(backbone, size):
    """Of Mix Transformers the last convolution is the depthwise one of the last block, on a map of stride 32."""
    torch.manual_seed(0)
    model = MultimodalModel(backbone, {"rgb": 3, "sar": 2}, (16, 8)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    z, kept = model.embed("rgb", torch.rand(32, 3, size, size)).detach(), {}
    target = explain.CommonUnique(model, "rgb", (range(5), range(5, 8)), z.mean(0), z.std(0))
    images = torch.rand(2, 3, size, size)
    handle = target.last_convolution().register_forward_hook(lambda module, args, out: kept.update(map=out))
    found = [explain.gradcam(target, images, part) for part in (0, 1)]
    assert sum(float(f.max()) for f in found) > 0
    for part in (0, 1):
        (gradient,) = torch.autograd.grad(target(images)[:, part].sum(), kept["map"])
        assert kept["map"].shape[2:] == (size // 32, size // 32)
        weighted = (gradient.mean((2, 3), keepdim=True) * kept["map"]).sum(1, keepdim=True).clamp_min(0)
        expected = F.interpolate(weighted, size=(size, size), mode="bilinear")[:, 0].detach()
        torch.testing.assert_close(found[part], expected, rtol=1e-3, atol=1e-7)
    handle.remove()


def test_gradcam_of_a_backbone_without_convolutions_is_refused():
    model = MultimodalModel("small", {"rgb": 3, "sar": 2}, (16, 8)).eval()
    model.backbones["rgb"] = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 128))
    target = explain.CommonUnique(model, "rgb", (range(5), range(5, 8)), torch.zeros(8), torch.ones(8))
    with pytest.raises(ValueError, match="the backbone of rgb has no convolution to look at"):
        explain.gradcam(target, torch.rand(2, 3, 8, 8), 0)


def test_gradcam_looks_where_the_only_thing_is(target):
    images = torch.zeros(1, 13, 24, 24)
    images[:, :, 2:10, 14:22] = torch.rand(13, 8, 8)
    maps = [explain.gradcam(target, images, part)[0] for part in (0, 1)]
    inside = max(float(m[:13, 11:].mean() / m.mean().clamp_min(1e-12)) for m in maps)
    assert inside > 1.2


def test_integrated_gradients_sum_to_the_change_of_the_output(target):
    images = torch.rand(4, 13, 24, 24)
    for part in (0, 1):
        coarse, fine = (explain.integrated_gradients(target, images, part, steps=n) for n in (8, 128))
        change = (target(images) - target(torch.zeros_like(images)))[:, part].detach()
        torch.testing.assert_close(fine[0].sum((1, 2, 3)), change, rtol=0.02, atol=0.01)
        torch.testing.assert_close(fine[0].sum((1, 2, 3)) - fine[1], change, rtol=1e-3, atol=1e-4)
        assert fine[0].shape == images.shape and fine[1].abs().max() <= coarse[1].abs().max() + 1e-3


def test_one_image_is_explained_the_same_alone_and_among_others(target):
    images = torch.rand(5, 13, 24, 24)
    for how in (explain.gradcam, lambda *a: explain.integrated_gradients(*a)[0]):
        torch.testing.assert_close(how(target, images, 1)[2:3], how(target, images[2:3], 1), rtol=1e-3, atol=1e-6)


def test_overlap_of_equal_maps_is_larger_than_that_of_disjoint_ones():
    left = torch.zeros(1, 4, 4)
    left[:, :, :2] = 3.0
    assert explain.overlap(left, left).item() == pytest.approx(np.log(0.5))
    assert explain.overlap(left, left.flip(2)).item() == pytest.approx(np.log(1e-12), rel=1e-4)
    assert explain.overlap(torch.ones(1, 4, 4), left).isfinite().all()


def test_statistics_equal_a_naive_loop_and_survive_an_interruption(tiny, pair_store, monkeypatch):
    settings = tiny()
    folder = pretrain.run(settings, pair_store)
    found = explain.statistics(settings, folder, pair_store, samples=10, batch_size=4, steps=4)
    (file,) = runs.path(settings, "explain").glob("*.jsonl")
    whole = file.read_text()

    two, modalities, trained = explain.targets(folder, Store(pair_store))
    raw, bands = {"common": [], "unique": []}, []
    for i in range(10):
        images = embeddings.images(Store(pair_store), modalities.values(), [i], trained["crop_size"])
        for k, part in enumerate(raw):
            one, other = (saliency._unit(explain.gradcam(two[m], x, k))[0] for m, x in images.items())
            raw[part].append(np.log(max(float((one * other).mean()), 1e-12)))
        bands.append(
            explain.integrated_gradients(two["optical"], images["optical"], 0, steps=4)[0][0].mean((1, 2)).numpy()
        )
    raw = {k: np.where(np.array(v) < np.log(1e-11), np.nan, v) for k, v in raw.items()}  # one of the maps is empty
    low, high = (f(np.concatenate(list(raw.values()))) for f in (np.nanmin, np.nanmax))
    for part, values in raw.items():
        np.testing.assert_allclose(found[f"overlap {part}"], (values - low) / (high - low), atol=2e-3)
    mean = np.mean(bands, 0)
    np.testing.assert_allclose(found["bands optical common"], mean / np.abs(mean).sum(), atol=1e-3)
    assert found["bands sar unique"].shape == (2,) and np.isfinite(found["completeness"])

    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])  # killed in the middle of a line
    computed = []
    cam = saliency.gradcam
    monkeypatch.setattr(saliency, "gradcam", lambda t, x, k: computed.append(len(x)) or cam(t, x, k))
    again = explain.statistics(settings, folder, pair_store, samples=10, batch_size=4, steps=4)
    assert computed == [4] * 4 + [2] * 4 and file.read_text() == whole
    assert all(np.array_equal(found[name], again[name], equal_nan=True) for name in found)
    explain.statistics(settings, folder, pair_store, samples=10, batch_size=4, steps=4)
    assert len(computed) == 8, "a finished one is read"
    explain.statistics(settings, folder, pair_store, samples=6, batch_size=4, steps=4)
    assert json.loads(file.read_text().splitlines()[0])["samples"] == 6


@pytest.mark.parametrize(
    "kinds", [{"method": "barlow_twins"}, {"dim_common": 0}, {"method": "random", "backbone": "resnet18"}]
)
def test_statistics_of_models_without_a_part_or_without_maps(tiny, pair_store, kinds):
    settings = tiny(epochs=1, crop_size=24, **kinds)
    folder = pretrain.run(settings, pair_store)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = explain.statistics(settings, folder, pair_store, samples=6, batch_size=4, steps=4)
        plots.overlaps({part: found[f"overlap {part}"] for part in explain.PARTS})
    empty = {"barlow_twins": ["unique"], "random": ["common", "unique"]}.get(settings.method, ["common"])
    for part in explain.PARTS:
        scores = found[f"overlap {part}"]
        assert scores.shape == (6,) and (np.isnan(scores).all() or part not in empty)
        if part in empty and settings.method != "random":
            assert not found[f"bands optical {part}"].any()
    assert np.isfinite(found["completeness"])


def test_statistics_of_other_images_are_counted_anew(tiny, pair_store, patch_stores):
    settings = tiny(epochs=1)
    folder = pretrain.run(settings, pair_store)
    first, other, again = (
        explain.statistics(settings, folder, store, samples=6, batch_size=4, steps=4)
        for store in (pair_store, patch_stores["test"], pair_store)
    )
    assert not np.array_equal(first["bands optical common"], other["bands optical common"])
    np.testing.assert_array_equal(first["bands optical common"], again["bands optical common"])


def test_statistics_of_one_run_do_not_wait_for_those_of_another(tiny, pair_store):
    """Chapters of one profile may be open at the same time."""
    folders = [pretrain.run(tiny(epochs=1, seed=seed), pair_store) for seed in (0, 1)]
    about = {"samples": 6, "batch_size": 4, "steps": 2}
    there = runs.path(tiny(), "explain")
    with runs.locked(there, name=f".{folders[0].name}.jsonl.lock"):
        explain.statistics(tiny(), folders[1], pair_store, **about)
        with pytest.raises(RuntimeError, match="in use by another process"):
            explain.statistics(tiny(), folders[0], pair_store, **about)


def test_maps_and_overlaps_of_three_modalities_go_by_their_blocks(tiny, tmp_path, monkeypatch):
    """A model of three, without a training: statistics of every two, parts by the blocks of its settings."""
    torch.manual_seed(0)
    widths, bands = {"sar": 6, "optical": 7, "dem": 5}, {"sar": SAR, "optical": OPTICAL, "dem": DEM}
    channels = {name: m.channels for name, m in bands.items()}
    model = MultimodalModel("small", channels, (16, 8), dimensions=widths)
    settings = {"method": "decur", "crop_size": 24, "blocks": {"sar+optical": 3, "sar+dem": 2, "optical": 4}}
    settings["blocks"] |= {"sar": 1, "dem": 3}
    items = {name: torch.randint(0, 256, (6, len(m.bands), 24, 24), dtype=torch.uint8) for name, m in bands.items()}

    def images(store, modalities, rows, size, device="cpu"):
        return {m.name: m.copied(items[m.name][list(rows)].float() / 255) for m in modalities}

    for module in (embeddings, saliency):
        monkeypatch.setattr(module, "images", images)
        monkeypatch.setattr(module, "load_pretrained", lambda folder: (model, bands, settings))
    monkeypatch.setattr(saliency, "Store", lambda path: Fake())

    class Fake:
        sha256 = "x"

        def __len__(self):
            return 6

    found = explain.statistics(tiny(), tmp_path / "run", "a store", samples=6, batch_size=4, steps=2)
    names = [f"overlap {pair} {part}" for pair in ("sar+optical", "sar+dem", "optical+dem") for part in explain.PARTS]
    assert [name for name in found if name.startswith("overlap")] == names
    assert all(found[name].shape == (6,) for name in names)
    assert found["bands dem common"].shape == (1,) and found["bands optical unique"].shape == (13,)
    made, _, _ = explain.targets(tmp_path / "run", Fake())
    z = embeddings.embeddings(tmp_path / "run", Fake(), samples=6)["sar"]
    z = (z - z.mean(0)) / z.std(0)
    expected = torch.stack([z[:, :5].mean(1), z[:, 5:].mean(1)], 1)
    images = embeddings.images(Fake(), bands.values(), range(6), 24)
    torch.testing.assert_close(made["sar"](images["sar"]), expected, rtol=1e-3, atol=1e-4)
    rows = explain.example_maps(tiny(), tmp_path / "run", "a store", count=2)
    assert list(rows[0]) == [f"{m}{part}" for m in bands for part in ("", ", common", ", unique")]


def test_the_split_that_a_run_found_says_what_is_common(tiny, pair_store):
    folder = pretrain.run(tiny(epochs=1), pair_store)
    state = torch.load(folder / "final.pt", weights_only=True)
    state["settings"]["dim_common"], state["split"] = "auto", {"dim_common": 3, "rank": 5}
    checkpoints.save(state, folder / "final.pt")
    found, _, settings = explain.targets(folder, Store(pair_store), samples=8)
    assert settings["dim_common"] == 3 and "rank" not in settings
    assert [int((part != 0).sum()) for part in found["sar"].weights.T] == [3, 5]
