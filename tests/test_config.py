"""Profiles: what is refused and how, what counts as a number, and what identifies a run."""

import json
import math
import os
import pickle
import random
import re
import string
import subprocess
import sys
import time
import types
import typing

import pydantic
import pytest
import yaml

from decur_core import config, losses
from decur_core.config import ConfigError, Settings
from decur_core.data import datasets, prepare

SHIPPED = sorted(p.stem for p in config.PROFILES.glob("*.yaml"))
FAST = """
backbone: small
projector: [128, 64]
dim_common: 56
batch_size: 256
weight_decay: 1e-6
data: {source: world}
world: {locations: 512}
sweep: {method: [decur, barlow_twins]}
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    file = tmp_path_factory.mktemp("profiles") / "own.yaml"
    file.write_text(FAST)
    return str(file)


def names(cls=Settings, prefix=""):
    """Every setting's dotted name with what it is, from its annotation."""
    for name, field in cls.model_fields.items():
        kind, extra = field.annotation, field.metadata
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            yield from names(kind, f"{name}.")
            continue
        listed = typing.get_origin(kind) is tuple
        if listed or typing.get_origin(kind) is typing.Union:
            element = typing.get_args(kind)[0]
            extra = [*getattr(element, "__metadata__", ())]
            extra = [m for e in extra for m in (e.metadata if isinstance(e, pydantic.fields.FieldInfo) else [e])]
            kind = typing.get_args(element)[0] if extra else element
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        choices = tuple(config.TABLES[name]()) if name in config.TABLES else choices
        bounds = {k: getattr(m, k) for m in extra for k in ("ge", "gt", "le", "lt") if hasattr(m, k)}
        decides = not field.json_schema_extra
        yield (
            prefix + name,
            types.SimpleNamespace(
                name=name, listed=listed, choices=choices, bounds=bounds, decides=decides, description=field.description
            ),
        )


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_load(name):
    settings = config.load(name)
    assert settings.profile == name
    members = config.members(settings)
    assert len(members) == math.prod(len(v) for v in settings.sweep.values())
    assert len({json.dumps(config.identity(m)) for m in members}) == len(members)
    config.check_world_size(settings, 1)


