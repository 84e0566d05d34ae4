"""Profiles: what is refused and how, what counts as a number, and what identifies a run."""

import json
import math
import os
import random
import re
import string
import types
import typing

import pydantic
import pytest
import yaml

from decur_core import config
from decur_core.config import ConfigError, Settings

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
    assert {"mini", "samples", "a100"} <= set(SHIPPED)


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
    ({"momentum": 1}, ["momentum = 1.0", "0 to 0.999999"]),
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
    ({"transfer.fractions": [0]}, ["transfer.fractions = 0.0", "above 0 and at most 1"]),
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
        if name in ("profile", "pair", "variant", "data.source") or changed is None:
            continue
        found = config.identity(config.load(profile, {name: changed}))
        decides = f.decides and section != "transfer"
        assert (found != wanted) == decides, name
        if decides:
            assert [k for k in found if found[k] != wanted[k]] == [name]
        tried += 1
    assert tried > 40


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
    for _ in range(1500):
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
