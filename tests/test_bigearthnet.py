import gzip
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import rasterio
from rasterio import Affine

from decur_core import config
from decur_core.data import prepare
from decur_core.data.bigearthnet import (
    BAND_FILES,
    CLASS_OF,
    CLASSES_19,
    BigEarthNetMM,
    BigEarthNetV2,
    _read,
    labels_19,
    read_list,
)
from decur_core.data.modality import OPTICAL, SAR
from decur_core.data.raster import DataError
from decur_core.data.store import Store

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL, SPLITS = SHARED / "bigearthnet_real", SHARED / "bigearthnet_splits"
FIXTURE = SHARED / "torchgeo_fixtures" / "bigearthnet_v1"
FIXTURE_V2 = SHARED / "torchgeo_fixtures" / "bigearthnet_v2"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} with the sample data is missing")
PATCHES = [
    "S2A_MSIL2A_20170613T101031_87_48",
    "S2A_MSIL2A_20170617T113321_36_85",
    "S2A_MSIL2A_20170617T113321_4_55",
    "S2B_MSIL2A_20180204T94161_57_38",
]


@pytest.fixture
def tree(tmp_path):
    """The real patches under the names of the full data set, in a folder that may be damaged."""
    shutil.copytree(REAL / "BigEarthNet-S2-Example", tmp_path / "BigEarthNet-v1.0")
    shutil.copytree(REAL / "BigEarthNet-S1-Example", tmp_path / "BigEarthNet-S1-v1.0")
    return tmp_path


@pytest.fixture
def tree_v2(tmp_path):
    """The real patches of the first release in the tree of the second one: scene folders, a table, no JSON."""
    v1, rows = BigEarthNetMM(REAL), []
    for i, (s2, s1) in enumerate(v1._partners.items()):
        names = {"S2": s2.replace("MSIL2A", "MSIL2A_N9999_R022_T33UUP"), "S1": s1.rsplit("_", 2)[0] + f"_7_{i}"}
        for sensor, old, fields in (("S2", s2, 2), ("S1", s1, 3)):
            folder = tmp_path / f"BigEarthNet-{sensor}" / names[sensor].rsplit("_", fields)[0] / names[sensor]
            folder.mkdir(parents=True)
            for path in (REAL / f"BigEarthNet-{sensor}-Example" / old).glob("*.tif"):
                shutil.copy(path, folder / path.name.replace(old, names[sensor]))
        labels = [name for name, there in zip(CLASSES_19, v1.labels[i], strict=True) if there]
        split = ("train", "train", "validation", "test")[i]
        rows.append({"patch_id": names["S2"], "s1_name": names["S1"], "split": split, "labels": labels, "country": "x"})
    write_table(tmp_path, rows)
    return tmp_path


