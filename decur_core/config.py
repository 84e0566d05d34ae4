"""Settings: every number of a run, strict and typed. Defaults are the paper's for SAR-optical pretraining."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue

from decur_core import backbones, losses
from decur_core.data import datasets
from decur_core.data.modality import Modality
from decur_core.running import profiles, sections
from decur_core.running.kinds import Declared, Flag, Folder, Int, Listed, Natural, Positive, Real, Scale, Share, Weight
from decur_core.running.sections import ROOT, ConfigError, Section, at, nearest

PROFILES, profile_path, meant = profiles.PROFILES, profiles.located, profiles.meant
add_shard, check_shard, check_world_size = profiles.add_shard, profiles.check_shard, profiles.check_world_size
Aside = partial(Field, json_schema_extra={"result": False})  # a field that cannot change what pretraining computes
Some = partial(Field, min_length=1)
# Settings that name an entry of a table, to which others may add.
TABLES = {"pair": datasets.pairs, "method": lambda: losses.METHODS, "backbone": lambda: backbones.BACKBONES}


class Data(Section):
    """Where images come from and where converted stores go."""

    source: Literal["published", "world", "samples"] = Field("published", description="where images come from")
    dataset: str = Aside("", description="that encoders are pretrained on; empty: the first of the pair")
    roots: dict[str, Folder] = Aside({}, description="data set: its folder, else data/<name>")
    rgbd_height: Int = Field(480, ge=8, description="height of stored RGB-depth images, px")
    rgbd_width: Int = Field(640, ge=8, description="width of stored RGB-depth images, px")
    samples: Folder = Aside("../shared/data", description="real sample files (source: samples)")
    stores: Folder = Aside("stores", description="converted data, a folder per profile")
    processes: Int = Aside(4, ge=0, le=512, description="processes that convert")


class World(Section):
    """The miniature worlds (source: world): known factors rendered as the images of a pair."""

    locations: Int = Field(2048, ge=1, description="pretraining locations")
    through_files: Int = Aside(64, ge=0, description="of these (and of the patches), written as GeoTIFF and read")
    train: Int = Aside(1024, ge=1, description="labelled patches for training a classifier")
    test: Int = Aside(512, ge=1, description="labelled patches for testing it")
    tile: Int = Field(36, ge=6, multiple_of=6, description="side (height, for rooms) of an image, px: 12, 18, ...")
    layout: Literal["coregistered", "redrawn"] = Field("coregistered", description="scene layout over views")
    common: Int = Field(2, ge=0, le=2, description="common factors; of the rest of 2 each sensor draws its own")
    seed: Int = Field(0, ge=0, le=2**63 - 1, description="seed of scenes and factors")


class Transfer(Section):
    """Training on labels (paper, appendix B); defaults: scene classification on BigEarthNet-MM."""

    protocols: Listed[Literal["linear", "finetune"]] = Some(("linear", "finetune"), description="what is trained")
    inputs: Listed[str] = Some(("both",), description="modalities given: both (all there are), or names joined by +")
    fractions: Listed[Share] = Some((0.01, 1.0), description="share of the training labels, above 0, up to 1")
    segmenter: Literal["fcn", "cmx"] = Field("fcn", description="network on the encoders where pixels have labels")
    epochs: Int = Field(100, ge=1, description="passes over the labelled images")
    iterations: Int = Field(0, ge=0, description="steps; 0: as many as the epochs have")
    seasons: Listed[str] = Some(("",), description="images given of a place, numbers joined by +; empty: the labelled")
    validation: Real = Field(0.0, ge=0, le=0.9, description="share of the training images, the last, scored as a test")
    min_updates: Int = Field(0, ge=0, description="steps at least, however few the labels: epochs are added")
    batch_size: Int = Field(256, ge=1, description="images per step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="update rule")
    learning_rate_linear: Real = Field(0.5, ge=0, description="rate with frozen encoders")
    learning_rate_finetune: Real = Field(0.05, ge=0, description="rate when all weights are trained")
    weight_decay: Real = Field(0.0, ge=0, description="decay of the weights")
    schedule: Literal["steps", "polynomial", "constant"] = Field("steps", description="of the rate")
    milestones: Listed[Positive] = Field((60, 80), description="epochs after which the rate falls to a tenth (steps)")
    warmup_epochs: Int = Field(0, ge=0, description="epochs in which the rate rises from 0 (polynomial)")
    crop_size: Int = Field(224, ge=8, description="side of a network input, px")
    crop_scale: Real = Field(0.8, ge=0.01, le=1, description="smallest share of an image's area that a crop keeps")
    scales: Listed[Scale] = Field((1.0,), description="sizes at which a segmentation is predicted and averaged")
    flip: Flag = Field(False, description="also predict mirrored images, and average")
    exclude: Flag = Aside(False, description="leave out patches that the data set lists as snow or cloud")


class Settings(Section):
    """All settings of a profile; ``load`` makes and checks it."""

    profile: str = Aside("", description="name of the profile")
    name: str = Aside("", pattern=r"^[\w.-]*$", description="suffix of the run's folder, which tells it from others")
    variant: str = Aside("", pattern=r"^[\w.-]*$", description="chosen part of the profile, and what varies")
    pair: str = Field("sar_optical", description="modalities that go together")
    method: str = Field("decur", description="pretraining loss; supervised and random: none")
    single: str = Field("", description="modality that barlow_twins_single trains; empty: the first")
    backbone: str = Field("resnet50", description="network of each modality")
    projector: Listed[Positive] = Field((8192,) * 3, description="output widths of the projector's layers, or []")
    shared_projector: Flag = Field(False, description="one projector for all modalities, as in the published code")
    dim_common: Natural | Literal["auto"] = Field(7168, description="common embedding dimensions; auto: from the data")
    auto_share: Real = Field(0.3, gt=0, lt=1, description="auto: part of the schedule with intra-modal terms alone")
    blocks: dict[str, Natural] = Field({}, description="widths of an embedding's blocks: of modalities joined by +")
    decoupling: Flag = Field(True, description="decur has unique dimensions; false: all are common")
    intra: Flag = Field(True, description="decur has intra-modal terms")
    lambd: Real = Field(0.0051, ge=0, description="weight of the off-diagonal correlations (decur, barlow_twins)")
    temperature: Real = Field(0.1, ge=0.001, description="of simclr; clip learns its own")
    vicreg_weights: Listed[Weight] = Field((25.0, 25.0, 1.0), min_length=3, max_length=3, description="of its terms")
    crop_size: Int = Field(224, ge=8, description="side of a view, px")
    epochs: Int = Field(100, ge=1, description="passes over the pairs")
    batch_size: Int = Field(256, ge=2, description="pairs per step, over all processes")
    optimizer: Literal["lars", "adamw"] = Field("lars", description="update rule")
    learning_rate: Real = Field(0.2, ge=0, description="starting rate of the weights")
    learning_rate_biases: Real = Field(0.0048, ge=0, description="the same of biases and normalisation parameters")
    momentum: Real = Field(0.9, ge=0, le=0.999999, description="LARS momentum")
    weight_decay: Real = Field(1e-6, ge=0, description="decay of the weights")
    trust_coefficient: Real = Field(0.001, ge=0, description="LARS trust coefficient")
    seed: Int = Field(0, ge=0, le=2**63 - 1, description="seed of weights, sample order, seasons and augmentations")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on GPUs and AMX")
    compile: Literal["off", "default", "reduce-overhead"] = Field("off", description="torch.compile mode of backbones")
    device: Literal["auto", "cpu", "cuda"] = Aside("auto", description="where to compute")
    processes: Int = Aside(0, ge=0, description="that train, on this node; 0: one per visible GPU, 1 on a CPU")
    workers: Int = Aside(8, ge=0, le=512, description="threads that read ahead, in each process")
    checkpoint_steps: Int = Aside(500, ge=1, description="steps between checkpoints")
    log_steps: Int = Aside(20, ge=1, description="steps between lines of the log and checks for non-finite losses")
    explain_samples: Int = Aside(10000, ge=1, description="pairs over which saliency is counted")
    runs: Folder = Aside("runs", description="folder of results")
    sweep: dict[str, JsonValue] = Aside({}, description="what compared runs vary, setting: values, or name: sections")
    extensions: Listed[Folder] = Aside((), description="Python files that add data sets, methods, backbones and so on")
    modalities: dict[str, Declared] = Field({}, description="own sensors: name: fields of data.modality.Modality")
    datasets: dict[str, Declared] = Aside({}, description="own data sets in folders: name: its modalities, ...")
    data: Data = Data()
    world: World = World()
    transfer: Transfer = Transfer()

    def faults(self) -> Iterator[str]:
        """Names that are in no table, and settings that are fine alone and impossible together."""
        self.register()
        for name, table in TABLES.items():
            if getattr(self, name) not in table():
                yield f"{name} = {getattr(self, name)!r}; allowed: {', '.join(table())}"
        for name in self.data.roots.keys() - datasets.names():
            yield f"data.roots: unknown data set {name!r}; {nearest(name, datasets.names())}"
        known = [d.name for d in datasets.of_pair(self.pair) if d.pretrain]
        if self.data.dataset not in ("", *known):
            yield f"data.dataset = {self.data.dataset!r}, but pair = {self.pair!r} is pretrained on: {', '.join(known)}"
        has, inputs = [m.name for m in modalities(self)], [name for name in self.transfer.inputs if name != "both"]
        if self.single not in ("", *has):
            yield f"single = {self.single!r}, but pair = {self.pair!r} has: {', '.join(has)}"
        for setting, names in (("transfer.inputs", inputs), ("blocks", self.blocks)):
            for name in names:
                if (parts := name.split("+")) != [m for m in has if m in parts]:
                    allowed = ["both"] * (setting != "blocks") + has + ["+".join(has)]
                    yield f"{setting} = {name!r}, but pair = {self.pair!r} has: {', '.join(allowed)}"
        widths = {sum(own.values()) for own in losses.layout(self.blocks, has).values()}
        if self.blocks and (0 in widths or not self.projector or (self.shared_projector and len(widths) > 1)):
            yield f"blocks = {self.blocks}; each modality needs some, and a projector of its own if sums differ"
        decur, auto = self.method == "decur", self.dim_common == "auto"
        if decur and len(has) > 2 and not (self.blocks or auto):
            yield f"pair = {self.pair!r} has {len(has)} modalities; decur needs their blocks, or dim_common: auto"
        if decur and auto and (self.blocks or not (self.intra and self.decoupling)):
            yield "dim_common = 'auto'; it needs intra: true, decoupling: true and no blocks"
        if decur and self.blocks and not self.decoupling:
            yield "decoupling = False; blocks say what is common, one of all modalities alone that everything is"
        if self.data.source == "world" and self.world.locations < self.batch_size:
            yield f"batch_size = {self.batch_size} is more than world.locations = {self.world.locations}"
        if self.projector:  # without one, the width is known where networks are made
            check_dim_common(self, self.projector[-1])

    def register(self) -> None:
        """Make known what the profile brings along: Python files, modalities, data sets in folders."""
        profiles.extend(self.extensions)
        datasets.declare(self.modalities, self.datasets)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.register()  # in a helper process, too


overrides = partial(profiles.assigned, Settings)  # the KEY=VALUE items of a command line, for `load`
to_dict = partial(Settings.model_dump, mode="json")  # nested plain values, as JSON and YAML hold them
defaults = partial(sections.defaults, Settings)  # what `identity` would give for a setting that nobody changes
describe = partial(sections.describe, Settings, TABLES)  # rows of the book's table


def load(
    profile: str | Path = "mini", overrides: dict | str | None = None, *, pair: str | None = None, variant: str = ""
) -> Settings:
    """Settings of ``notebooks/profiles/<profile>.yaml`` (or of a YAML file's path) with ``overrides`` on top.

    ``overrides``: nested or dotted names, e.g. ``{"epochs": 5, "world.locations": 64}``, or the same as YAML text (so
    that ``papermill -p overrides "{epochs: 5}"`` works). ``pair``, ``variant``: else those that overrides or profile
    name. What the profile's sections ``pairs`` and ``variants`` say under these names lies, in this order, between the
    profile and the overrides. Relative paths start at the repository in a profile, at the working folder in overrides.
    Raises ``ConfigError`` for unknown names, wrong types, and values that are out of range or contradict each other.
    """
    values, pairs = profiles.layered(Settings, profile, overrides, pair=pair, variant=variant)
    settings = Settings.made(values, f"{values['profile']}.yaml")
    if unknown := [p for p in pairs if p not in datasets.pairs()]:
        raise ConfigError(f"{profile}: pairs: unknown pair {unknown[0]!r}; allowed: {', '.join(datasets.pairs())}")
    members(settings)
    return settings


def modalities(settings: Settings) -> tuple[Modality, ...]:
    """The modalities of the settings' pair, in their order."""
    return datasets.modalities_of(settings.pair)


def root_of(settings: Settings, dataset: str) -> Path:
    """The folder of a data set: in ``data.roots``, else ``data/<name>`` in the repository."""
    return Path(settings.data.roots.get(dataset, ROOT / "data" / dataset))


def check_dim_common(settings: Settings, width: int) -> None:
    """Refuse more common dimensions than an embedding of ``width`` has, where the loss tells them from the others."""
    told = settings.method == "decur" and settings.decoupling and not settings.blocks and settings.dim_common != "auto"
    if told and settings.dim_common > width:
        source = "the last width of projector" if settings.projector else f"the width of {settings.backbone}"
        raise ConfigError(f"dim_common = {settings.dim_common} is more than {source}; allowed: 0 to {width}")


def members(settings: Settings) -> list[Settings]:
    """One ``Settings`` for each combination of the ``sweep`` lists; without a sweep, the settings themselves."""
    base, made, every = to_dict(settings) | {"sweep": {}}, [], [*profiles.combinations(settings.sweep)]
    for chosen in every:
        # Method and seed are in every run's name; what else varies within a method has to tell the runs' folders apart.
        alike = [other for other in every if other.get("method") == chosen.get("method")]
        varied = [k for k in chosen if k not in ("method", "seed") and len({str(o.get(k)) for o in alike}) > 1]
        parts = [f"{k.split('.')[-1]}{chosen[k]}" for k in varied]
        about = {"variant": re.sub(r"[^\w.-]+", "_", "-".join(filter(None, [settings.variant, *parts])))}
        made.append(Settings.made(Settings.over(base, chosen, "sweep") | about, "sweep"))
    return made


def identity(settings: Settings) -> dict:
    """The settings that decide what a pretraining run computes, as a flat dict of dotted names."""
    values, skipped = to_dict(settings), ("transfer", "" if settings.data.source == "world" else "world")
    used = [m.name for m in modalities(settings)]  # what the profile declares beside them changes nothing
    values["modalities"] = {name: spec for name, spec in values["modalities"].items() if name in used}
    decide = [name for name, field in Settings.fields() if not field.json_schema_extra]
    return {name: at(values, name) for name in decide if name.partition(".")[0] not in skipped}