def test_the_named_profiles_exist():
    assert {"mini", "samples", "a100", "a100_v11", "a100_three"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_pair_of_a_profile_has_its_data_sets_and_tasks(name):
    sections = yaml.safe_load((config.PROFILES / f"{name}.yaml").read_text())
    for pair in {config.load(name).pair, *sections.get("pairs", {})}:
        settings = config.load(name, pair=pair)
        assert settings.pair == pair and config.members(settings)
        found = datasets.pretraining(pair)
        assert found.pretrain in (*found.splits, "all") and found.modalities == config.modalities(settings)
        labelled = [d for d in datasets.of_pair(pair) if d.task]
        if settings.data.source == "world":
            assert all(prepare.miniature(d).parts(settings.world) for d in (found, *labelled)) and labelled
        elif settings.data.source == "published" and not (public := [d for d in labelled if d.name != "three_scenes"]):
            # scored on a data set of another pair, which has the same bands in the same bytes
            there = {m.name: m.mapping() for m in datasets.find("bigearthnet").modalities}
            own = {m.name: m.mapping() for m in found.modalities}
            assert name == "mine" or "bigearthnet" in settings.data.roots and there.items() <= own.items()
            assert name == "mine" or {*"+".join(settings.transfer.inputs).split("+")} <= {"both", *there}, public


@pytest.mark.parametrize(("name", "widths"), [("a100_v11", 7168), ("a100_three", 0)])
def test_profiles_of_the_newer_release_have_the_papers_values(name, widths):
    settings, paper = config.load(name), config.load("a100")
    same = {k for k in config.identity(paper) if k not in ("pair", "dim_common", "blocks")}
    assert {k: config.identity(settings)[k] for k in same} == {k: config.identity(paper)[k] for k in same}
    sums = {m.name: sum(k for b, k in settings.blocks.items() if m.name in b) for m in config.modalities(settings)}
    assert settings.dim_common == widths and set(sums.values()) == ({8192} if settings.blocks else {0})


def test_defaults_are_the_papers(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    s = config.load(str(tmp_path / "empty.yaml"))
    assert (s.backbone, s.projector, s.epochs, s.batch_size, s.crop_size) == ("resnet50", (8192,) * 3, 100, 256, 224)
    assert (s.dim_common / s.projector[-1], s.lambd, s.optimizer, s.profile) == (0.875, 0.0051, "lars", "empty")


REFUSED = [  # overrides; what the message must hold: the name, the value, what is allowed
    ({"lamdb": 1}, ["'lamdb'", "did you mean 'lambd'"]),
    ({"world.tiel": 36}, ["'world.tiel'", "did you mean 'world.tile'"]),
    ({"zzz": 1}, ["'zzz'", "known:", "epochs", "batch_size"]),
    ({"profile": "mini"}, ["'profile'", "unknown setting"]),
    ({"": 1}, ["unknown setting ''", "known:"]),
    ({None: 1}, ["unknown setting 'None'"]),
    ({"epochs": 0}, ["epochs = 0", "1 or more"]),
    ({"epochs": 2.5}, ["epochs = 2.5", "whole number"]),
    ({"epochs": "many"}, ["epochs = 'many'", "whole number"]),
    ({"epochs": True}, ["epochs = True", "whole number"]),
    ({"epochs": None}, ["epochs = None", "whole number"]),
    ({"epochs": [1]}, ["epochs = [1]", "whole number"]),
    ({"epochs.more": 1}, ["epochs = {'more': 1}", "whole number"]),
    ({"epochs": 10**400}, ["epochs = 1000", "whole number"]),
    ({"batch_size": 1}, ["batch_size = 1", "2 or more"]),
    ({"batch_size": 1024}, ["batch_size = 1024", "world.locations = 512"]),
    ({"learning_rate": -0.1}, ["learning_rate = -0.1", "0 or more"]),
    ({"learning_rate": "fast"}, ["learning_rate = 'fast'", "a number"]),
    ({"learning_rate": True}, ["learning_rate = True", "a number"]),
    ({"lambd": ".nan"}, ["lambd = '.nan'", "a number"]),
    ({"lambd": math.nan}, ["lambd = nan", "0 or more"]),
    ({"lambd": "inf"}, ["lambd = inf", "finite"]),
    ({"momentum": 1}, ["momentum = 1;", "0 to 0.999999"]),
    ({"backbone": "vgg"}, ["backbone = 'vgg'", ", ".join(config.TABLES["backbone"]())]),
    ({"backbone": 50}, ["backbone = 50", "text"]),
    ({"method": "moco"}, ["method = 'moco'", "random, supervised, simclr, clip, barlow_twins, vicreg"]),
    ({"pair": "rgb"}, ["pair = 'rgb'", "sar_optical"]),
    ({"projector": 64}, ["projector = 64", "a list", "[64]"]),
    ({"transfer.protocols": []}, ["transfer.protocols = []", "at least 1 in the list"]),
    ({"projector": [64, "a"]}, ["projector = 'a'", "whole number"]),
    ({"projector": [64, 0]}, ["projector = 0", "1 or more"]),
    ({"dim_common": 65}, ["dim_common = 65", "projector", "0 to 64"]),
    ({"dim_common": -1}, ["dim_common = -1", "0 or more"]),
    ({"world": 5}, ["world = 5", "section"]),
    ({"world.tile": 35}, ["world.tile = 35", "multiple of 6"]),
    ({"world.layout": "free"}, ["world.layout = 'free'", "coregistered, redrawn"]),
    ({"data": {"source": "web"}}, ["data.source = 'web'", "published, world, samples"]),
    ({"transfer.exclude": "yes"}, ["transfer.exclude = 'yes'", "true or false"]),
    ({"transfer.fractions": [0]}, ["transfer.fractions = 0;", "above 0 and at most 1"]),
    ({"transfer.fractions": [1.5]}, ["transfer.fractions = 1.5", "above 0 and at most 1"]),
    ({"transfer.inputs": ["lidar"]}, ["transfer.inputs = 'lidar'", "both, sar, optical"]),
    ({"sweep": ["method"]}, ["sweep = ['method']", "section"]),
    ({"sweep": {"metod": ["decur"]}}, ["sweep", "'metod'", "did you mean 'method'"]),
    ({"sweep": {"dim_common": [8, 65]}}, ["dim_common = 65", "0 to 64"]),
    ({"sweep": {"method": ["decur", "moco"]}}, ["sweep: method = 'moco'", "barlow_twins_single, decur"]),
]


@pytest.mark.parametrize(("overrides", "holds"), REFUSED, ids=[str(o)[:40] for o, _ in REFUSED])
def test_what_is_wrong_is_named_with_its_value_and_what_is_allowed(profile, overrides, holds):
    with pytest.raises(ConfigError) as caught:
        config.load(profile, overrides)
    for part in holds:
        assert part in str(caught.value)


def test_every_bound_and_choice_is_kept(profile):
    """For each field that has a range or choices, a value just outside is refused by name and with the range."""
    tried = 0
    for name, f in names():
        for kind, bound in f.bounds.items():
            value = bound + {"ge": -1, "le": 1}.get(kind, 0)
            low = f.bounds.get("ge", f.bounds.get("gt"))
            with pytest.raises(ConfigError, match=rf"{name} = .*allowed: (above )?{low}"):
                config.load(profile, {name: [value] if f.listed else value})
            tried += 1
        if f.choices:
            with pytest.raises(ConfigError) as caught:
                config.load(profile, {name: ["?"] if f.listed else "?"})
            assert f"{name} = '?'" in str(caught.value) and ", ".join(f.choices) in str(caught.value)
            tried += 1
    assert tried > 60


@pytest.mark.parametrize("text", ["- 1", "5", "text"])
def test_yaml_that_is_no_section(profile, tmp_path, text):
    with pytest.raises(ConfigError, match="overrides: expected `name: value` lines"):
        config.load(profile, text)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml: expected `name: value` lines"):
        config.load(str(tmp_path / "bad.yaml"))


def test_broken_yaml_and_missing_profiles(profile, tmp_path):
    with pytest.raises(ConfigError, match="overrides: not valid YAML"):
        config.load(profile, "{epochs: 5")
    with pytest.raises(ConfigError, match=r"profile 'nope': no file .*nope.yaml; existing profiles: .*mini"):
        config.load("nope")
    with pytest.raises(ConfigError, match="other.yaml"):
        config.load(str(tmp_path / "other.yaml"))
    with pytest.raises(ConfigError, match="profile '10': no file .*10.yaml"):
        config.load(10)  # which papermill makes of `-p profile 010`


@pytest.mark.parametrize("written", ["1e-6", "1E-6", "1.0e-6", "0.000001", "1e-06"])
def test_numbers_with_an_exponent(profile, tmp_path, written):
    assert config.load(profile).weight_decay == 1e-6  # the file says 1e-6, which YAML reads as text
    assert config.load(profile, f"weight_decay: {written}").weight_decay == 1e-6
    assert config.load(profile, {"weight_decay": written}).weight_decay == 1e-6
    s = config.load(profile, {"epochs": "1e3", "lambd": 1, "seed": 3.0, "transfer.fractions": ["1e-2"]})
    assert (s.epochs, s.lambd, s.seed, s.transfer.fractions) == (1000, 1.0, 3, (0.01,))
    assert [type(v) for v in (s.epochs, s.lambd, s.seed)] == [int, float, int]
    assert config.load(profile, {"seed": 2**53 + 1}).seed == 2**53 + 1  # not by way of a float


def test_nested_dotted_and_text_overrides_are_the_same(profile):
    forms = (
        {"epochs": 7, "world": {"locations": 600, "tile": 48}},
        {"epochs": 7, "world.locations": 600, "world.tile": 48},
        {"epochs": 7, "world": {"locations": 600}, "world.tile": 48},
        "{epochs: 7, world.locations: 600, world: {tile: 48}}",
        "epochs: 7\nworld:\n  locations: 600\n  tile: 48\n",
    )
    loaded = [config.load(profile, form) for form in forms]
    assert all(s == loaded[0] for s in loaded)
    s = loaded[0]
    assert (s.epochs, s.world.locations, s.world.tile, s.data.source, s.dim_common) == (7, 600, 48, "world", 56)
    assert config.load(profile, {}) == config.load(profile, None) == config.load(profile, "") == config.load(profile)


def test_overrides_replace_a_list_and_a_sweep_as_a_whole(profile):
    s = config.load(profile, {"projector": [64], "sweep": {"seed": [0, 1]}})
    assert s.projector == (64,) and s.sweep == {"seed": [0, 1]}
    assert config.members(config.load(profile, {"sweep": {}})) == [config.load(profile, {"sweep": {}})]


def test_members_of_a_sweep(profile):
    s = config.load(profile, {"sweep": {"method": ["decur", "random"], "world.seed": [0, 1, 2], "epochs": [4]}})
    members = config.members(s)
    found = [(m.method, m.world.seed, m.epochs) for m in members]
    assert found == [(method, seed, 4) for method in ("decur", "random") for seed in (0, 1, 2)]
    assert all(m.sweep == {} and m.profile == s.profile and m.world.locations == 512 for m in members)


def another(name, f, value):
    """A value that differs from ``value`` and that the setting allows."""
    special = {
        "single": "optical",
        "transfer.inputs": ["sar"],
        "blocks": {"sar": 64, "optical": 64},
        "modalities": {"heat": {"bands": ["thermal"], "unit": "K", "valid_range": [0, 400]}},
        "datasets": {"mine": {"modalities": ["sar", "optical"]}},
        "data.roots": {"ssl4eo": "/data"},
        "sweep": {"seed": [5]},
        "extensions": None,
    }
    if name in special:
        return special[name]
    if f.choices:
        rest = [c for c in f.choices if c != value and (c,) != value]
        return None if not rest else [rest[0]] if f.listed else rest[0]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        low, high = f.bounds.get("ge", f.bounds.get("gt", -math.inf)), f.bounds.get("le", f.bounds.get("lt", math.inf))
        tried = [value + 6, value + 1] if isinstance(value, int) else [1.5 * value, 0.5 * value, value + 0.1]
        return next(v for v in (*tried, value - 1) if low <= v <= high and v != value)
    if f.listed:
        return [*value[:-1], value[-1] / 2] if isinstance(value[0], float) else [*value, value[-1]]
    return value + "x"


def test_identity_holds_what_decides_the_result_and_nothing_else(profile):
    base = config.load(profile)
    wanted = config.identity(base)
    assert json.loads(json.dumps(wanted)) == wanted
    tried = 0
    for name, f in names():
        section, _, inner = name.rpartition(".")
        value = getattr(getattr(base, section) if section else base, inner)
        changed = another(name, f, value)
        if name in ("profile", "pair", "variant", "data.source", "data.dataset") or changed is None:
            continue
        found = config.identity(config.load(profile, {name: changed}))
        decides = f.decides and section != "transfer" and name != "modalities"  # of which this pair uses none
        assert (found != wanted) == decides, name
        if decides:
            assert [k for k in found if found[k] != wanted[k]] == [name]
        tried += 1
    assert tried > 40


def test_identity_holds_the_declared_modalities_that_are_used_and_no_others(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "modalities: {heat: {bands: [t], unit: K}, other: {bands: [x], unit: m}}\n"
        "datasets: {town: {modalities: [rgb, heat]}}\npair: town\ndata: {source: published}\n"
    )
    found = config.identity(config.load(path, {"transfer.inputs": ["both"]}))
    assert found["modalities"] == {"heat": {"bands": ["t"], "unit": "K"}}


def test_identity_forgets_the_world_when_the_data_is_real(profile):
    a, b = (config.load(profile, {"data.source": "published", "world.seed": seed}) for seed in (0, 1))
    assert config.identity(a) == config.identity(b) != config.identity(config.load(profile))
    assert not any(name.startswith("world.") for name in config.identity(a))


def test_a_profile_says_what_is_different_for_a_pair(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("epochs: 7\nbatch_size: 64\npairs: {rgb_dem: {batch_size: 32, world.tile: 24}, rgb_depth: }\n")
    first, second = config.load(str(path)), config.load(str(path), pair="rgb_dem")
    assert (first.pair, first.batch_size, first.world.tile) == ("sar_optical", 64, 36)
    assert (second.pair, second.epochs, second.batch_size, second.world.tile) == ("rgb_dem", 7, 32, 24)
    assert config.load(str(path), {"batch_size": 16, "pair": "rgb_dem"}).batch_size == 16
    assert config.load(str(path), pair="rgb_depth").batch_size == 64
    with pytest.raises(ConfigError, match="inputs = 'sar', but pair = 'rgb_dem' has: both, rgb, dem"):
        config.load(str(path), {"transfer.inputs": ["sar"]}, pair="rgb_dem")
    path.write_text("pairs: {rgb_dsm: {epochs: 3}}")
    with pytest.raises(ConfigError, match="unknown pair 'rgb_dsm'; allowed: sar_optical, rgb_dem, rgb_depth"):
        config.load(str(path))


def test_a_variant_lies_on_top_of_the_pair_and_its_members_have_names_of_their_own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "projector: [8]\ndim_common: 6\nsweep: {method: [decur]}\npairs: {rgb_dem: {epochs: 5, batch_size: 8}}\n"
        "variants: {share: {epochs: 6, sweep: {dim_common: [2, 4], seed: [0, 1]}, pairs: {rgb_depth: {epochs: 9}}}}\n"
    )
    settings = config.load(str(path), pair="rgb_dem", variant="share")
    assert (settings.epochs, settings.batch_size, settings.variant) == (6, 8, "share")
    assert settings == config.load(str(path), {"variant": "share", "pair": "rgb_dem"})
    assert config.load(str(path), pair="rgb_depth", variant="share").epochs == 9
    found = [(m.dim_common, m.seed, m.variant) for m in config.members(settings)]
    assert found == [(k, seed, f"share-dim_common{k}") for k in (2, 4) for seed in (0, 1)]
    assert config.members(config.load(str(path)))[0].variant == ""
    with pytest.raises(ConfigError, match="variants: 'shares' is not there; defined: share"):
        config.load(str(path), variant="shares")


def test_round_trip(profile):
    s = config.load(profile, {"projector": [32, 64], "transfer.fractions": [0.1, 1]})
    values = config.to_dict(s)
    assert values["profile"] == "own" and values["projector"] == [32, 64]
    values = {k: v for k, v in values.items() if k != "profile"}
    assert config.load(profile, json.loads(json.dumps(values))) == s
    assert config.load(profile, yaml.safe_dump(values)) == s


def test_settings_cannot_be_changed_in_passing(profile):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.load(profile).epochs = 3


def test_describe_covers_every_field_with_its_default():
    rows = {name: (default, meaning) for name, default, meaning in config.describe()}
    defaults = Settings()
    assert list(rows) == [name for name, _ in names()]
    for name, f in names():
        section, _, inner = name.rpartition(".")
        default, meaning = rows[name]
        value = getattr(getattr(defaults, section) if section else defaults, inner)
        if name in ("runs", "data.stores", "data.samples"):
            default = os.path.abspath(config.ROOT / default)
        assert default == value
        assert len(meaning) > 5 and all(choice in meaning for choice in f.choices)


def test_world_size(profile):
    s = config.load(profile)
    for world_size in (1, 2, 4, 256):
        config.check_world_size(s, world_size)
    with pytest.raises(ConfigError, match=r"batch_size = 256 .* world size of 3 processes; nearest that is: 255"):
        config.check_world_size(s, 3)
    with pytest.raises(ConfigError, match="nearest that is: 300"):
        config.check_world_size(s, 300)


def garbage(rng, depth=0):
    """A random value of the kinds that YAML can give."""
    text = "".join(rng.choices(string.printable + "é\0", k=rng.randrange(6)))
    plain = [
        None, True, False, 0, 1, -1, 2, 10**20, 10**400, 0.5, -0.0, math.nan, math.inf, -math.inf, "", text, "1e-6",
        "1e400", "nan", "-inf", "0x10", "1_0", "true", "decur", "small", b"bytes", yaml.safe_load("2026-01-01"),
    ]  # fmt: skip
    if depth < 2 and rng.random() < 0.4:
        inner = [garbage(rng, depth + 1) for _ in range(rng.randrange(4))]
        return rng.choice([inner, tuple(inner), {rng.choice(["seed", "x", 1, None, "a.b", text]): v for v in inner}])
    return rng.choice(plain)


def test_garbage_is_refused_as_a_setting_or_accepted_as_one(profile):
    rng = random.Random(0)
    known = [*(name for name, _ in names()), "data", "world", "transfer"]
    outcomes = {True: 0, False: 0}
    for _ in range(2500):
        overrides = {}
        for _ in range(rng.randrange(1, 3)):
            name = rng.choice(known) if rng.random() < 0.9 else rng.choice([None, 3, "", ".", "world.", "a.b.c"])
            overrides[name] = garbage(rng)
        try:
            settings = config.load(profile, overrides)
        except ConfigError as error:
            assert len(str(error)) > 10
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        values = {k: v for k, v in config.to_dict(settings).items() if k != "profile"}
        assert config.load(profile, values) == settings, overrides
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize(
    "overrides",
    [
        [1],
        5,
        "epochs: 2020-13-45",
        "a: &a {b: *a}",
        {"world": 5, "world.tile": 36},
        {"sweep": {"method": []}},
        {"sweep": {"seed": 3}},
        {"sweep": {"profile": ["a", "b"]}},
        {"name": "../../x"},
        {"seed": 10**30},
        {"transfer.protocols": []},
        {"runs": ""},
    ],
)
def test_odd_overrides_are_refused_as_config_errors(profile, overrides):
    with pytest.raises(ConfigError):
        config.load(profile, overrides)


def test_dotted_sweep_names_add_up_and_a_section_replaces(profile):
    s = config.load(profile, {"sweep.method": ["decur"], "sweep.seed": [0, 1]})
    assert s.sweep == {"method": ["decur"], "seed": [0, 1]}
    assert config.load("mini", {"sweep": {"seed": [0]}}).sweep == {"seed": [0]}
    assert config.load("mini", {"sweep.seed": [0]}).sweep["seed"] == [0]
    assert "method" in config.load("mini", {"sweep.seed": [0]}).sweep


@pytest.mark.parametrize(("item", "message"), [("epochs", "expected KEY=VALUE"), ("projector=[1", "not valid YAML")])
def test_what_a_command_line_sets_is_refused_by_name(item, message):
    with pytest.raises(ConfigError, match=f"--set {re.escape(item)}: {message}"):
        config.overrides(["epochs=2", item])
    assert config.overrides(["epochs=2", "world.seed=3"]) == {"epochs": 2, "world.seed": 3}


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("seed: 010", "seed", 10),
        ("epochs: 0100", "epochs", 100),
        ("seed: 0x10", "seed", 16),
        ("seed: 0o10", "seed", 8),
        ("epochs: +7", "epochs", 7),
        ("epochs: 1e2", "epochs", 100),
        ("lambd: 1e-6", "lambd", 1e-6),
        ("lambd: .5", "lambd", 0.5),
        ("lambd: 007", "lambd", 7.0),
        ("name: 007", "name", "007"),
        ("name: 1e-6", "name", "1e-6"),
        ("name: no", "name", "no"),
        ("name: true", "name", "true"),
        ("name: null", "name", "null"),
        ("name: 2024-05-01", "name", "2024-05-01"),
        ("name: '010'", "name", "010"),
        ("name: ", "name", ""),
        ("intra: false", "intra", False),
        ("intra: 'true'", "intra", True),
        ("intra: True", "intra", True),
        ("intra: FALSE", "intra", False),
        ("dim_common: 010", "dim_common", 10),
        ("dim_common: auto", "dim_common", "auto"),
        ("projector: [0100, 1e2]\ndim_common: 2", "projector", (100, 100)),
    ],
)
def test_a_setting_is_what_was_typed(tmp_path, text, name, value):
    """In a profile, in overrides as YAML, and on a command line, whose result is the same in another process."""
    kept = [line for line in FAST.splitlines() if line.split(":")[0] not in re.findall(r"^\w+", text, re.M)]
    (tmp_path / "own.yaml").write_text("\n".join([*kept, text]))
    (tmp_path / "base.yaml").write_text(FAST)
    items = [line.replace(": ", "=", 1) for line in text.splitlines()]
    typed = json.loads(json.dumps(config.overrides(items)))
    for settings in (
        config.load(tmp_path / "own.yaml"),
        config.load(tmp_path / "base.yaml", text),
        config.load(tmp_path / "base.yaml", typed),
    ):
        found = getattr(settings, name)
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 1:30", "epochs = '1:30'; expected a whole number"),
        ("epochs: 1_0", "epochs = '1_0'; expected a whole number"),
        ("epochs: 2024-05-01", "epochs = '2024-05-01'; expected a whole number"),
        ("epochs: ~", "epochs = '~'; expected a whole number"),
        ("epochs: 1e400", "epochs = inf; expected a whole number"),
        ("intra: no", "intra = 'no'; expected true or false"),
        ("intra: tRUE", "intra = 'tRUE'; expected true or false"),
        ("intra: 1", "intra = 1; expected true or false"),
        ("lambd: .nan", "lambd = '.nan'; expected a number"),
        ("dim_common: some", "dim_common = 'some'; expected a whole number or auto"),
        ("name: [1]", "name = ['1']; expected text"),
        ("world: ", "world = ''; expected a section"),
        ("vicreg_weights: [1, 1]", "vicreg_weights = ['1', '1']; allowed: at least 3 in the list and at most 3"),
        ("vicreg_weights: [1, -1, 1]", "vicreg_weights = -1; allowed: 0 or more"),
        ("auto_share: 1", "auto_share = 1; allowed: above 0 and below 1"),
    ],
)
def test_what_only_looks_like_a_value_is_refused(profile, text, message):
    with pytest.raises(ConfigError, match=re.escape(f"overrides: {message}")):
        config.load(profile, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 2\nseed: 1\nepochs: 3", "own.yaml: .*line 3: 'epochs' is given twice"),
        ("world: {tile: 36}\nworld:\n  seed: 1", "line 2: 'world' is given twice"),
        ("world:\n  tile: 36\n  tile: 48", "line 3: 'tile' is given twice"),
        ("pairs: {rgb_dem: {epochs: 1,\n epochs: 2}}", "line 2: 'epochs' is given twice"),
        ("sweep: {seed: [1], seed: [2]}", "line 1: 'seed' is given twice"),
        ("world: {tile: 36}\nworld.tile: 48", "world.tile.* is given twice"),
        ("data: {roots: {geonrw: /x}}\ndata.roots.geonrw: /y", "geonrw.* is given twice"),
        ("sweep: {seed: [1]}\nsweep.seed: [2]", "sweep.seed.* is given twice"),
    ],
)
def test_a_key_given_twice_is_refused_with_file_line_and_name(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path / "own.yaml")
    with pytest.raises(ConfigError, match="overrides.* is given twice"):
        config.load("mini", text.replace("pairs: ", ""))