def write_table(root, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")


def table(root):
    return pa.parquet.read_table(root / "metadata.parquet").to_pylist()


def edit(path, values=None, **changes):
    """Rewrite a one-band file with other pixels or another profile."""
    with rasterio.open(path) as source:
        profile, old = source.profile, source.read()
    values = old if values is None else values
    values = values if values.ndim == 3 else values[None]
    size = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", **(profile | size | changes)) as target:
        target.write(values)


def edit_json(patch, **changes):
    (path,) = patch.glob("*_labels_metadata.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_classes_are_those_of_the_layout_notes():
    text = (SHARED / "LAYOUTS.md").read_text()
    table = text[text.index("43 classes in index order") : text.index("19 classes in index order")]
    rows = re.findall(r"(\d+) ([A-Z][^>]*?) -> (\d+|-)", table)
    assert [int(index) for index, _, _ in sorted(rows, key=lambda row: int(row[0]))] == list(range(43))
    assert {name: None if k == "-" else int(k) for _, name, k in rows} == CLASS_OF
    names = text[text.index("19 classes in index order") : text.index("Dropped 11 of 43")].split(":", 1)[1]
    assert [n.strip().split(" ", 1)[1] for n in " ".join(names.split()).split(";")] == list(CLASSES_19)


def test_labels_are_merged_and_others_refused():
    labels = labels_19(["Water courses", "Water bodies", "Airports", "Rice fields"], source="x.json")
    assert labels.dtype == bool and np.flatnonzero(labels).tolist() == [2, 17]
    with pytest.raises(DataError, match="x.json: unknown label 'Lakes'"):
        labels_19(["Lakes"], source="x.json")


def test_official_lists_are_disjoint_and_complete():
    lists = {name: read_list(SPLITS / f"{name}.csv.bz2") for name in ("train", "val", "test")}
    assert [len(names) for names in lists.values()] == [269_695, 123_723, 125_866]
    assert len(set().union(*lists.values())) == 519_284
    assert len(read_list(SPLITS / "patches_with_seasonal_snow.csv.bz2")) == 61_707


def test_real_patches_have_the_measured_values():
    data = BigEarthNetMM(REAL)
    assert data.ids == PATCHES
    means = []
    for i, patch in enumerate(PATCHES):
        item = data[i]
        assert item["id"] == patch
        assert item["sar"].shape == (2, 120, 120) and item["optical"].shape == (13, 120, 120)
        assert item["sar"].dtype == item["optical"].dtype == np.float32
        means.append(item["sar"].mean(axis=(1, 2)))
        folder = REAL / "BigEarthNet-S2-Example" / patch
        for row, band in ((1, "B02"), (7, "B08")):
            with rasterio.open(folder / f"{patch}_{band}.tif") as source:
                assert (item["optical"][row] == source.read(1)).all()
        for row, band in ((0, "B01"), (8, "B8A"), (9, "B09"), (11, "B11"), (12, "B12")):
            with rasterio.open(folder / f"{patch}_{band}.tif") as source:
                assert item["optical"][row].mean() == pytest.approx(source.read(1).mean(), rel=0.01)
        assert (item["optical"][10] == 0).all()  # level 2A has no B10
        names = json.loads((folder / f"{patch}_labels_metadata.json").read_text())["labels"]
        assert {CLASSES_19[k] for k in np.flatnonzero(item["labels"])} == {CLASSES_19[CLASS_OF[n]] for n in names}
        assert (data.labels[i] == item["labels"]).all() and item["labels"].dtype == bool
        assert SAR.encode(item["sar"]).shape == (2, 120, 120) and OPTICAL.encode(item["optical"])[10].max() == 0
    vv, vh = np.array(means).T
    assert vv.min() == pytest.approx(-12.2, abs=0.05) and vv.max() == pytest.approx(-7.9, abs=0.05)
    assert (vh < vv - 3).all()  # VV first


def test_official_lists_select_the_real_patches():
    def of(split, **settings):
        return BigEarthNetMM(REAL, SPLITS / f"{split}.csv.bz2", missing="skip", **settings)

    train = of("train")
    assert train.ids == [PATCHES[2], PATCHES[1]]  # the order of the list
    assert train.left_out == {"excluded": 0, "absent": 269_693, "no 19-class label": 0}
    assert of("test").ids == [PATCHES[0]]
    with pytest.raises(
        DataError, match="123723 of 123723 patches are not there, first S2.*no S2 patch.*missing='skip'"
    ):
        BigEarthNetMM(REAL, SPLITS / "val.csv.bz2")
    with pytest.raises(DataError, match="no patch is left of 57"):
        of("patches_with_no_19_class_targets")
    clear = BigEarthNetMM(REAL, exclude=[SPLITS / "patches_with_seasonal_snow.csv.bz2"])
    assert clear.ids == PATCHES[:3] and clear.left_out["excluded"] == 1
    with pytest.raises(ValueError, match="missing is 'ignore'"):
        BigEarthNetMM(REAL, missing="ignore")


def test_fixture_is_walked_with_its_lists_and_its_pixels_refused():
    """Three of its four VV files are single integers, and all lie on a lon-lat grid of 1 degree."""
    found = {split: BigEarthNetMM(FIXTURE, split) for split in ("train", "val", "test")}
    assert {split: [i[-5:] for i in data.ids] for split, data in found.items()} == {
        "train": ["61_39", "61_40"],
        "val": ["61_41"],
        "test": ["61_42"],
    }
    assert len(BigEarthNetMM(FIXTURE)) == 4
    assert np.flatnonzero(found["test"].labels[0]).tolist() == [2, 9]
    for split, i, words in (
        ("train", 0, "VV.tif: expected floating-point"),
        ("train", 1, "expected a UTM grid of 10 m"),
    ):
        with pytest.raises(DataError, match=words):
            found[split][i]


def test_irregular_file_names_of_a_sar_patch_are_found(tree):
    patch = next((tree / "BigEarthNet-S1-v1.0").iterdir())
    expected = {item["id"]: item["sar"].sum() for item in BigEarthNetMM(tree)}
    for path in list(patch.iterdir()):
        band = path.name.removeprefix(patch.name)
        path.rename(patch / f"{patch.name}_41{band}")
    assert {item["id"]: item["sar"].sum() for item in BigEarthNetMM(tree)} == expected
    (path,) = patch.glob("*_VV.tif")
    shutil.copy(path, patch / "other_VV.tif")
    with pytest.raises(DataError, match=r"2 files fit \*_VV.tif, expected 1"):
        [*BigEarthNetMM(tree)]


def test_partners_come_from_the_list_or_from_the_json(tree):
    by_json = BigEarthNetMM(tree)
    (tree / "bigearthnet-val.csv").write_text("".join(f"{s2},{s1}\n" for s2, s1 in by_json._partners.items()))
    by_list = BigEarthNetMM(tree, "val")
    assert by_list._partners == by_json._partners and by_list.ids == PATCHES
    one, other = list(by_json._partners.values())[:2]
    (tree / "bigearthnet-train.csv").write_text(f"{PATCHES[0]},{other}\n")
    with pytest.raises(
        DataError, match=f"{other}: its JSON says S2 patch {PATCHES[1]}.*expected S2 patch {PATCHES[0]}"
    ):
        BigEarthNetMM(tree, "train")[0]
    shutil.rmtree(tree / "BigEarthNet-S1-v1.0" / one)
    with pytest.raises(DataError, match=f"1 of 4 patches are not there, first {PATCHES[0]} .no S1 patch"):
        BigEarthNetMM(tree, "val")
    assert BigEarthNetMM(tree, "val", missing="skip").ids == PATCHES[1:]
    assert BigEarthNetMM(tree, missing="skip").ids == PATCHES[1:]


def test_lists_are_read_as_the_record_of_the_data_set_has_them(tree):
    """Compressed with gzip, and by the plain name of the split."""
    everything = BigEarthNetMM(tree)
    lists = {"train": PATCHES[1:], "val": PATCHES[:1], "patches_with_seasonal_snow": PATCHES[3:]}
    lists["patches_with_cloud_and_shadow"] = PATCHES[2:3]
    for name, patches in lists.items():
        with gzip.open(tree / f"{name}.csv.gz", "wt") as file:
            file.write("".join(f"{s2},{everything._partners[s2]}\n" for s2 in patches))
    assert BigEarthNetMM(tree, "train").ids == PATCHES[1:] and BigEarthNetMM(tree, "val").ids == PATCHES[:1]
    assert _read(tree, "train", exclude=True).ids == PATCHES[1:2]
    (tree / "patches_with_cloud_and_shadow.csv.gz").unlink()  # with half of the lists, half of the patches would stay
    with pytest.raises(DataError, match="patches_with_seasonal_snow and patches_with_cloud_and_shadow are needed"):
        _read(tree, "train", exclude=True)
    (tree / "bigearthnet-train.csv").write_text(f"{PATCHES[0]}\n")  # which is told apart, and goes first
    assert BigEarthNetMM(tree, "train").ids == PATCHES[:1]
    with pytest.raises(DataError, match="bigearthnet-test.csv: missing; expected a list of S2 patches"):
        BigEarthNetMM(tree, "test")
    path = tree / "val.csv.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="val.csv.gz: cannot be read; expected a list"):
        BigEarthNetMM(tree, "val")


def test_labels_decide_and_are_checked(tree):
    s2 = tree / "BigEarthNet-v1.0"
    edit_json(s2 / PATCHES[0], labels=["Airports", "Burnt areas"])
    data = BigEarthNetMM(tree)
    assert data.ids == PATCHES[1:] and data.left_out["no 19-class label"] == 1
    edit_json(s2 / PATCHES[1], labels=["Vineyards"])
    with pytest.raises(DataError, match="labels.*expected S2 patch"):
        BigEarthNetMM(tree)[0]
    path = edit_json(s2 / PATCHES[2], labels=["Pasture"])
    data = BigEarthNetMM(tree)  # the others stay usable
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: unknown label 'Pasture'"):
        data[data.ids.index(PATCHES[2])]
    path.write_text("{")
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: cannot be read; expected JSON with the key 'labels'"):
        data = BigEarthNetMM(tree)
        data[data.ids.index(PATCHES[2])]


def shifted(path):
    with rasterio.open(path) as source:
        a, b, c, d, e, f = source.transform[:6]
    edit(path, transform=Affine(a, b, c + 10, d, e, f))
    return "must lie at the same place"


def damaged_json(path):
    path.write_bytes(b"\xff\xfe{")
    return "cannot be read; expected JSON with the key 'labels'"


def json_without_list(path):
    path.write_text('{"labels": null}')
    return "cannot be read; expected JSON with the key 'labels'"


def raw_backscatter(path):
    with rasterio.open(SHARED / "sentinel1_grd_raw" / "iw-vv.tiff") as source:
        edit(path, source.read(1)[400:520, 400:520])
    return "expected floating-point numbers, found uint16"


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])
    return "cannot be read"


