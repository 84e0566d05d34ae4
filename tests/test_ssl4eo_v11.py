import ast
import io
import pickle
import shutil
import tarfile
import zipfile
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from zarr.buffer import cpu

from decur_core import config, pretrain, transfer
from decur_core.data import prepare
from decur_core.data.modality import DEM, OPTICAL, SAR
from decur_core.data.raster import DataError
from decur_core.data.ssl4eo_v11 import B10, DATASETS, FOLDERS, FORMS, LAND_COVER, SSL4EOS12v11, darkest, find_offset
from decur_core.worlds import ssl4eo_v11 as worlds
from decur_core.worlds.sar_optical import World
from decur_core.worlds.ssl4eo_v11 import Rounded, write_ssl4eo_v11
from decur_core.worlds.three import ThreeWorld

TILE, ZIP, TAR = 24, ".zarr.zip", ".tar"
THREE = ("S1GRD", "S2L1C", "DEM")
WORLDS = {
    "train": Rounded(ThreeWorld(5, tile=TILE)),
    "val": Rounded(ThreeWorld(2, tile=TILE, stream=3), "val"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Both forms of the same 5 and 2 places, in files of 3."""
    before, worlds.PER_FILE = worlds.PER_FILE, 3
    roots = {}
    for form in (ZIP, TAR):
        roots[form] = tmp_path_factory.mktemp("v11") / form.strip(".").replace(".", "_")
        for split, world in WORLDS.items():
            folders = (*THREE, "S2L2A")
            write_ssl4eo_v11(roots[form], world, split, range(len(world)), form=form, folders=folders)
    worlds.PER_FILE = before
    return roots


@pytest.fixture(params=[ZIP, TAR])
def form(request):
    return request.param


@pytest.fixture
def root(written, form, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(written[form], tmp_path / "root")


def same(item, expected, names):
    assert item["id"] == expected["id"] and set(item) == {"id", "dates", *names}
    assert item["dates"] == {name: expected["dates"][name] for name in names if name != "dem"}
    for name in names:
        assert item[name].dtype == np.float32 and np.array_equal(item[name], expected[name])


def test_both_forms_give_what_the_world_gives(written, form):
    for split, world in WORLDS.items():
        data = SSL4EOS12v11(written[form], split, THREE, missing="skip")
        assert data.ids == world.ids and len(data) == len(world)
        assert data.offset == (1000 if form == ZIP else 0)
        for i in (*range(len(world)), 0):  # also back to another file
            same(data[i], world[i], ("sar", "optical", "dem"))
    data = SSL4EOS12v11(written[form], missing="skip")
    assert data.ids == [*WORLDS["train"].ids, *WORLDS["val"].ids]
    same(data[5], WORLDS["val"][0], ("sar", "optical"))
    assert data.statistics == {"sar": FOLDERS["S1GRD"][2:], "optical": FOLDERS["S2L1C"][2:]}
    assert all(len(values) == 13 for values in data.statistics["optical"])


def test_items_fit_the_modalities(written, form):
    item = SSL4EOS12v11(written[form], "train", THREE, missing="skip")[1]
    for modality, seasons in ((SAR, 4), (OPTICAL, 4), (DEM, 4)):
        assert item[modality.name].shape == (seasons, len(modality.bands), TILE, TILE)
        assert modality.encode(item[modality.name]).std() > 5
    assert (
        -30 < item["sar"].mean() < -5 and 500 < item["optical"].mean() < 4000 and item["optical"][:, B10].mean() < 300
    )
    assert (item["dem"] == item["dem"][:1]).all() and 80 < item["dem"].mean() < 150 and np.ptp(item["dem"]) > 5


def test_ground_level_images_have_no_cirrus_band(written, form):
    data = SSL4EOS12v11(written[form], "train", ("S2L2A",), missing="skip")
    above = WORLDS["train"][2]["optical"]
    expected = above - above.min(axis=(2, 3), keepdims=True) + 1
    expected[:, B10] = 0
    assert data.offset == (1000 if form == ZIP else 0) and np.array_equal(data[2]["optical"], expected)
    OPTICAL.check(data[2]["optical"])


SHUFFLED = [0, 2, 3, 1]


def shuffled(form, **changes):
    """An edit of radar images: all but the first in another order than that of their dates, told as the form tells."""

    def edit(found):
        found["bands"] = np.take(found["bands"], SHUFFLED, axis=found["bands"].ndim - 4)
        name = "file_id" if form == ZIP else "time"
        found[name] = found[name][..., SHUFFLED]
        if form == ZIP:  # of the whole file, and sorted
            found["time_"] = np.sort(np.zeros(found["file_id"].shape, np.int64), axis=-1)
        found.update(changes)

    return arrays(edit)


def test_images_come_by_date_whatever_their_order_in_the_file(root, form):
    """The published Zarr archives have radar images in the order of names, S1A before S1B."""
    change(root, form, "S1GRD", shuffled(form))
    item = SSL4EOS12v11(root, "train", missing="skip")[0]
    same(item, WORLDS["train"][0], ("sar", "optical"))


def test_damaged_dates_tell_no_order(root, form):
    if form == TAR:
        times = np.array([1.6e18, 1.58e18, np.iinfo(np.int64).min, 1.61e18]).astype(np.int64)
        change(root, form, "S1GRD", arrays(lambda found: found.update(time=times)))
        item = SSL4EOS12v11(root, "train", missing="skip")[0]
        assert np.array_equal(item["sar"], WORLDS["train"][0]["sar"]) and item["dates"]["sar"][2] == "NaT"


def test_elevation_alone_has_one_image(written):
    item = SSL4EOS12v11(written[TAR], "val", ("DEM",), missing="skip")[0]
    assert item["dem"].shape == (1, 1, TILE, TILE) and item["dates"] == {}


class Mapped(Rounded):
    """With land cover, a class for each value of the world's Layout.cover: (1, 1, H, W)."""

    classes = np.array([LAND_COVER.index(name) for name in ("bare ground", "water", "built area", "crops")], np.uint8)

    def __getitem__(self, i):
        cover = self.world._layouts(*self.world._draw(i, 0))[0].cover
        return super().__getitem__(i) | {"mask": self.classes[cover][None, None]}


def with_land_cover(root, train, test):
    made = {"train": Mapped(World(train, tile=TILE)), "test": Mapped(World(test, tile=TILE, seed=1), "val")}
    for split, world in made.items():
        part = "train" if split == "train" else "val"
        write_ssl4eo_v11(root, world, part, range(len(world)), form=TAR, folders=("S1GRD", "S2L1C", "LULC"))
    return root, made


@pytest.fixture
def mapped(tmp_path):
    return with_land_cover(tmp_path, 3, 2)


def test_land_cover_comes_with_the_first_images(mapped):
    root, made = mapped
    (dataset,) = (d for d in DATASETS if d.task)
    for split, world in made.items():
        data = dataset.read(root, split, missing="skip")
        assert data.ids == world.ids and set(data.statistics) == {"sar", "optical"}
        for i, expected in enumerate(world):
            item = data[i]
            assert set(item) == {"id", "sar", "optical", "mask", "dates"} and item["id"] == expected["id"]
            assert item["dates"] == {name: times[:1] for name, times in expected["dates"].items()}
            assert all(np.array_equal(item[key], expected[key][0]) for key in ("sar", "optical"))
            assert item["mask"].dtype == np.uint8 and np.array_equal(item["mask"], expected["mask"][0, 0])
    named = dict(enumerate(LAND_COVER))
    assert {named[k] for k in np.unique(item["mask"])} == {"water", "crops", "built area", "bare ground"}
    assert item["optical"][7][item["mask"] == LAND_COVER.index("water")].mean() < item["optical"][7].mean()
    assert dataset.task.classes == LAND_COVER[1:] and dataset.task.ignore == LAND_COVER.index("no data") == 0


def test_land_cover_comes_with_the_first_images_by_date(mapped):
    root, made = mapped

    def last_is_first(found):
        found.update(bands=found["bands"][::-1], time=found["time"][::-1])

    change(root, TAR, "S1GRD", arrays(last_is_first))
    item = SSL4EOS12v11(root, "train", ("S1GRD", "S2L1C", "LULC"), missing="skip")[0]
    assert np.array_equal(item["sar"], made["train"][0]["sar"][0])
    assert item["dates"]["sar"] == made["train"][0]["dates"]["sar"][:1]


@pytest.mark.parametrize("times", [1, 4])
def test_land_cover_may_be_there_for_each_time(mapped, times):
    root, made = mapped

    def other(found):
        found["bands"] = np.concatenate([found["bands"].astype(np.int16), np.zeros((times - 1, 1, TILE, TILE))])

    change(root, TAR, "LULC", arrays(other))
    item = SSL4EOS12v11(root, "train", ("S1GRD", "S2L1C", "LULC"), missing="skip")[0]
    assert np.array_equal(item["mask"], made["train"][0]["mask"][0, 0])


@pytest.mark.parametrize("value", [11, -1, 2.5])  # 11: rangeland in the maps that these come from
def test_land_cover_of_another_numbering_is_refused(mapped, value):
    def other(found):
        found["bands"] = found["bands"].astype(np.float32)
        found["bands"][..., 3, 5] = value

    path = change(mapped[0], TAR, "LULC", arrays(other))
    found = raised(mapped[0], folders=("S1GRD", "S2L1C", "LULC"))
    assert f"{path}: land cover {value:g} in 0000000; expected 0 to 9" in found


def test_the_file_of_the_land_cover_is_named_where_shards_are_cut_otherwise(tmp_path, monkeypatch):
    world = Mapped(World(3, tile=TILE))
    for count, folders in ((2, ("S1GRD", "S2L1C")), (1, ("LULC",))):
        monkeypatch.setattr(worlds, "PER_FILE", count)
        write_ssl4eo_v11(tmp_path, world, "train", range(3), form=TAR, folders=folders)
    path = change(tmp_path, TAR, "LULC", arrays(lambda found: found["bands"].fill(11)), number=2)
    assert f"{path}: land cover 11 in 0000001" in raised(tmp_path, 1, ("S1GRD", "S2L1C", "LULC"))


@pytest.mark.parametrize("name", ["DEM", "elevation", "b1"])
def test_a_band_that_is_alone_may_have_any_name(root, form, name):
    change(root, form, "DEM", arrays(lambda found: found.update(band=np.array([name]))))
    item = SSL4EOS12v11(root, "train", THREE, missing="skip")[0]
    assert np.array_equal(item["dem"], WORLDS["train"][0]["dem"])


def test_spawned_workers_read_the_same_in_any_order(written):
    with get_context("spawn").Pool(1) as pool:
        for form in (ZIP, TAR):
            data = SSL4EOS12v11(written[form], "train", missing="skip")
            data[0]
            assert len(pickle.dumps(data)) < 5000  # no images and no open files go along
            for i, item in zip((4, 0, 3), pool.map(data.__getitem__, (4, 0, 3)), strict=True):
                same(item, WORLDS["train"][i], ("sar", "optical"))


def test_archives_inside_tar_files_are_read_where_they_lie(written, monkeypatch):
    data = SSL4EOS12v11(written[TAR], "train", missing="skip")
    monkeypatch.setattr(tarfile, "open", None)  # the index is enough from now on
    same(data[4], WORLDS["train"][4], ("sar", "optical"))
    path = written[TAR] / "train" / "S1GRD" / "ssl4eos12_shard_000002.tar"
    number, offset, size = data._places[4, 0]
    assert data._files[number][0] == path and path.read_bytes()[offset:][:4] == b"PK\3\4" and size < path.stat().st_size


def test_places_that_share_a_file_are_decompressed_once(written, monkeypatch):
    data = SSL4EOS12v11(written[ZIP], "train", missing="skip")
    assert data.chunk == 3 and SSL4EOS12v11(written[TAR], "train", missing="skip").chunk == 1
    reads = []
    get = zarr.Array.__getitem__
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda a, key: (reads.append(a.name), get(a, key))[1])
    [data[i] for i in range(3)]
    assert reads.count("/bands") == 2  # a block of SAR, one of optical


def test_zarr_is_imported_only_where_it_is_needed():
    """It takes half a second, and every command that looks at the table of data sets imports the reader."""
    tree = ast.parse((config.ROOT / "decur_core" / "data" / "ssl4eo_v11.py").read_text())
    inside = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    imports = {n: ast.unparse(n) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert {text for n, text in imports.items() if "zarr" in text and n in inside}
    assert not {text for n, text in imports.items() if "zarr" in text and n not in inside}


def test_the_offset_is_told_from_the_data():
    random = np.random.default_rng(0)
    scene = random.normal(1800, 400, (4, 13, 40, 40)).clip(1)
    scene[:, B10] = random.normal(20, 6, (4, 40, 40)).clip(1)
    for images in (scene, np.delete(scene, B10, axis=1)):
        images[:, 2, :20] = 150  # water
        assert find_offset([images.astype(np.int16)]) == 0
        assert find_offset([(images + 1000).astype(np.int16)]) == 1000
        empty = np.zeros_like(images)
        assert find_offset([images, empty + 1, images]) == 0
        snow = images.clip(3000)
        assert find_offset([images + 1000, images + 1000, snow + 1000]) == 1000
        with pytest.raises(DataError, match="at 3000: neither near 0 nor 1000; give offset=0 or 1000"):
            find_offset([snow])
    assert darkest(np.zeros((4, 13, 8, 8))) == np.inf
    with pytest.raises(DataError, match="neither near 0 nor 1000"):
        find_offset([])
    scene[:, :, :35] = 0  # outside of the acquisition
    assert 1000 < darkest(np.where(scene > 0, scene + 1000, 0)) < 1020


def change(root, form, folder, edit, *, split="train", number=1):
    """Edit the arrays of the first place (tar) or of all places (zip) of a file."""
    folder = root / split / folder
    if form == ZIP:
        path = folder / f"ssl4eos12_{split}_seasonal_data_{number:06d}.zarr.zip"
        path.write_bytes(edit(path.read_bytes()))
        return path
    path = folder / f"ssl4eos12_shard_{number:06d}.tar"
    with tarfile.open(path) as file:
        members = [(m.name, file.extractfile(m).read()) for m in file]
    with tarfile.open(path, "w") as file:
        for k, (name, data) in enumerate(members):
            data = data if k else edit(data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def arrays(edit):
    """An edit of the arrays in an archive, name -> values."""

    def apply(data):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            parts = {name: cpu.Buffer.from_bytes(file.read(name)) for name in file.namelist()}
        group = zarr.open_group(zarr.storage.MemoryStore(parts), mode="r", zarr_format=2)
        found = {name: array[...] for name, array in group.arrays()}
        edit(found)
        return worlds.archive(found, "DEM")

    return apply


def raised(root, i=0, folders=("S1GRD", "S2L1C"), **options):
    with pytest.raises(DataError) as error:
        SSL4EOS12v11(root, "train", folders, missing="skip", **options)[i]
    return str(error.value)


def test_a_place_with_another_offset_is_refused(root, form):
    def other(found):
        found["bands"] += -1000 if form == ZIP else 1000

    change(root, form, "S2L1C", arrays(other))
    offset = 1000 if form == ZIP else 0
    assert "B10 of 0000000 begins at" in raised(root, offset=offset)
    assert f"does not fit the offset of {offset} elsewhere" in raised(root, offset=offset)
    assert SSL4EOS12v11(root, "train", missing="skip", offset=offset)[4]["id"] == "0000004"


def test_values_below_the_offset_are_dark_and_missing_ones_stay_missing(root, form):
    level = 1000 if form == ZIP else 0

    def noise(found):
        found["bands"][..., 0, :3, :5, :5] = level - 30
        found["bands"][..., 0, :, 6:9, 6:9] = 0

    change(root, form, "S2L1C", arrays(noise))
    optical = SSL4EOS12v11(root, "train", missing="skip")[0]["optical"]
    assert not optical[0, :3, :5, :5].any() and not optical[0, :, 6:9, 6:9].any() and optical.min() == 0
    OPTICAL.check(optical)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda found: found.update(band=np.array(["vh", "vv"])), r"bands \('vh', 'vv'\)"),
        (lambda found: found.update(bands=found["bands"][..., :1, :, :]), "expected S1GRD of 0000000 as Zarr"),
        (lambda found: found.update(bands=found["bands"][..., :, :-6]), "0000000 has sar (4, 2, 24, 18), optical"),
        (lambda found: found.pop("bands"), "cannot be read; expected S1GRD of 0000000"),
    ],
)
def test_arrays_of_another_form_are_refused(root, form, edit, message):
    path = change(root, form, "S1GRD", arrays(edit))
    found = raised(root)
    assert str(path) in found and message.replace("\\", "") in found, found