def test_text_on_a_command_line_is_not_read_as_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = config.overrides(["runs=my runs #2: [a]", "data.stores='x", "name=", 'variant="007"'])
    assert found == {
        "runs": f"{tmp_path}/my runs #2: [a]",
        "name": "",
        "data.stores": f"{tmp_path}/'x",
        "variant": "007",
    }
    assert config.overrides(["epochs=3", "epochs=4"]) == {"epochs": 4}
    for item, message in (
        ("epochs=many", "epochs = 'many'"),
        ("epoch=3", "did you mean 'epochs'"),
        ("a.b=1", "unknown"),
    ):
        with pytest.raises(ConfigError, match=f"--set {item}: .*{message}"):
            config.overrides([item])


def test_a_name_of_a_sweep_takes_a_list_on_a_command_line(profile):
    typed = config.overrides(["sweep.seed=[0, 1]", "sweep.world.seed=[010]"])
    assert typed == {"sweep.seed": [0, 1], "sweep.world.seed": [10]}
    members = config.members(config.load(profile, {"sweep.method": ["decur", "random"], **typed}))
    assert [(m.method, m.seed, m.world.seed) for m in members] == [
        (method, seed, 10) for method in ("decur", "random") for seed in (0, 1)
    ]
    with pytest.raises(ConfigError, match="--set sweep.sede=.*unknown setting 'sede'"):
        config.overrides(["sweep.sede=[1]"])


