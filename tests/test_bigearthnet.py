import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio

from decur_core.data.bigearthnet import CLASS_OF, CLASSES_19, BigEarthNetMM, labels_19, read_list
from decur_core.data.raster import DataError
from decur_core.preprocess import OPTICAL, SAR

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL, SPLITS = SHARED / "bigearthnet_real", SHARED / "bigearthnet_splits"
FIXTURE = SHARED / "torchgeo_fixtures" / "bigearthnet_v1"
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


def test_fixture_is_walked_with_its_lists_and_its_broken_sizes_refused():
    found = {split: BigEarthNetMM(FIXTURE, split) for split in ("train", "val", "test")}
    assert {split: [i[-5:] for i in data.ids] for split, data in found.items()} == {
        "train": ["61_39", "61_40"],
        "val": ["61_41"],
        "test": ["61_42"],
    }
    assert len(BigEarthNetMM(FIXTURE)) == 4
    assert np.flatnonzero(found["test"].labels[0]).tolist() == [2, 9]
    for data in found.values():
        with pytest.raises(DataError, match="_B01.tif: 2 x 2 pixels, expected 0.333333"):
            data[0]


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
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: expected JSON with the key 'labels'"):
        data = BigEarthNetMM(tree)
        data[data.ids.index(PATCHES[2])]


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
