"""Worlds whose sensors share less than all of their common factors: what is left, what each sensor then shows."""

import numpy as np
import pytest

from decur_core import config
from decur_core.data import datasets, prepare
from decur_core.data.datasets import DataSet
from decur_core.data.modality import Modality
from decur_core.data.raster import Reader
from decur_core.data.store import Store
from decur_core.data.tasks import Scene
from decur_core.explain import probes
from decur_core.worlds import Miniature

# Pair: its second modality, what of an item shows that, and the labelled data set
PAIRS = {
    "sar_optical": ("optical", "optical", "bigearthnet"),
    "rgb_dem": ("dem", "dem", "geonrw"),
    "rgb_depth": ("hha", "depth", "nyuv2"),
}


def settings(pair, common, **world):
    world = {"locations": 16, "through_files": 16, "train": 16, "test": 16, "tile": 24, "common": common} | world
    return config.load("start", {"batch_size": 8, "world": world, "transfer.inputs": ["both"]}, pair=pair)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("common", [0, 1])
def test_each_sensor_shows_factors_of_its_own(pair, common):
    second, shown, _ = PAIRS[pair]
    first = datasets.modalities_of(pair)[0].name
    whole, made = prepare.world(settings(pair, 2)), prepare.world(settings(pair, common))
    (known, who), (factors, seen_by) = (prepare.known_factors(settings(pair, k)) for k in (2, common))
    shared = [name for name, by in who.items() if by == "common"]
    own = shared[common:]
    assert {name for name, by in seen_by.items() if by == "common"} == {*shared[:common]} and len(own) == 2 - common
    for name in own:
        assert (seen_by[name], seen_by[f"{name}, {second}"]) == (first, second)
    assert {name: seen_by[name] for name in who if name not in own} == {n: w for n, w in who.items() if n not in own}
    assert all(np.array_equal(factors[name], known[name]) for name in known)
    other = prepare.world(settings(pair, 2))
    other.factors |= {name: factors[f"{name}, {second}"] for name in own}
    for i in (0, 7):
        item, before, after = made[i], whole[i], other[i]
        assert item.keys() == before.keys() and not np.array_equal(item[shown], before[shown])
        np.testing.assert_array_equal(item[shown], after[shown])
        for name in item.keys() - {shown, "id", "dates"}:
            np.testing.assert_array_equal(item[name], before[name], err_msg=name)  # masks and gravity too


@pytest.mark.parametrize("pair", PAIRS)
def test_factors_of_their_own_are_independent(pair):
    factors, seen_by = prepare.known_factors(settings(pair, 0, locations=4000))
    values = np.stack([factors[name] for name in seen_by])
    assert np.abs(np.corrcoef(values) - np.eye(len(values))).max() < 0.08
    assert (np.abs(values).max(1) > 0.99).all() and (np.abs(values.mean(1)) < 0.05).all()


def test_stores_tell_the_amounts_apart_and_the_whole_keeps_its_name(tmp_path):
    makes = [settings("sar_optical", k).model_copy(deep=True) for k in (2, 0)]
    makes = [s.model_copy(update={"data": s.data.model_copy(update={"stores": str(tmp_path)})}) for s in makes]
    whole, apart = (Store(prepare.pretraining_store(s)) for s in makes)
    assert whole.path.name == "ssl4eo-coregistered-16-16-16-16-24px-seed0-all"
    assert apart.path.name == "ssl4eo-coregistered-16-16-16-16-24px-seed0-common0-all" and apart.ids == whole.ids
    assert np.array_equal(apart.read(3, "sar", 1), whole.read(3, "sar", 1))
    assert not np.array_equal(apart.read(3, "optical", 1), whole.read(3, "optical", 1))
    labelled = prepare.reader(makes[1], "bigearthnet", "test")
    assert len(labelled) == 16 and labelled[0]["labels"].any()