def cut(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize("folder", ["S1GRD", "S2L1C"])
def test_damaged_archives_are_named(root, form, folder):
    path = change(root, form, folder, cut)
    found = raised(root)
    assert str(path) in found and "cannot be read" in found
    if form == TAR:  # the others are still there, and tell the offset
        assert SSL4EOS12v11(root, "train", missing="skip")[1]["id"] == "0000001"


def test_a_cut_tar_file_is_named(root, form):
    if form == TAR:
        path = root / "train" / "S2L1C" / "ssl4eos12_shard_000002.tar"
        path.write_bytes(cut(path.read_bytes()))
        assert f"{path}: cannot be read; expected a Zarr archive" in raised(root)


def test_a_flipped_byte_is_noticed(root, form):
    def flip(data):
        data = bytearray(data)
        data[len(data) // 2] ^= 255
        return bytes(data)

    path = change(root, form, "S2L1C", flip)
    assert f"{path}: cannot be read" in raised(root)


def test_missing_files_are_named_or_left_out(root, form):
    if form == ZIP:
        assert len(SSL4EOS12v11(root, "train")) == 5  # all that the list names
        path = root / "train" / "S2L1C" / "ssl4eos12_train_seasonal_data_000001.zarr.zip"
        path.unlink()
        message = f"1 files are not there in all of S1GRD, S2L1C: no {path}; complete them"
    else:
        path = root / "train" / "S2L1C" / "ssl4eos12_shard_000001.tar"
        path.unlink()
        message = f"476 files are not there in all of S1GRD, S2L1C: no {path}; complete them"
    with pytest.raises(DataError) as error:
        SSL4EOS12v11(root, "train")
    assert message in str(error.value)
    data = SSL4EOS12v11(root, "train", missing="skip")
    assert data.ids == WORLDS["train"].ids[3:] and data.left_out["files"] == (1 if form == ZIP else 476)
    same(data[0], WORLDS["train"][3], ("sar", "optical"))
    shutil.rmtree(root / "train" / "S2L1C")
    assert "files are not there" in raised(root)


def test_without_a_list_all_published_files_are_expected(written, form, tmp_path):
    root = shutil.copytree(written[form], tmp_path / "root")
    shutil.rmtree(root / "splits", ignore_errors=True)
    count = {ZIP: "3810", TAR: "475"}[form]
    with pytest.raises(DataError, match=f"{count} files are not there in all of S1GRD, S2L1C: no .*000003"):
        SSL4EOS12v11(root, "train")


def test_files_without_a_place_are_refused(tmp_path):
    for folder in ("S1GRD", "S2L1C"):
        (tmp_path / "train" / folder).mkdir(parents=True)
        tarfile.open(tmp_path / "train" / folder / "ssl4eos12_shard_000001.tar", "w").close()
    with pytest.raises(DataError, match="places are not there in all of S1GRD, S2L1C: no places in any"):
        SSL4EOS12v11(tmp_path, "train", missing="skip")


def test_places_that_differ_between_products_are_named(written, tmp_path):
    root = shutil.copytree(written[TAR], tmp_path / "root")
    path = root / "train" / "DEM" / "ssl4eos12_shard_000001.tar"
    with tarfile.open(path) as file:
        members = [(m.name, file.extractfile(m).read()) for m in file]
    with tarfile.open(path, "w") as file:  # another order, one place less, another one more
        for name, data in (members[2], ("0999999.zarr.zip", members[1][1]), members[0]):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    for number in range(3, 478):  # as if the split were whole
        for folder in THREE:
            (root / "train" / folder / f"ssl4eos12_shard_{number:06d}.tar").write_bytes(b"")
    with pytest.raises(DataError, match="000003.tar: cannot be read"):
        SSL4EOS12v11(root, "train", THREE)
    for empty in root.rglob("*.tar"):
        if not empty.stat().st_size:
            empty.unlink()
    data = SSL4EOS12v11(root, "train", THREE, missing="skip")
    assert data.ids == ["0000000", "0000002", "0000003", "0000004"] and data.left_out["places"] == 2
    same(data[1], WORLDS["train"][2], ("sar", "optical", "dem"))


def test_places_that_differ_are_an_error_where_nothing_may_be_missing(written, tmp_path):
    root = shutil.copytree(written[ZIP], tmp_path / "root")
    folder = root / "train" / "S1GRD"
    first, second = sorted(folder.iterdir())
    first_bytes = first.read_bytes()
    first.write_bytes(
        arrays(lambda found: found.update(sample=np.array(["0000000", "0000001", "0000009"])))(first_bytes)
    )
    with pytest.raises(DataError) as error:
        SSL4EOS12v11(root, "train")
    assert f"2 places are not there in all of S1GRD, S2L1C: 0000009 is not in {root / 'train' / 'S2L1C'}" in str(
        error.value
    )
    second.write_bytes(first_bytes)
    (root / "train" / "S2L1C" / second.name).write_bytes((root / "train" / "S2L1C" / first.name).read_bytes())
    first.write_bytes(first_bytes)
    with pytest.raises(DataError, match="000002.zarr.zip: 0000000 is there a second time"):
        SSL4EOS12v11(root, "train")


def test_a_mixture_of_forms_and_bad_settings_are_refused(written, tmp_path):
    root = shutil.copytree(written[ZIP], tmp_path / "root")
    shutil.copytree(written[TAR] / "train", root / "train", dirs_exist_ok=True)
    with pytest.raises(DataError, match="S1GRD: both forms of the data set, .zarr.zip and .tar; keep one"):
        SSL4EOS12v11(root, "train")
    with pytest.raises(ValueError, match="split is 'tests'; allowed are train"):
        SSL4EOS12v11(root, "tests")
    with pytest.raises(ValueError, match="missing is 'ignore'; allowed are error"):
        SSL4EOS12v11(root, missing="ignore")
    for folders in ((), ("S1GRD", "S2RGB"), ("S2L1C", "S2L2A")):
        wanted = "some of S1GRD, S2L1C, S2L2A, DEM, LULC are needed, one of S2L1C and S2L2A"
        with pytest.raises(ValueError, match=wanted):
            SSL4EOS12v11(root, "train", folders)
    with pytest.raises(DataError, match="3812|477 files are not there"):
        SSL4EOS12v11(tmp_path / "nowhere", "train")


def test_hidden_members_are_no_places(written, tmp_path):
    root = shutil.copytree(written[TAR], tmp_path / "root")
    for path in root.rglob("*.tar"):
        with tarfile.open(path, "a") as file:
            file.addfile(tarfile.TarInfo("._0000000.zarr.zip"))
            file.addfile(tarfile.TarInfo("readme.txt"))
    (root / "train" / "S1GRD" / "._ssl4eos12.zarr.zip").write_bytes(b"left by an archiver")
    assert SSL4EOS12v11(root, "train", missing="skip").ids == WORLDS["train"].ids


def test_the_worlds_are_those_of_other_pairs_as_files_hold_them():
    settings = SimpleNamespace(locations=5, test=2, tile=TILE, layout="coregistered", seed=0)
    for twin, plain in ((worlds.SSL4EO_V11, World(5, tile=TILE)), (worlds.SSL4EO_V11_DEM, ThreeWorld(5, tile=TILE))):
        world, val = twin.behind(settings, "train"), twin.behind(settings, "val")
        item, other = world[3], plain[3]
        assert item["dates"] == other["dates"] and item["id"] == other["id"] and item.keys() == other.keys()
        assert abs(item["sar"] - other["sar"]).max() < 0.02 and abs(item["optical"] - other["optical"]).max() <= 0.5
        assert np.array_equal(item.get("dem"), other.get("dem")) and world.factors is not val.factors
        assert not set(world.ids) & set(val.ids) and len(val) == 2
        assert not np.array_equal(world.factors["water"][:2], val.factors["water"])
    redrawn = worlds.SSL4EO_V11.behind(SimpleNamespace(**vars(settings) | {"layout": "redrawn"}), "train")
    assert not np.array_equal(redrawn[1]["sar"], worlds.SSL4EO_V11.behind(settings, "train")[1]["sar"])


@pytest.mark.parametrize("dataset", [pytest.param(d, id=d.name) for d in DATASETS if d.world])
def test_the_twins_stand_in_for_the_data_sets(dataset, tmp_path):
    settings = SimpleNamespace(locations=3, test=2, tile=TILE, layout="coregistered", seed=1)
    module, name = dataset.world.split(":")
    twin = getattr(worlds, name)
    assert module == worlds.__name__
    parts = twin.parts(settings)
    twin.write(tmp_path, settings, parts)
    for split in dataset.splits:
        data, made = dataset.read(tmp_path, split, missing="skip"), twin.behind(settings, split)
        assert data.ids == made.ids and [len(parts[split])] == [len(made)]
        same(data[1], {**made[1]}, [m.name for m in dataset.modalities])
    assert twin.behind(settings, "train").factors.keys() == twin.factors.keys()


def test_encoders_are_scored_on_bigearthnet_and_land_cover(pair_store, tiny, monkeypatch):
    """Which has no pair of this name, but the same bands in the same bytes."""
    settings = tiny(pair="sar_optical_v11", epochs=1, **{"transfer.epochs": 1, "transfer.batch_size": 8})
    folder = pretrain.run(settings, pair_store)
    drawn = {"data.source": "world", "world.train": 24, "world.test": 16, "world.through_files": 0}
    drawn |= {"data.stores": str(folder.parent / "stores"), "data.processes": 0}
    stores = prepare.labelled_stores(config.load("start", drawn, pair="sar_optical"), "bigearthnet")
    record = transfer.evaluate(settings, folder, stores, protocol="linear")
    assert (record["pair"], record["dataset"], record["metric"]) == ("sar_optical_v11", "BigEarthNet-MM", "mAP (%)")
    assert record["patches"] == {"train": 24, "test": 16} and 0 < record["micro"] <= 100
    with pytest.raises(config.ConfigError, match="labelled data of pair sar_optical_v11"):
        prepare.labelled_stores(settings, "bigearthnet")
    root, _ = with_land_cover(folder.parent / "v11", 24, 16)
    monkeypatch.setitem(FORMS, TAR, (FORMS[TAR][0], {"train": 1, "val": 1}))  # files that were published
    given = drawn | {"data.source": "published", "data.roots": {"ssl4eo_v11_lulc": str(root)}}
    stores = prepare.labelled_stores(config.load("start", given, pair="sar_optical_v11"), "ssl4eo_v11_lulc")
    record = transfer.evaluate(settings, folder, stores, dataset="ssl4eo_v11_lulc", protocol="linear")
    title = "SSL4EO-S12 v1.1 with land cover"
    assert (record["dataset"], record["metric"], record["patches"]["test"]) == (title, "mIoU (%)", 16)
    assert 0 < record["miou"] < 100 and sum(v is not None for v in record["per_class"]) >= 4