def test_an_empty_text_undoes_what_a_profile_chose(tmp_path):
    (tmp_path / "own.yaml").write_text("variant: short\nvariants: {short: {epochs: 3}}\nepochs: 7")
    assert config.load(tmp_path / "own.yaml").epochs == 3
    assert config.load(tmp_path / "own.yaml", config.overrides(["variant="])).epochs == 7
    with pytest.raises(ConfigError, match="pair = ''; allowed: sar_optical"):
        config.load(tmp_path / "own.yaml", {"pair": ""})


def test_paths_start_where_they_were_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("GONE", raising=False)
    (tmp_path / "own.yaml").write_text(
        "runs: r/x\ndata: {stores: ~/s, samples: '${SCRATCH}/a', roots.geonrw: $SCRATCH/g}\n"
    )
    settings = config.load("own.yaml")
    assert settings.runs == str(config.ROOT / "r/x") and settings.data.stores == str(tmp_path / "home/s")
    assert settings.data.samples == str(tmp_path / "scratch/a")
    assert config.root_of(settings, "geonrw") == tmp_path / "scratch/g"
    assert config.root_of(settings, "nyuv2") == config.ROOT / "data/nyuv2"
    for overrides in (["runs=r/x", "data.roots.nyuv2=../n"], ["runs=r/x", "data.roots={nyuv2: ../n}"]):
        there = config.overrides(overrides)
        monkeypatch.chdir("/")
        moved = config.load(tmp_path / "own.yaml", there)
        assert (moved.runs, moved.data.roots["nyuv2"]) == (str(tmp_path / "r/x"), str(tmp_path.parent / "n"))
        assert moved.data.roots["geonrw"] == str(tmp_path / "scratch/g")  # a root more, not instead
        monkeypatch.chdir(tmp_path)
    assert Settings().runs == str(config.ROOT / "runs")
    assert config.meant(settings.runs) == f" ('r/x'; a relative path in a profile means the repository, {config.ROOT})"
    written = config.meant(str(tmp_path.parent / "n"))
    assert written == f" ('../n'; a relative path on a command line means the working folder, {tmp_path})"
    assert config.meant(tmp_path / "scratch/g") == ""
    for value, message in (
        ("$GONE/x", "runs = '$GONE/x'; the variable GONE is not set"),
        ("${GONE}", "GONE is not set"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            config.load("own.yaml", {"runs": value})
    for value, message in (("~nobody-here/x", "no such home folder"), ("", "expected a path")):
        with pytest.raises(ConfigError, match=f"data.stores = .*{message}"):
            config.load("own.yaml", {"data.stores": value})


def test_a_profiles_path_holds_in_another_folder(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("epochs: 7")
    monkeypatch.chdir(tmp_path)
    found = config.profile_path("own.yaml")
    monkeypatch.chdir("/")
    assert config.load(found).epochs == 7 and config.load(found).profile == "own"
    assert config.profile_path("mini") == "mini"


def test_roots_are_of_known_data_sets(profile):
    with pytest.raises(ConfigError, match="data.roots: unknown data set 'geonwr'; did you mean 'geonrw'"):
        config.load(profile, {"data.roots": {"geonwr": "/x"}})
    with pytest.raises(ConfigError, match="data.roots.geonrw = 5; expected text"):
        config.load(profile, {"data.roots": {"geonrw": 5}})
    assert config.load("a100").data.roots["ssl4eo"] == str(config.ROOT / "data/ssl4eo-s12")


def test_modalities_are_called_by_name(profile):
    assert config.load(profile, {"single": "optical"}).single == "optical"
    assert config.load(profile, {"transfer.inputs": ["both", "sar", "sar+optical"]}).transfer.inputs[2] == "sar+optical"
    assert [m.name for m in config.modalities(config.load(profile, pair="rgb_dem"))] == ["rgb", "dem"]
    for name, value in (
        ("single", "dem"),
        ("single", "sar+optical"),
        ("single", "1"),
        ("transfer.inputs", ["optical+sar"]),
        ("transfer.inputs", ["sar+sar"]),
        ("transfer.inputs", ["sar+"]),
        ("transfer.inputs", [""]),
        ("blocks", {"dem": 8, "sar+optical": 8}),
    ):
        with pytest.raises(ConfigError, match=rf"{name} = .*, but pair = 'sar_optical' has: .*sar, optical"):
            config.load(profile, {name: value})


def test_blocks_and_a_split_from_the_data(profile, tmp_path):
    s = config.load(profile, "blocks: {sar+optical: 048, sar: 16, optical: 8}")
    assert s.blocks == {"sar+optical": 48, "sar": 16, "optical": 8} and "blocks" in config.identity(s)
    assert config.load(profile, {"blocks": {"sar+optical": 9}, "dim_common": 99}).blocks == {"sar+optical": 9}
    (tmp_path / "own.yaml").write_text(FAST + "blocks: {sar+optical: 48, sar: 16, optical: 8}")
    own = tmp_path / "own.yaml"
    assert config.load(own, {"blocks": {"sar": 4, "optical": 4}}).blocks == {"sar": 4, "optical": 4}  # as a whole
    assert config.load(own, {"blocks.sar": 4}).blocks == {"sar+optical": 48, "sar": 4, "optical": 8}
    swept = config.load(own, "sweep: {widths: [{blocks: {sar+optical: 8}}, {blocks.sar: 0}]}")
    assert [m.blocks["sar+optical"] for m in config.members(swept)] == [8, 48]
    assert [len(m.blocks) for m in config.members(swept)] == [1, 3]
    auto = config.load(profile, {"dim_common": "auto", "auto_share": 0.5})
    assert config.identity(auto)["dim_common"] == "auto"
    config.check_dim_common(auto, 1)
    for overrides in (
        {"blocks": {"sar": 8}},
        {"blocks": {"sar+optical": 0}},
        {"blocks": {"sar+optical": 8}, "projector": []},
        {"blocks": {"sar": 8, "optical": 9}, "shared_projector": True},
    ):
        with pytest.raises(ConfigError, match="blocks = .*each modality needs some, and a projector of its own"):
            config.load(profile, overrides)
    for more in ({"intra": False}, {"decoupling": False}, {"blocks": {"sar+optical": 8}}):
        with pytest.raises(ConfigError, match="dim_common = 'auto'; it needs intra"):
            config.load(profile, {"dim_common": "auto"} | more)
    with pytest.raises(ConfigError, match="decoupling = False; blocks say what is common"):
        config.load(profile, {"blocks": {"sar+optical": 8}, "decoupling": False})
    with pytest.raises(ConfigError, match=r"blocks.sar = -1; allowed: 0 or more"):
        config.load(profile, {"blocks": {"sar": -1}})


@pytest.fixture
def tables():
    """The tables as they were, afterwards."""
    kept = dict(datasets._TABLE), dict(losses.METHODS), set(datasets._OWN), [*sys.path]
    yield
    for table, before in zip((datasets._TABLE, losses.METHODS), kept[:2], strict=True):
        table.clear()
        table.update(before)
    datasets._OWN.intersection_update(kept[2])
    sys.path[:] = kept[3]


OWN = """
pair: roofs
projector: [16]
dim_common: 8
modalities:
  heat: {bands: [10, 11], unit: degrees, valid_range: [-60, 080], scheme: range_8bit, low: [-2e1, 0], high: [45, 50]}
datasets:
  roofs: {title: 007, modalities: [rgb, heat], splits: [train, test], labels: [no, 1], resample: false}
pairs: {roofs: {epochs: 3}}
"""


def test_own_modalities_and_data_sets_in_a_profile(tmp_path, tables):
    (tmp_path / "own.yaml").write_text(OWN)
    s = config.load(tmp_path / "own.yaml", {"data.roots.roofs": "/data/roofs"})
    rgb, heat = config.modalities(s)
    assert (s.epochs, rgb.name, heat.bands, heat.valid_range) == (3, "rgb", ("10", "11"), (-60.0, 80.0))
    assert (heat.low, heat.high, heat.scheme) == ((-20.0, 0.0), (45.0, 50.0), "range_8bit")
    found = datasets.find("roofs")
    assert (found.title, found.splits, found.task.classes) == ("007", ("train", "test"), ("no", "1"))
    values = {k: v for k, v in config.to_dict(s).items() if k != "profile"}
    assert config.load(tmp_path / "own.yaml", json.loads(json.dumps(values))) == s
    assert "modalities" in config.identity(s) and "datasets" not in config.identity(s)
    (tmp_path / "own.yaml").write_text(OWN.replace("[45, 50]", "[45, 60]"))  # changed, and loaded again
    assert config.modalities(config.load(tmp_path / "own.yaml"))[1].high == (45.0, 60.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bands:", "band:", "band"),
        ("-2e1", "cold", "low"),
        ("[rgb, heat]", "[rgb, warm]", "'warm' is not declared"),
        ("[rgb, heat]", "[heat]", "at least two"),
        ("resample: false", "resampled: false", "resampled unknown"),
        ("  roofs: {title", "  geonrw: {pair: roofs, title", "'geonrw' is there already"),
        ("pairs: {roofs", "pairs: {roof", "unknown pair 'roof'"),
        ("  roofs: {", "  roofs: {title: a, ", "'title' is given twice"),
        ("datasets:\n", "datasets: 5\nsweep:\n", "datasets = '5'; expected a section"),
    ],
)
def test_declarations_that_do_not_fit_are_named(tmp_path, tables, old, new, message):
    assert old in OWN
    (tmp_path / "own.yaml").write_text(OWN.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path / "own.yaml")


def test_extensions_are_read_before_names_and_in_helper_processes(tmp_path, tables, monkeypatch):
    (tmp_path / "add_for_config.py").write_text(
        "from decur_core.losses import METHODS, Method\nMETHODS['agree'] = Method('Agreement', lambda z, s, **_: {})\n"
    )
    monkeypatch.setenv("MINE", str(tmp_path))
    (tmp_path / "own.yaml").write_text(FAST + "extensions: [$MINE/add_for_config.py]\nmethod: agree\n")
    s = config.load(tmp_path / "own.yaml", {"sweep": {"method": ["agree", "decur"]}})
    assert s.extensions == (str(tmp_path / "add_for_config.py"),) and len(config.members(s)) == 2
    values = {k: v for k, v in config.to_dict(s).items() if k != "profile"}
    assert config.load(tmp_path / "own.yaml", values) == s
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(s))
    code = (
        "import pickle, sys; from decur_core import losses; s = pickle.load(open(sys.argv[1], 'rb'));"
        "assert s.method in losses.METHODS, [*losses.METHODS]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "s.pkl"], cwd=config.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.py", None, "extensions: no file .*gone.py"),
        ("fails_for_config.py", "1 / 0", "fails_for_config.py: ZeroDivisionError"),
        ("json.py", "x = 1", "json.py: another module is called json"),
    ],
)
def test_extensions_that_cannot_be_read_are_named(tmp_path, tables, name, content, message):
    if content:
        (tmp_path / name).write_text(content)
    (tmp_path / "own.yaml").write_text(f"extensions: [{tmp_path / name}]")
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path / "own.yaml")
    for place in ("pairs: {sar_optical: {extensions: [x.py]}}", "{}"):
        (tmp_path / "own.yaml").write_text(place)
        with pytest.raises(ConfigError, match="they stand at the top of a profile"):
            config.load(tmp_path / "own.yaml", {"extensions": ["x.py"]} if place == "{}" else None)


def test_loading_is_quick():
    config.load("report")
    start = time.process_time()
    for _ in range(5):
        config.load("report")  # 24 members
    assert time.process_time() - start < 2.5


def test_a_number_of_one_method_alone_is_no_part_of_a_runs_name(tmp_path):
    path = tmp_path / "own.yaml"
    one = "{method: decur}, {method: barlow_twins, lambd: 0.02}, {method: simclr, temperature: 0.5}"
    several = "{method: decur, lambd: 1}, {method: decur, lambd: 2}, {method: clip, lambd: 1}"
    path.write_text(f"sweep: {{of: [{one}], seed: [0, 1]}}\nvariants: {{grid: {{sweep: {{of: [{several}]}}}}}}\n")
    found = config.members(config.load(path))
    assert {m.variant for m in found} == {""} and [m.lambd for m in found[2:4]] == [0.02, 0.02]
    assert [m.temperature for m in found[::2]] == [0.1, 0.1, 0.5]
    grid = config.members(config.load(path, variant="grid"))
    assert [m.variant for m in grid] == ["grid-lambd1.0", "grid-lambd2.0", "grid"]
