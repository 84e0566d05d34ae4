import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image, ImageOps
from rasterio import Affine

from decur_core.data import datasets, modality
from decur_core.data.folders import Folders, looks_like, measure
from decur_core.data.modality import RGB, Modality
from decur_core.data.raster import DataError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")
HEAT = modality.declared("heat", {"bands": ("thermal",), "unit": "digital numbers"})
MODALITIES, SIZE, IDS = (RGB, HEAT), (12, 16), ["a", "b.2", "c"]


def pixels(id, channels, season=0, size=SIZE):
    random = np.random.default_rng((IDS.index(id), channels, season))
    return random.integers(0, 256 if channels == 3 else 4096, (channels, *size))


def save(path, values, **place):
    """An array (C, H, W) as a file of the type that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix in (".png", ".jpg"):
        Image.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))).save(path)
    else:
        form = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
        with rasterio.open(path, "w", driver="GTiff", **form, **place) as file:
            file.write(values)


@pytest.fixture
def root(tmp_path):
    """Three places: 8-bit colours as PNG, 12-bit heat as TIFF."""
    for id in IDS:
        save(tmp_path / "rgb" / f"{id}.png", pixels(id, 3).astype(np.uint8))
        save(tmp_path / "heat" / f"{id}.tif", pixels(id, 1).astype(np.uint16))
    return tmp_path


def test_items_are_the_files_of_one_name(root):
    data = pickle.loads(pickle.dumps(Folders(root, MODALITIES)))
    assert data.ids == IDS and len(data) == 3 and not data.left_out
    for i, id in enumerate(IDS):
        item = data[i]
        assert list(item) == ["id", "rgb", "heat"] and item["id"] == id
        assert item["rgb"].dtype == np.uint8 and np.array_equal(item["rgb"], pixels(id, 3))
        assert item["heat"].dtype == np.float32 and np.array_equal(item["heat"], pixels(id, 1))


@pytest.mark.parametrize(("suffix", "dtype"), [(".npy", np.float64), (".npy", np.uint16), (".png", np.uint16)])
def test_files_may_be_of_several_types(root, suffix, dtype):
    (root / "heat" / "a.tif").unlink()
    save(root / "heat" / f"a{suffix}", pixels("a", 1).astype(dtype))
    item = Folders(root, MODALITIES)[0]
    assert item["heat"].dtype == np.float32 and np.array_equal(item["heat"], pixels("a", 1))
    if suffix == ".npy":
        np.save(root / "heat" / "a.npy", pixels("a", 1)[0].astype(dtype))  # (H, W)
        assert np.array_equal(Folders(root, MODALITIES)[0]["heat"], pixels("a", 1))


def test_a_photograph_is_close_to_what_was_saved(root):
    (root / "rgb" / "a.png").unlink()
    smooth = np.broadcast_to(np.linspace(0, 255, 16).astype(np.uint8), (3, *SIZE))
    save(root / "rgb" / "a.jpg", smooth)
    item = Folders(root, MODALITIES)[0]
    assert item["rgb"].dtype == np.uint8 and abs(item["rgb"].astype(int) - smooth).max() < 12


@pytest.mark.parametrize("held", range(1, 9))
def test_a_photograph_stands_upright_however_the_camera_was_held(root, held):
    (root / "rgb" / "a.png").unlink()
    y, x = np.indices((24, 40), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = held
    Image.fromarray(np.stack([6 * x, 10 * y, 3 * x], -1)).save(root / "rgb" / "a.jpg", exif=exif, quality=98)
    with Image.open(root / "rgb" / "a.jpg") as image:
        upright = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    save(root / "heat" / "a.tif", np.random.default_rng(0).random((1, *upright.shape[1:])))
    found = Folders(root, MODALITIES)[0]["rgb"]
    assert found.shape == upright.shape and abs(found.astype(int) - upright).max() < 12


def seasonal(root, names):
    for folder, channels in (("rgb", 3), ("heat", 1)):
        for path in (root / folder).iterdir():
            path.unlink()
        for id in IDS:
            for season, name in enumerate(names[folder]):
                path = root / folder / id / name
                save(path, pixels(id, channels, season).astype(np.uint8 if channels == 3 else np.uint16))


def test_seasons_go_together_in_the_order_of_their_names(root):
    seasonal(root, {"rgb": ["2020-06.png", "2021-01.png"], "heat": ["s1.tif", "s2.tif"]})
    (root / "rgb" / "a" / "._2020-06.png").write_bytes(b"left by an archiver")
    item = Folders(root, MODALITIES)[0]
    assert item["rgb"].shape == (2, 3, *SIZE) and item["heat"].shape == (2, 1, *SIZE)
    for season in range(2):
        assert np.array_equal(item["rgb"][season], pixels("a", 3, season))
        assert np.array_equal(item["heat"][season], pixels("a", 1, season))
    (root / "heat" / "a" / "s2.tif").unlink()
    with pytest.raises(DataError, match="a has {'rgb': 2, 'heat': 1} seasons; give each modality the same"):
        Folders(root, MODALITIES)[0]
    (root / "heat" / "a" / "s1.tif").unlink()
    with pytest.raises(DataError, match="heat/a: no image of a in it"):
        Folders(root, MODALITIES)[0]


def test_a_season_without_content_is_refused_by_its_file(root):
    seasonal(root, {"rgb": ["1.png", "2.png"], "heat": ["1.tif", "2.tif"]})
    save(root / "heat" / "a" / "2.tif", np.zeros((1, *SIZE), np.uint16))
    with pytest.raises(DataError, match="heat/a/2.tif: band thermal of a is 0 all over"):
        Folders(root, MODALITIES)[0]


def test_an_image_without_seasons_goes_with_all_of_them(root):
    seasonal(root, {"rgb": ["1.png", "2.png", "3.png"], "heat": ["1.tif"]})
    for id in IDS:
        (root / "heat" / id / "1.tif").rename(root / "heat" / f"{id}.tif")
        (root / "heat" / id).rmdir()
    item = Folders(root, MODALITIES)[1]
    assert item["heat"].shape == (3, 1, *SIZE) and all(np.array_equal(s, pixels("b.2", 1)) for s in item["heat"])


def test_splits_are_lists(root):
    (root / "train.txt").write_text("c\n\na\n")
    (root / "test.txt").write_text("b.2\n")
    assert Folders(root, MODALITIES, "train").ids == ["c", "a"] and Folders(root, MODALITIES, "test").ids == ["b.2"]
    assert Folders(root, MODALITIES).ids == Folders(root, MODALITIES, "all").ids == IDS
    with pytest.raises(DataError, match="val.txt: missing; lists of this root: test, train; 'all'"):
        Folders(root, MODALITIES, "val")
    wrong = {
        "c\nd\n": "d is unknown",
        "c\na\nc\n": "c is .*there twice",
        "c\nb.2\n": "1 of its ids .* test.txt too, first b.2",
    }
    for text, message in wrong.items():
        (root / "train.txt").write_text(text)
        with pytest.raises(DataError, match=f"train.txt: {message}"):
            Folders(root, MODALITIES, "train")


def test_lists_are_read_as_text_editors_write_them(root):
    (root / "train.txt").write_bytes("\ufeffc\r\na\r\n".encode())
    assert Folders(root, MODALITIES, "train").ids == ["c", "a"]
    (root / "train.txt").write_text("c\na\n", encoding="utf-16")
    with pytest.raises(DataError, match="train.txt: cannot be read; expected ids, a line each: Unicode"):
        Folders(root, MODALITIES, "train")


def one_missing(root):
    (root / "heat" / "c.tif").unlink()
    return "1 of 3 ids are not in every folder, c for one is not in heat"


def there_twice(root):
    save(root / "heat" / "c.png", pixels("c", 1).astype(np.uint16))
    return "heat: c is there twice, as c.png and c.tif; keep one"


def other_size(root):
    save(root / "heat" / "c.tif", pixels("c", 1, size=(6, 8)).astype(np.uint16))
    return "heat/c.tif: 6 x 8 pixels, but .*rgb/c.png of the same id has 12 x 16 pixels; .*resample: true"


def constant_band(root):
    values = pixels("c", 3).astype(np.uint8)
    values[1] = 77
    save(root / "rgb" / "c.png", values)
    return "c.png: band green of c is 77 all over; leave the id or the band out"


def sixteen_bits(root):
    (root / "rgb" / "c.png").unlink()
    save(root / "rgb" / "c.tif", pixels("c", 3).astype(np.uint16))
    return "rgb/c.tif: uint16 values, but rgb is declared as 8-bit images"


def other_bands(root):
    save(root / "rgb" / "c.png", pixels("c", 1).astype(np.uint8))
    return r"c.png: 1 band\(s\), expected 3 \(red, green, blue\) of rgb"


def truncated(root):
    path = root / "rgb" / "c.png"
    path.write_bytes(path.read_bytes()[:-30])
    return "c.png: cannot be read; expected a GeoTIFF, PNG"


def truncated_tiff(root):
    path = root / "heat" / "c.tif"
    path.write_bytes(path.read_bytes()[:-30])
    return "c.tif: cannot be read; expected a GeoTIFF, PNG"


def pickled(root):
    (root / "heat" / "c.tif").unlink()
    np.save(root / "heat" / "c.npy", np.array([{}]))
    return "c.npy: cannot be read.*pickle"


def complex_values(root):
    save(root / "heat" / "c.tif", pixels("c", 1).astype(np.complex64))
    return r"c.tif: cannot be read; .*real numbers: .*complex64 values of shape \(1, 12, 16\)"


def unknown_label(root):
    (root / "labels.csv").write_text("a,forest\nb.2,water\nc,water\nd,forest\n")
    return "labels.csv: labels for 1 unknown ids, first d"


def no_label(root):
    (root / "labels.csv").write_text("a,forest\nb.2,water\n")
    return "labels.csv: nothing for 1 of 3 ids, first c"


def two_labels(root):
    (root / "labels.csv").write_text("c,forest\nb.2,water\nc,water\na,water\n")
    return "labels.csv: c is there more than once"


def uneven_labels(root):
    (root / "labels.csv").write_text("id,forest,water\na,0,1\nb.2,1,0\nc,1\n")
    return "labels.csv: cannot be read; expected rows of an id and its classes"


def unknown_mask(root):
    for id in (*IDS, "d"):
        save(root / "mask" / f"{id}.png", np.ones((1, *SIZE), np.uint8))
    return "mask: labels for 1 unknown ids, first d"


def no_mask(root):
    save(root / "mask" / "a.png", np.ones((1, *SIZE), np.uint8))
    return "mask: nothing for 2 of 3 ids, first b.2"


def mask_of_other_size(root):
    for id in IDS:
        save(root / "mask" / f"{id}.png", np.ones((1, 12, 17), np.uint8))
    return "mask/c.png: 12 x 17 pixels, but .*rgb/c.png of the same id has 12 x 16"


def mask_of_colours(root):
    for id in IDS:
        save(root / "mask" / f"{id}.png", np.ones((3, *SIZE), np.uint8))
    return r"mask/c.png: 3 band\(s\), expected 1 \(class\) of mask"


def no_labels(root):
    return "labels.csv: missing; expected rows of an id and its classes"


def no_masks(root):
    return "mask: missing; the root holds a folder per modality, and of declared masks"


@pytest.mark.parametrize(
    ("damage", "options"), [(no_labels, {"classes": ("snow", "forest")}), (no_masks, {"masks": ("road",)})]
)
def test_what_is_declared_has_to_be_there(root, damage, options):
    with pytest.raises(DataError, match=damage(root)):
        Folders(root, MODALITIES, **options)


def no_modality(root):
    (root / "heat").rename(root / "cold")
    return "heat: missing; the root holds a folder per modality"


@pytest.mark.parametrize(
    "damage",
    [
        one_missing, there_twice, other_size, constant_band, sixteen_bits, other_bands, truncated, truncated_tiff,
        pickled, complex_values, unknown_label, no_label, two_labels, uneven_labels, unknown_mask, no_mask,
        mask_of_other_size, mask_of_colours, no_modality,
    ],
)  # fmt: skip
def test_bad_folders_are_refused_with_the_id(root, damage):
    Folders(root, MODALITIES)[2]
    message = damage(root)
    with pytest.raises(DataError, match=message):
        Folders(root, MODALITIES)[2]


def test_ids_that_lack_a_modality_can_be_left_out(root):
    one_missing(root)
    with pytest.warns(UserWarning, match=r"left out: .*'ids': 1"):
        data = Folders(root, MODALITIES, missing="skip")
    assert data.ids == ["a", "b.2"] and data.left_out == {"ids": 1}
    for path in (root / "heat").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no id is in all of rgb, heat"):
        Folders(root, MODALITIES, missing="skip")
    with pytest.raises(ValueError, match="missing is 'ignore'"):
        Folders(root, MODALITIES, missing="ignore")


def test_hidden_files_and_dangling_links_are_counted(root):
    (root / "rgb" / "._a.png").write_bytes(b"left by an archiver")
    for id in IDS:
        save(root / "mask" / f"{id}.png", np.ones((1, *SIZE), np.uint8))
    (root / "mask" / ".DS_Store").write_bytes(b"")
    (root / "rgb" / "a.txt").write_text("a note")
    (root / "mask" / "a.txt").write_text("another")
    (root / "heat" / "z.tif").symlink_to(root / "gone.tif")
    (root / "heat" / "c.tif").rename(root / "elsewhere.tif")
    (root / "heat" / "c.tif").symlink_to(root / "elsewhere.tif")  # a link that leads somewhere is a file
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = Folders(root, MODALITIES)
    assert data.ids == IDS and data.left_out == {"files of other types": 2}
    for part, found in (("rgb", r"_a.png"), ("heat", "z.tif"), ("mask", ".DS_Store")):
        (line,) = (str(w.message) for w in said if str(w.message).startswith(f"{root / part}: "))
        assert "1 of * are left out, hidden or links to what is gone" in line and line.endswith(found)
    assert any(str(w.message) == f"{root}: left out: {{'files of other types': 2}}" for w in said)
    assert np.array_equal(data[2]["heat"], pixels("c", 1))


LABELS = {"a": ["inland water"], "b.2": [], "c": ["forest", "inland water"]}


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("id,forest,inland water\na,0,1\nb.2,0,0\nc,1,1\n", ()),
        ("\ufeffid,labels\na,inland water\nb.2,\nc,forest; inland water;\n", ()),
        ("c,forest,inland water\nb.2\na,inland water\n\n", ()),
        ("ID,first,second\na,inland water,\nb.2,,\nc,inland water,forest\n", ()),
        ("a,inland water\nb.2,\nc,forest;inland water\n", ("forest", "inland water", "snow")),
        ("id;forest;inland water\r\na;0;1\r\nb.2;0;0\r\nc;1;1\r\n", ()),
        ("id\tforest\tinland water\na\t0\t1\nb.2\t0\t0\nc\t1\t1\n", ("forest", "inland water")),
        ("a\tinland water\nb.2\t\nc\tforest;inland water\n", ("forest", "inland water")),
        ('"id";"forest";"inland water";"heath, moor"\na;0;1;0\nb.2;0;0;0\nc;1;1;0\n', ("forest", "inland water")),
        ('id, "forest", "inland water"\n"a", "0", "1"\n"b.2", "0", "0"\n"c", "1", "1"\n', ()),
        ("id,forest,inland water\na,0.0,1.0\nb.2,0.0,0.0\nc,1.0,1.0\n", ()),
        ("id,forest,inland water\na,False,True\nb.2,False,False\nc,True,True\n", ()),
        ("c;forest;inland water\nb.2\na;inland water\n", ()),
    ],
)
def test_labels_of_every_form(root, text, classes):
    (root / "labels.csv").write_text(text)
    data = Folders(root, MODALITIES, classes=classes)
    assert data.classes == (classes or ("forest", "inland water"))
    for i, id in enumerate(IDS):
        labels = data[i]["labels"]
        assert labels.dtype == bool and [n for n, own in zip(data.classes, labels, strict=True) if own] == LABELS[id]


@pytest.mark.parametrize("cell", ["2", "", "nan", "yes"])
def test_columns_of_0_and_1_hold_nothing_else(root, cell):
    (root / "labels.csv").write_text(f"id,forest,water\na,0,1\nb.2,{cell},0\nc,1,1\n")
    for classes in ((), ("forest", "water")):
        with pytest.raises(DataError, match=f"labels.csv: .*b.2 has '{cell}' beside 0 and 1"):
            Folders(root, MODALITIES, classes=classes)


def test_names_without_other_separators_are_separated_by_spaces(root):
    (root / "labels.csv").write_text("a,water\nb.2,\nc,forest water\n")
    data = Folders(root, MODALITIES)
    assert data.classes == ("forest", "water") and data[2]["labels"].tolist() == [True, True]
    data = Folders(root, MODALITIES, classes=("forest water", "water"))
    assert data[2]["labels"].tolist() == [True, False] and data[0]["labels"].tolist() == [False, True]
    with pytest.raises(DataError, match="labels.csv: a has the class 'water', expected forest water, snow"):
        Folders(root, MODALITIES, classes=("forest water", "snow"))


def test_masks_keep_their_values(root):
    for k, id in enumerate(IDS):
        mask = np.random.default_rng(k).integers(0, 4, (1, *SIZE)).astype(np.uint8)
        save(root / "mask" / f"{id}.png", mask)
    item = Folders(root, MODALITIES, masks=("x", "y", "z"))[2]
    assert item["mask"].dtype == np.uint8 and np.array_equal(item["mask"], mask[0])
    with pytest.raises(DataError, match="mask/c.png: class 3, expected 0 to 2"):
        Folders(root, MODALITIES, masks=("x", "y"))[2]


def test_a_declared_data_set_reads_them(root, monkeypatch):
    monkeypatch.setattr(datasets, "_TABLE", dict(datasets._TABLE))
    (root / "fit.txt").write_text("c\na\nb.2\n")
    (root / "labels.csv").write_text("a,forest\nb.2\nc,snow\n")
    spec = {"modalities": ["rgb", "heat"], "splits": ["fit"], "labels": ["snow", "forest"]}
    found = datasets.declared("mine", spec, {"heat": HEAT})
    assert found.modalities == (RGB, HEAT) and found.pretrain == "fit" and datasets.find("mine") is found
    data = found.read(root, "fit")
    assert data.ids == ["c", "a", "b.2"] and data[0]["labels"].tolist() == [True, False]
    (root / "heat" / "b.2.tif").unlink()
    with pytest.raises(DataError, match="b.2 for one is not in heat"):
        found.read(root, "fit")
    with pytest.warns(UserWarning, match="'ids': 1"):
        assert found.read(root, "fit", missing="skip").ids == ["c", "a"]
    for id in IDS:
        save(root / "mask" / f"{id}.png", np.full((1, *SIZE), 2, np.uint8))
    found = datasets.declared("mine", spec | {"labels": [], "masks": ["x"]}, {"heat": HEAT})
    with pytest.warns(UserWarning), pytest.raises(DataError, match="mask/c.png: class 2, expected 0 to 1"):
        found.read(root, missing="skip")[1]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("resample", "no", "true or false"),
        ("resample", "False", "true or false"),
        ("drawn", 0, "true or false"),
        ("labels", "forest", "a list"),
        ("splits", "train", "a list"),
        ("title", ["a"], "text"),
    ],
)
def test_a_declaration_of_another_kind_is_refused(monkeypatch, field, value, expected):
    monkeypatch.setattr(datasets, "_TABLE", dict(datasets._TABLE))
    with pytest.raises(ValueError, match=f"'mine': {field} = .*; expected {expected}"):
        datasets.declared("mine", {"modalities": ["rgb", "heat"], field: value}, {"heat": HEAT})


@pytest.mark.parametrize("kind", ["labels", "masks"])
def test_a_list_to_pretrain_on_may_hold_images_without_labels(root, kind):
    for name, ids in {"pretrain": IDS, "train": ["a"], "test": ["c"], "half": ["a", "b.2"]}.items():
        (root / f"{name}.txt").write_text("\n".join(ids))
    if kind == "labels":
        (root / "labels.csv").write_text("a,forest\nc,snow\n")
    else:
        for id in ("a", "c"):
            save(root / "mask" / f"{id}.png", np.ones((1, *SIZE), np.uint8))
    names = {kind: ["forest", "snow"], "modalities": ["rgb", "heat"], "splits": ["pretrain", "train", "test"]}
    found = datasets.declared("few", names, {"heat": HEAT})
    field = kind.removesuffix("s") if kind == "masks" else kind
    assert found.pretrain == "pretrain" and found.task.field == field
    for split, count in (("pretrain", 3), ("half", 2)):
        with pytest.warns(match=f"nothing for 1 of {count} ids, first b.2; images of {split}.txt are taken without"):
            data = found.read(root, split)
        assert len(data) == count and list(data[0]) == ["id", "rgb", "heat"] and not data.labelled
    assert field in found.read(root, "train")[0] and field in found.read(root, "test")[0]
    (root / "train.txt").write_text("a\nb.2")
    with pytest.raises(DataError, match=r"nothing for 1 of 2 ids, first b.2; complete it, .*splits: \[pretrain, train"):
        found.read(root, "train")


@pytest.mark.parametrize("name", ["id", "labels", "mask"])
def test_a_modality_is_not_called_like_another_part_of_an_item(monkeypatch, name):
    monkeypatch.setattr(datasets, "_TABLE", dict(datasets._TABLE))
    with pytest.raises(ValueError, match="none called id, labels or mask"):
        datasets.declared("mine", {"modalities": ["rgb", name]}, {name: replace(HEAT, name=name)})


def test_other_sizes_are_resampled_on_request(root):
    y, x = np.indices((6, 8))
    ramp = (100 * x + 20 * y + 500).astype(np.uint16)[None]
    mask = np.zeros((1, 6, 8), np.uint8)
    mask[:, :, 4:] = 2
    for id in IDS:
        save(root / "heat" / f"{id}.tif", ramp)
        save(root / "mask" / f"{id}.png", mask)
    item = Folders(root, MODALITIES, resample=True)[0]
    y, x = np.indices(SIZE)
    expected = 100 * ((x + 0.5) / 2 - 0.5) + 20 * ((y + 0.5) / 2 - 0.5) + 500
    assert item["heat"].shape == (1, *SIZE) and item["heat"].dtype == np.float32
    assert np.allclose(item["heat"][0, 1:-1, 1:-1], expected[1:-1, 1:-1], atol=0.01)
    assert np.array_equal(item["mask"], mask[0].repeat(2, 0).repeat(2, 1))
    save(root / "rgb" / "a.png", pixels("a", 3, size=(6, 8)).astype(np.uint8))  # now the images are the smaller ones
    save(root / "heat" / "a.tif", pixels("a", 1, size=(12, 16)).astype(np.uint16))
    assert Folders(root, MODALITIES, resample=True)[0]["heat"].shape == (1, 6, 8)


def test_images_are_resampled_to_8_bits_where_they_have_8_bits(root):
    data = Folders(root, (HEAT, RGB), resample=True)
    save(root / "heat" / "a.tif", pixels("a", 1, size=(24, 32)).astype(np.uint16))
    item = data[0]
    assert item["rgb"].dtype == np.uint8 and item["rgb"].shape == (3, 24, 32)
    assert abs(item["rgb"].astype(float).mean((1, 2)) - pixels("a", 3).mean((1, 2))).max() < 3


def placed(west, north, pixel, crs="EPSG:32633"):
    return {"crs": crs, "transform": Affine(pixel, 0, west, 0, -pixel, north)}


def test_georeferenced_files_must_share_a_grid(root):
    for id in IDS:
        (root / "rgb" / f"{id}.png").unlink()
        save(root / "rgb" / f"{id}.tif", pixels(id, 3).astype(np.uint8), **placed(500_000, 5_000_000, 10))
        save(root / "heat" / f"{id}.tif", pixels(id, 1).astype(np.uint16), **placed(500_000, 5_000_000, 10))
    Folders(root, MODALITIES)[0]
    for place, found in (
        (placed(500_040, 5_000_000, 10), "12 x 16 pixels at 500040, 4999880, 500200, 5000000 of EPSG:32633, but"),
        (placed(500_000, 5_000_000, 10, "EPSG:32634"), "of EPSG:32634, but .*of EPSG:32633"),
        (placed(500_000, 5_000_000, 20), "heat/a.tif: 12 x 16 pixels at 500000, 4999760, 500320, 5000000 of"),
    ):
        save(root / "heat" / "a.tif", pixels("a", 1).astype(np.uint16), **place)
        with pytest.raises(DataError, match=found):
            Folders(root, MODALITIES)[0]
    save(root / "heat" / "a.tif", pixels("a", 1).astype(np.uint16), **placed(500_004, 5_000_003, 10))
    assert np.array_equal(Folders(root, MODALITIES)[0]["heat"], pixels("a", 1))  # within half a pixel


def test_turned_and_mirrored_grids_are_told_apart(root):
    east, turned = placed(500_000, 5_000_000, 10), Affine(0, 10, 500_000, -10, 0, 5_000_000)  # one square, two grids
    mirrored = Affine(-10, 0, 500_120, 0, -10, 5_000_000)
    for grid, other, fits in ((east, turned, False), (east, mirrored, False), (mirrored, mirrored, True)):
        grid, other = (g if isinstance(g, dict) else east | {"transform": g} for g in (grid, other))
        (root / "rgb" / "a.png").unlink(missing_ok=True)
        save(root / "rgb" / "a.tif", pixels("a", 3, size=(12, 12)).astype(np.uint8), **grid)
        save(root / "heat" / "a.tif", pixels("a", 1, size=(12, 12)).astype(np.uint16), **other)
        if fits:
            assert np.array_equal(Folders(root, MODALITIES)[0]["heat"], pixels("a", 1, size=(12, 12)))
        else:
            with pytest.raises(DataError, match="heat/a.tif: 12 x 12 pixels at .* resample: true"):
                Folders(root, MODALITIES)[0]


def test_resampling_is_by_place_where_files_say_it(root):
    y, x = np.indices((20, 20))
    for id in IDS:
        (root / "rgb" / f"{id}.png").unlink()
        save(root / "rgb" / f"{id}.tif", pixels(id, 3).astype(np.uint8), **placed(500_000, 5_000_000, 10))
        coarse = (3.0 * (499_900 + 20 * (x + 0.5)) - 2.0 * (5_000_060 - 20 * (y + 0.5)) + 1e7).astype(np.float32)[None]
        save(root / "heat" / f"{id}.tif", coarse, **placed(499_900, 5_000_060, 20))
    item = Folders(root, MODALITIES, resample=True)[0]
    y, x = np.indices(SIZE)
    expected = 3.0 * (500_000 + 10 * (x + 0.5)) - 2.0 * (5_000_000 - 10 * (y + 0.5)) + 1e7
    assert abs(item["heat"][0] - expected).max() < 1
    save(root / "heat" / "a.tif", coarse, **placed(500_080, 5_000_060, 20))  # begins in the middle
    with pytest.raises(DataError, match="heat/a.tif: .*no data for 96 of the 192 pixels of .*rgb/a.tif"):
        Folders(root, MODALITIES, resample=True)[0]


def test_pixels_without_data_are_not_numbers(root):
    values = pixels("a", 1).astype(np.uint16)
    values[0, 3, 4] = 65535
    save(root / "heat" / "a.tif", values, nodata=65535)
    heat = Folders(root, MODALITIES)[0]["heat"]
    assert np.isnan(heat[0, 3, 4]) and np.isnan(heat).sum() == 1


def test_a_mapping_is_measured_and_said(root, capsys):
    data = Folders(root, MODALITIES)
    mapping = measure(data, HEAT)
    heat = Modality.from_mapping(mapping)
    values = np.concatenate([pixels(id, 1).ravel() for id in IDS])
    assert heat.scheme == "range_8bit" and heat.name == "heat" and heat.unit == HEAT.unit
    assert heat.low + heat.high == pytest.approx(np.percentile(values, (1, 99)), rel=1e-4)
    said = capsys.readouterr().out
    assert said.startswith("heat: 3 samples look like whole numbers of 12 bits") and said.count("\n") == 1
    assert "declared as digital numbers" in said and f"thermal {heat.low[0]:g} to {heat.high[0]:g}" in said
    encoded = heat.encode(data[0]["heat"])
    assert encoded.min() == 0 and encoded.max() == 255 and abs(encoded.mean() - 127) < 12
    mapping = measure(data, replace(RGB, scheme="measured"))
    assert mapping["scheme"] == "bytes" and "low" not in mapping
    assert "look like 8-bit images, kept as they are, declared as 8-bit colour" in capsys.readouterr().out


def test_values_far_from_zero_are_measured_as_finely_as_they_need(root):
    for id in IDS:
        save(root / "heat" / f"{id}.tif", 1e6 + pixels(id, 1) / 4096)
    heat = Modality.from_mapping(measure(Folders(root, MODALITIES), HEAT))
    assert 1e6 <= heat.low[0] < 1e6 + 0.1 and 1e6 + 0.9 < heat.high[0] <= 1e6 + 1


def test_measuring_leaves_out_what_cannot_be_read(root, capsys):
    constant = np.full((1, *SIZE), 9, np.uint16)
    save(root / "heat" / "a.tif", constant)
    assert measure(Folders(root, MODALITIES), HEAT)["scheme"] == "range_8bit"
    assert "heat: 2 samples look like" in (said := capsys.readouterr().out) and "1 left out, first: " in said
    holes = pixels("b.2", 1).astype(np.uint16)
    holes[0, 0, 0] = 5000
    save(root / "heat" / "b.2.tif", holes, nodata=5000)
    save(root / "heat" / "c.tif", constant)
    with pytest.raises(DataError, match="heat: none of 3 samples can be measured, first: .*a.tif: band thermal of a"):
        measure(Folders(root, MODALITIES), HEAT)


def test_measuring_leaves_out_what_a_conversion_would_refuse(root, capsys):
    """Holes that nothing marks: a few of them would have been the lower end of the mapping of all others."""
    holes = pixels("a", 1).astype(np.float32)
    holes[0, :, :9] = -9999
    save(root / "heat" / "a.tif", holes)
    heat = modality.declared("heat", {"bands": ["thermal"], "unit": "digital numbers", "valid_range": [0, 4095]})
    mapping = measure(Folders(root, MODALITIES), heat)
    assert 0 <= mapping["low"][0] < mapping["high"][0] <= 4095
    said = capsys.readouterr().out
    assert "2 samples look like" in said and "1 left out, first: a: heat: expected" in said and "found -9999 to" in said


def test_a_band_that_is_nearly_all_one_value_is_measured_between_its_extremes(root):
    sparse = np.zeros((1, *SIZE), np.uint16)
    sparse[0, 0, 0] = 300
    for id in IDS:
        save(root / "heat" / f"{id}.tif", sparse)
    mapping = measure(Folders(root, MODALITIES), HEAT)
    assert mapping["low"] == [0] and mapping["high"] == [300]


def test_what_values_look_like():
    random = np.random.default_rng(0)
    for expected, values in {
        "8-bit images": random.integers(0, 256, 5000).astype(np.uint8),
        "whole numbers of 12 bits": random.integers(0, 4096, 5000),
        "whole numbers of 16 bits": random.integers(0, 65536, 5000).astype(np.float32),
        "shares of 1": random.uniform(0, 1, 5000),
        "an index from -1 to 1": random.uniform(-0.9, 0.8, 5000),
        "decibels": random.normal(-14, 5, 5000),
        "degrees": random.uniform(1, 359, 5000),
        "metres of elevation": random.uniform(200, 3000, 5000),
        "another unit": random.normal(0, 1e6, 5000),
    }.items():
        assert looks_like(values).startswith(expected), expected


@needs_shared
def test_real_flood_patches_in_two_folders(tmp_path):
    half = SHARED / "ombria_half"
    for name, sensor in (("sar", 1), ("optical", 2)):
        (tmp_path / name).mkdir()
        for path in sorted((half / f"OmbriaS{sensor}" / "test" / "AFTER").iterdir()):
            (tmp_path / name / f"{path.stem[-4:]}.png").symlink_to(path)
    sar = replace(RGB, name="sar", bands=("VV",))
    optical = replace(RGB, name="optical", bands=("B11", "B8", "B3"))
    data = Folders(tmp_path, (sar, optical))
    assert len(data) == 70 and not data.left_out
    item = data[data.ids.index("0400")]
    assert item["sar"].shape == (1, 128, 128) and item["optical"].shape == (3, 128, 128)
    with Image.open(half / "OmbriaS2" / "test" / "AFTER" / "S2_after_0400.png") as image:
        assert np.array_equal(item["optical"], np.asarray(image).transpose(2, 0, 1))


@needs_shared
def test_real_photograph_and_elevation_on_other_grids(tmp_path, capsys):
    """Landsat at 0.0015 degrees, elevation on another grid, both in longitude and latitude."""
    source = SHARED / "rgb_dem_rmnp"
    files = sorted(source.rglob("*.tif"))
    with_bands = {rasterio.open(path).count: path for path in files}
    elevation = modality.declared("dem", {"bands": ["elevation"], "unit": "metres"})
    for name, count in (("dem", 1), ("rgb", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rmnp.tif").symlink_to(with_bands[count])
    with pytest.raises(DataError, match="rgb/rmnp.tif: 373 x 485 pixels at .*dem/rmnp.tif .*has 187 x 152 pixels"):
        Folders(tmp_path, (elevation, RGB))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        item = Folders(tmp_path, (elevation, RGB), resample=True)[0]
    assert item["rgb"].shape == (3, 187, 152) and item["rgb"].dtype == np.uint8
    with rasterio.open(with_bands[1]) as dem, rasterio.open(with_bands[3]) as rgb:
        assert np.array_equal(item["dem"], dem.read())
        place = rgb.read(window=rgb.window(*dem.bounds).round_offsets().round_lengths())
    assert abs(item["rgb"].mean((1, 2)) - place.mean((1, 2))).max() < 2
    mapping = Modality.from_mapping(measure(Folders(tmp_path, (elevation, RGB), resample=True), elevation))
    assert 2281 <= mapping.low[0] < 2600 and 3600 < mapping.high[0] <= 4261
    assert "dem: 1 samples look like whole numbers of 14 bits" in capsys.readouterr().out