# What happens to a file of the first patch, and the words of the error
DAMAGE = {
    "cut": ("S2", "B03.tif", cut),
    "cut SAR": ("S1", "VV.tif", cut),
    "damaged": (
        "S2",
        "B03.tif",
        lambda path: shutil.copy(SHARED / "rasterio_tests" / "corrupt.tif", path) and "found 3",
    ),
    "absent": ("S2", "B12.tif", lambda path: path.unlink() or "missing"),
    "absent SAR": ("S1", "VH.tif", lambda path: path.unlink() or "0 files fit"),
    "two bands": ("S2", "B8A.tif", lambda path: edit(path, np.ones((2, 60, 60), np.uint16)) or "expected 1 band"),
    "other size": ("S2", "B11.tif", lambda path: edit(path, np.ones((40, 40), np.uint16)) or "expected 60 x 60"),
    "other SAR size": ("S1", "VV.tif", lambda path: edit(path, np.ones((119, 120), np.float32)) or "119 x 120 pixels"),
    "float": ("S2", "B02.tif", lambda path: edit(path, np.ones((120, 120), np.float32)) or "expected integers"),
    "digital numbers": ("S1", "VV.tif", raw_backscatter),
    "shifted": ("S2", "B02.tif", shifted),
    "shifted SAR": ("S1", "VH.tif", shifted),
    "other zone": ("S1", "VV.tif", lambda path: edit(path, crs="EPSG:32634") or "in EPSG:32634, but .* EPSG:32633"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("version", ["tree", "tree_v2"])
def test_damage_is_an_error_that_names_the_file(version, damage, request):
    root, (sensor, suffix, apply) = request.getfixturevalue(version), DAMAGE[damage]
    data = BigEarthNetMM(root) if version == "tree" else BigEarthNetV2(root)
    before = [item["sar"].sum() for item in data]
    folder = {"tree": {"S2": "BigEarthNet-v1.0", "S1": "BigEarthNet-S1-v1.0"}}.get(version, {}).get(sensor)
    s2 = data.ids[0]
    (path,) = root.glob(
        f"{folder or f'BigEarthNet-{sensor}/*'}/{s2 if sensor == 'S2' else data._partners[s2]}/*{suffix}"
    )
    words = apply(path)
    with pytest.raises(DataError, match=words) as error:
        data[0]
    assert str(path.parent) in str(error.value)
    assert [data[i]["sar"].sum() for i in range(1, 4)] == before[1:]


def test_patches_on_a_lon_lat_grid_are_refused(tree):
    for path in tree.glob(f"*/*{PATCHES[0][-6:]}/*.tif"):
        edit(path, crs="EPSG:4326", transform=Affine(1e-4, 0, 13, 0, -1e-4, 48))
    with pytest.raises(DataError, match="_B02.tif: pixels of 0.0001 in EPSG:4326, expected a UTM grid of 10 m"):
        BigEarthNetMM(tree)[0]


def test_pixels_that_cannot_be_backscatter_are_refused_by_the_preprocessing(tree):
    data = BigEarthNetMM(tree)
    path = tree / "BigEarthNet-S1-v1.0" / data._partners[PATCHES[0]] / f"{data._partners[PATCHES[0]]}_VH.tif"
    values = data[0]["sar"][1]
    values[0, 0] = np.nan
    edit(path, values)
    with pytest.raises(DataError, match="non-finite"):
        SAR.encode(BigEarthNetMM(tree)[0]["sar"])
    values[0, 0] = -9999  # as other products mark missing pixels
    edit(path, values, nodata=-9999)
    with pytest.raises(DataError, match="found -9999"):
        SAR.encode(BigEarthNetMM(tree)[0]["sar"])


def test_swapped_folders_are_refused(tree, tree_v2):
    """Both fixtures share a folder: v1 and v2 side by side."""
    for one, other in (("BigEarthNet-v1.0", "BigEarthNet-S1-v1.0"), ("BigEarthNet-S2", "BigEarthNet-S1")):
        (tree / one).rename(tree / "x")
        (tree / other).rename(tree / one)
        (tree / "x").rename(tree / other)
    for make in (BigEarthNetMM, BigEarthNetV2):
        with pytest.raises(DataError, match="4 of 4 patches are not there, first S"):
            make(tree)


@pytest.mark.parametrize("damage", [damaged_json, json_without_list])
@pytest.mark.parametrize("folder", ["BigEarthNet-v1.0", "BigEarthNet-S1-v1.0"])
def test_unreadable_json_is_named(tree, damage, folder):
    s1 = BigEarthNetMM(tree)._partners
    (tree / "bigearthnet-val.csv").write_text("".join(f"{s2},{s1[s2]}\n" for s2 in PATCHES))
    (path,) = (tree / folder / (PATCHES[1] if folder == "BigEarthNet-v1.0" else s1[PATCHES[1]])).glob("*.json")
    words = damage(path)
    data = BigEarthNetMM(tree, "val")
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: {words}"):
        data[1]
    assert data.ids == PATCHES and data[0]["id"] == PATCHES[0]


@pytest.mark.parametrize(
    "changes",
    [{"labels": [["Pastures"]]}, {"labels": [{}]}, {"corresponding_s2_patch": ["S2A"]}, {"labels": "Pastures"}],
)
def test_json_of_another_form_is_named(tree, changes):
    s1 = BigEarthNetMM(tree)._partners[PATCHES[1]]
    path = edit_json(tree / "BigEarthNet-S1-v1.0" / s1, **changes)
    with pytest.raises(DataError, match=re.escape(str(path))):
        BigEarthNetMM(tree)


def test_a_folder_in_the_place_of_a_json_costs_its_patch_only(tree):
    (path,) = (tree / "BigEarthNet-v1.0" / PATCHES[1]).glob("*.json")
    path.unlink()
    path.mkdir()
    data = BigEarthNetMM(tree)
    with pytest.raises(DataError, match=re.escape(str(path))):
        data[1]
    assert data.ids == PATCHES and data[0]["id"] == PATCHES[0]


def test_hidden_files_and_folders_are_of_other_programs(tree):
    for folder in ("BigEarthNet-v1.0", "BigEarthNet-S1-v1.0"):
        (tree / folder / ".ipynb_checkpoints").mkdir()
    for path in [*tree.glob("*/*/*.json"), *tree.glob("*/*/*_VV.tif")]:
        path.with_name(f"._{path.name}").write_bytes(b"left by an archiver")
    data = BigEarthNetMM(tree)
    assert data.ids == PATCHES and data[3]["id"] == PATCHES[3]


def test_unreadable_lists_and_repeated_patches_are_refused(tree):
    (tree / "bigearthnet-val.csv").write_text(f"{PATCHES[0]}\n{PATCHES[1]}\n{PATCHES[0]}\n")
    with pytest.raises(DataError, match="bigearthnet-val.csv: 1 of 3 lines name a patch for a second time"):
        BigEarthNetMM(tree, "val")
    for name, content in (("cut.csv.bz2", (SPLITS / "val.csv.bz2").read_bytes()[:999]), ("x.csv", b"\xff\xfe"),
                          ("text.csv.bz2", b"S2A")):  # fmt: skip
        (tree / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: cannot be read; expected a list"):
            BigEarthNetMM(tree, tree / name)


def test_statistics_are_the_published_ones():
    text = " ".join((SHARED / "LAYOUTS.md").read_text().split())
    text = text[text.index("* Band statistics [BEN]") :]
    s2, s1 = text[: text.index("S1 mean")], text[text.index("S1 mean") : text.index("43 classes")]
    for found, key, bands in ((s1, "sar", ("VV", "VH")), (s2, "optical", BAND_FILES)):
        mean, std = (re.findall(r"-?\d+\.\d+", part) for part in found.split("std"))
        at = [k for k, band in enumerate(bands) if band]
        for numbers, values in zip((mean, std), BigEarthNetMM.statistics[key], strict=True):
            assert [values[k] for k in at] == [float(number) for number in numbers] and len(values) == len(bands)
    assert BigEarthNetMM.statistics["optical"][0][10] == BigEarthNetMM.statistics["optical"][1][10] == 0


def test_second_release_gives_the_pixels_of_its_files(tree_v2):
    data, v1 = BigEarthNetV2(tree_v2), BigEarthNetMM(REAL)
    assert [i[-5:] for i in data.ids] == [i[-5:] for i in v1.ids] and (data.labels == v1.labels).all()
    for item, old in zip(data, v1, strict=True):
        assert item["optical"].shape == (13, 120, 120) and item["sar"].shape == (2, 120, 120)
        assert all((item[key] == old[key]).all() for key in ("sar", "optical", "labels"))
        assert all(item[key].dtype == old[key].dtype for key in ("sar", "optical", "labels"))
    assert [len(BigEarthNetV2(tree_v2, split)) for split in ("train", "val", "validation", "test")] == [2, 1, 1, 1]
    assert BigEarthNetV2(tree_v2, "val").ids == data.ids[2:3]
    assert data.left_out == {"excluded": 0, "absent": 0, "no 19-class label": 0}
    again = pickle.loads(pickle.dumps(data))
    assert (again[3]["sar"] == data[3]["sar"]).all()


def write_flags(path: Path, patches: dict[str, tuple[bool, bool]]) -> None:
    columns = {"patch_id": [*patches], "contains_seasonal_snow": [snow for snow, _ in patches.values()]}
    columns["contains_cloud_or_shadow"] = [cloud for _, cloud in patches.values()]
    pa.parquet.write_table(pa.table(columns), path)


def test_patches_with_snow_and_clouds_of_the_second_release_are_left_out(tree_v2):
    ids, second = BigEarthNetV2(tree_v2).ids, tree_v2 / "metadata_for_patches_with_snow_cloud_or_shadow.parquet"
    with pytest.raises(DataError, match=f"{second}: missing, nor has metadata.parquet the columns .*exclude to false"):
        BigEarthNetV2(tree_v2, exclude=True)
    write_flags(
        second, {ids[0]: (True, False), ids[2]: (False, True), ids[3]: (False, False), "S2A_other": (True, True)}
    )
    data = BigEarthNetV2(tree_v2, exclude=True)
    assert data.ids == [ids[1], ids[3]] and len(data.labels) == 2 and data[1]["id"] == ids[3]
    assert data.left_out == {"excluded": 2, "absent": 0, "no 19-class label": 0}
    assert BigEarthNetV2(tree_v2).ids == ids
    assert BigEarthNetV2(tree_v2, "train", exclude=True).ids == [ids[1]]
    where = {"data.source": "published", "data.roots": {"bigearthnet": str(tree_v2)}}
    for exclude, expected in ((False, 2), (True, 1)):
        settings = config.load("start", {**where, "transfer.exclude": exclude})
        assert len(prepare.reader(settings, "bigearthnet", "train")) == expected
    where |= {"data.stores": str(tree_v2.parent / "stores"), "data.processes": 0}
    made = {e: config.load("start", {**where, "transfer.exclude": e}) for e in (False, True)}
    path = prepare.store(made[False], "bigearthnet", "train")
    with pytest.raises(config.ConfigError, match=f"{path}: made with transfer.exclude: false; remove it, or set"):
        prepare.store(made[True], "bigearthnet", "train")
    shutil.rmtree(path)
    assert len(Store(prepare.store(made[True], "bigearthnet", "train"))) == 1
    with pytest.raises(config.ConfigError, match=f"{path}: made with transfer.exclude: true"):
        prepare.store(made[False], "bigearthnet", "train")
    second.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=f"{second}: cannot be read"):
        BigEarthNetV2(tree_v2, exclude=True)
    second.unlink()

    flags = ({"contains_seasonal_snow": k == 2, "contains_cloud_or_shadow": False} for k in range(4))
    write_table(tree_v2, [row | more for row, more in zip(table(tree_v2), flags, strict=True)])
    assert BigEarthNetV2(tree_v2, exclude=True).ids == [ids[0], ids[1], ids[3]]


def test_fixture_of_the_second_release_is_walked_and_its_integer_backscatter_refused(tmp_path):
    found = {split: BigEarthNetV2(FIXTURE_V2, split) for split in ("train", "val", "test")}
    assert {split: [i[-5:] for i in data.ids] for split, data in found.items()} == {
        "train": ["26_57", "45_38"],
        "val": ["45_23"],
        "test": ["89_34"],
    }
    assert BigEarthNetV2(FIXTURE_V2)._partners[found["train"].ids[0]].endswith("_61_39")  # by the table, not by number
    assert [np.flatnonzero(row).tolist() for row in BigEarthNetV2(FIXTURE_V2).labels] == [
        [0, 1, 5], [8, 10, 13], [2, 4, 17], [9, 11],
    ]  # fmt: skip
    with pytest.raises(DataError, match="_VV.tif: expected floating-point numbers, found int16"):
        found["train"][0]
    for path in FIXTURE_V2.rglob("*.tif"):  # as float32 they are read, and so are bands that all have 120 x 120 pixels
        copy = tmp_path / path.relative_to(FIXTURE_V2)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        if path.parts[-4] == "BigEarthNet-S1":
            with rasterio.open(path) as source:
                edit(copy, source.read().astype(np.float32))
    shutil.copyfile(FIXTURE_V2 / "metadata.parquet", tmp_path / "metadata.parquet")
    for item in BigEarthNetV2(tmp_path):
        folder = next((FIXTURE_V2 / "BigEarthNet-S2").glob(f"*/{item['id']}"))
        for row, band in enumerate(BAND_FILES):
            if band:
                with rasterio.open(folder / f"{item['id']}_{band}.tif") as source:
                    assert (item["optical"][row] == source.read(1)).all()
        assert item["sar"].min() == -25 and item["sar"].max() == -1 and not item["optical"][10].any()


def test_partners_of_the_second_release_come_from_its_table(tree_v2):
    rows = table(tree_v2)
    write_table(tree_v2, [rows[0] | {"s1_name": rows[1]["s1_name"]}, *rows[1:]])
    with pytest.raises(DataError, match="must lie at the same place"):  # another patch than it belongs to
        BigEarthNetV2(tree_v2)[0]
    write_table(tree_v2, [rows[0] | {"s1_name": None}, *rows[1:]])
    with pytest.raises(DataError, match=f"1 of 4 patches are not there, first {rows[0]['patch_id']} .no S1 patch"):
        BigEarthNetV2(tree_v2)
    data = BigEarthNetV2(tree_v2, missing="skip")
    assert data.ids == [row["patch_id"] for row in rows[1:]] and data.left_out["absent"] == 1
    with pytest.raises(DataError, match="no patch is left of 1 in split test"):
        shutil.rmtree(next((tree_v2 / "BigEarthNet-S2").glob(f"*/{rows[3]['patch_id']}")))
        BigEarthNetV2(tree_v2, "test", missing="skip")
    with pytest.raises(ValueError, match="missing is 'ignore'"):
        BigEarthNetV2(tree_v2, missing="ignore")


def test_table_of_the_second_release_is_checked(tree_v2):
    rows = table(tree_v2)
    write_table(tree_v2, [rows[0] | {"labels": []}, *rows[1:]])
    data = BigEarthNetV2(tree_v2)
    assert len(data) == 3 and data.left_out["no 19-class label"] == 1 and (data[0]["labels"] == data.labels[0]).all()
    wrong = {
        "unknown": ([rows[0] | {"labels": ["Pastures", "Pasture"]}], r"has the labels \['Pastures', 'Pasture'\]"),
        "43 names": ([rows[0] | {"labels": ["Vineyards"]}], "expected some of the 19 names"),
        "numbers": ([row | {"labels": 3} for row in rows], "has the labels 3"),
        "nested": ([row | {"labels": [["Pastures"]]} for row in rows], r"has the labels \[\['Pastures'\]\]"),
        "null": ([*rows[1:], rows[0] | {"labels": None}], "has the labels None"),
        "twice": ([*rows, rows[0]], "metadata.parquet: 1 of 5 rows name a patch for a second time"),
        "column": ([{key: row[key] for key in row if key != "s1_name"} for row in rows], "metadata.parquet: cannot"),
    }
    for content, words in wrong.values():
        write_table(tree_v2, content)
        with pytest.raises(DataError, match=words):
            BigEarthNetV2(tree_v2)
    write_table(tree_v2, rows)
    with pytest.raises(DataError, match="no patch is left of 0 in split val2"):
        BigEarthNetV2(tree_v2, "val2")
    path = tree_v2 / "metadata.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="metadata.parquet: cannot be read; expected a Parquet file with patch_id, s1"):
        BigEarthNetV2(tree_v2)
    path.unlink()
    with pytest.raises(DataError, match="metadata.parquet: missing"):
        BigEarthNetV2(tree_v2)
    shutil.rmtree(tree_v2 / "BigEarthNet-S1")
    with pytest.raises(DataError, match="BigEarthNet-S1: missing"):
        BigEarthNetV2(tree_v2)


def test_missing_folders_lists_and_files_are_named(tree, tmp_path):
    with pytest.raises(DataError, match="bigearthnet-train.csv: missing"):
        BigEarthNetMM(tree, "train")
    (tree / "bigearthnet-train.csv").write_text("S1A_IW_GRDH,x,y\n")
    with pytest.raises(DataError, match="found 'S1A_IW_GRDH,x,y'"):
        BigEarthNetMM(tree, "train")
    path = tree / "BigEarthNet-v1.0" / PATCHES[3] / f"{PATCHES[3]}_B8A.tif"
    path.unlink()
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: missing"):
        BigEarthNetMM(tree)[3]
    shutil.rmtree(tree / "BigEarthNet-S1-v1.0")
    with pytest.raises(DataError, match="no folder BigEarthNet-S1-v1.0 or BigEarthNet-S1-Example"):
        BigEarthNetMM(tree)