def test_a_world_may_have_any_number_of_common_factors():
    names = {"a": "common", "b": "common", "c": "common", "own": "x"}
    two, whole = {"sensors": ("x", "y", ("y",))}, {}
    for sensors in (two, whole):
        twin = Miniature("world", make=None, splits={}, factors=names, **sensors)
        assert twin.seen_by(config.load("start").world) == names  # all of them, unless fewer than 2 are asked for
    twin = Miniature("world", make=None, splits={}, factors=names, **two)
    seen_by = twin.seen_by(config.load("start", {"world.common": 1}).world)
    assert [name for name, who in seen_by.items() if who == "common"] == ["a"] and seen_by["c, y"] == "y"


class Marked(Reader):
    """Places whose only factor is their number in the world."""

    def __init__(self, count):
        self.ids, self.factors = [f"{i}" for i in range(count)], {"number": np.arange(count, dtype=np.float32)}

    def __getitem__(self, i):
        image = np.full((1, 12, 12), i, np.uint8)
        return {"id": self.ids[i], "x": image, "y": image, "labels": [True]}


MARKED = Miniature(
    "marked places",
    make=lambda world, split, count: Marked(count),
    splits={"test": "test", "fit": "locations"},
    factors={"number": "y+x"},
)


@pytest.mark.parametrize(("pretrain", "first"), [("fit", 3), ("all", 0)])
def test_factors_are_those_of_the_pretraining_split_by_the_order_of_the_sensors(tmp_path, monkeypatch, pretrain, first):
    monkeypatch.setattr(datasets, "_TABLE", dict(datasets._TABLE))
    sensors = [Modality(name=n, bands=("v",), unit="numbers", valid_range=(0, 255), scheme="bytes") for n in "xy"]
    about = {"name": "marked", "title": "Marked places", "pair": "marked", "pretrain": pretrain, "task": Scene(("a",))}
    about |= {"read": None, "splits": ("fit", "test"), "world": "elsewhere:MARKED"}
    datasets.register(DataSet(**about, modalities=tuple(sensors)))
    monkeypatch.setattr(prepare.pkgutil, "resolve_name", lambda name: MARKED)
    made = {"data": {"stores": str(tmp_path), "processes": 0}, "world": {"locations": 5, "train": 2, "test": 3}}
    made = config.load("start", {"batch_size": 2, "sweep": {}, "transfer.inputs": ["both"], **made}, pair="marked")
    store, (factors, seen_by) = Store(prepare.pretraining_store(made)), prepare.known_factors(made)
    assert seen_by == {"number": "x+y"}
    assert factors["number"].tolist() == [store.read(i, "x", 0)[0, 0, 0] for i in range(len(store))]
    assert factors["number"].tolist() == list(range(first, 8))
    monkeypatch.setitem(MARKED.factors, "number", "x+z")
    with pytest.raises(
        config.ConfigError, match=r"marked places: number is seen by \['x', 'z'\]; modalities: \['x', 'y'"
    ):
        prepare.known_factors(made)


def test_other_worlds_share_what_they_share():
    for pair in ("sar_optical_dem", "mine"):
        assert prepare.world(settings(pair, 2)).factors
        with pytest.raises(config.ConfigError, match=r"world.common = 0; the drawn world of radar"):
            prepare.world(settings(pair, 0))
    with pytest.raises(config.ConfigError, match="world.common = 3"):
        settings("sar_optical", 3)


@pytest.mark.soak
@pytest.mark.parametrize("pair", PAIRS)
def test_every_factor_is_readable_where_it_should_be_and_nowhere_else(pair, tmp_path):
    """The rule by which the worlds' factors were admitted, where nothing is common but places."""
    world = {"locations": 3500, "through_files": 0, "tile": 48 if pair == "rgb_depth" else 36, "common": 0}
    options = {"runs": str(tmp_path / "runs"), "data.stores": str(tmp_path / "stores"), "epochs": 24, "world": world}
    made = config.load("start", options, pair=pair)
    factors, seen_by = prepare.known_factors(made)
    found = probes.ceiling(made, prepare.pretraining_store(made), factors)
    for m, read in found.items():
        for name, who in seen_by.items():
            (r2,) = read[name]
            assert r2 >= 0.85 if probes.carries(who, m) else r2 <= 0.1, (m, name, read)
