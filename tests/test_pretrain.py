"""The loop: every step on record, exact resume after any death, refusals before any compute is spent."""

import dataclasses
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import file_limit, make_store

from decur_core import backbones, config, pretrain
from decur_core.data import datasets, prepare
from decur_core.data.modality import OPTICAL, SAR, Modality
from decur_core.data.store import Store
from decur_core.model import MultimodalModel
from decur_core.running import checkpoints, history
from decur_core.running import folders as runs

ROOT = Path(__file__).resolve().parents[1]
CHANNELS = {"sar": 2, "optical": 13}


def final(folder: Path) -> dict:
    return torch.load(folder / "final.pt", weights_only=True)


def same_weights(a: dict, b: dict) -> bool:
    assert a["model"].keys() == b["model"].keys()
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_history_has_every_step_once_with_all_terms(tiny, pair_store):
    settings = tiny(log_steps=5)
    lines = history.read(pretrain.run(settings, pair_store))
    assert [line["step"] for line in lines] == list(range(1, 17))
    for k, line in enumerate(lines):
        assert line["total"] == pytest.approx(
            sum(line[t] for t in ("common", "unique", "intra/sar", "intra/optical")), rel=1e-5
        )
        share = (1 + torch.cos(torch.tensor(torch.pi * k / 16))) / 2
        assert line["learning_rate"] == pytest.approx(settings.learning_rate * float(share), abs=1e-9)


def test_a_finished_run_is_loaded_not_repeated(tiny, pair_store):
    settings = tiny()
    folder = pretrain.run(settings, pair_store)
    before = (folder / "final.pt").stat().st_mtime_ns
    assert pretrain.run(settings, pair_store) == folder
    assert (folder / "final.pt").stat().st_mtime_ns == before
    assert not list(folder.glob("checkpoint-*"))


def test_loader_threads_do_not_change_the_result(tiny, pair_store):
    one = final(pretrain.run(tiny(name="one"), pair_store))
    two = final(pretrain.run(tiny(name="two", workers=2), pair_store))
    assert same_weights(one, two)


def test_seed_changes_the_result(tiny, pair_store):
    one = final(pretrain.run(tiny(epochs=1), pair_store))
    two = final(pretrain.run(tiny(epochs=1, seed=1), pair_store))
    assert not same_weights(one, two)


def stop_after(step: int, monkeypatch):
    """Send SIGTERM in the step with this number; the list that is returned has an entry for every step."""
    real, calls = pretrain.loss, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(pretrain, "loss", counted)
    return calls


@pytest.mark.parametrize("optimizer, precision", [("lars", "float32"), ("adamw", "float32"), ("adamw", "bfloat16")])
def test_stop_signal_writes_a_checkpoint_and_resume_is_exact(tiny, pair_store, monkeypatch, optimizer, precision):
    whole = final(pretrain.run(tiny(name="whole", optimizer=optimizer, precision=precision), pair_store))
    settings = tiny(name="stopped", optimizer=optimizer, precision=precision)
    calls = stop_after(7, monkeypatch)
    with pytest.raises(pretrain.Interrupted, match=r"SIGTERM after step 7 of 16"):
        pretrain.run(settings, pair_store)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    assert sorted(p.name for p in folder.glob("checkpoint-*"))[-1] == "checkpoint-000000007.pt"
    resumed = pretrain.run(settings, pair_store)
    assert len(calls) == 16, "steps before the checkpoint must not be computed again"
    assert same_weights(whole, final(resumed))
    assert [line["step"] for line in history.read(resumed)] == list(range(1, 17))


SCRIPT = """
    import sys, torch
    torch.set_num_threads(1)
    from decur_core import config, pretrain
    pretrain.run(config.load("start", sys.argv[1]), sys.argv[2])
"""


def killed_at_random(settings, store, overrides: dict, *, kills: int, seed: int) -> Path:
    """Run in a process of its own, kill -9 it ``kills`` times at random moments, let it end."""
    folder = runs.path(settings, "pretrain", runs.title(settings))
    random = torch.Generator().manual_seed(seed)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), json.dumps(overrides), str(store)]
    total = settings.epochs * (32 // settings.batch_size)
    for kill in range(kills):
        after = int(total * kill / kills) + int(torch.randint(1, max(2, total // kills), (), generator=random))
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(history.read(folder)) < after:
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.002)
        process.kill()
        error = process.communicate()[1]
        assert process.returncode in (-signal.SIGKILL, 0), error
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def check_kills(tmp_path, pair_store, tiny, *, kills, epochs, seed):
    overrides = {"epochs": epochs, "checkpoint_steps": 5}
    whole = final(pretrain.run(tiny(name="whole", **overrides), pair_store))
    settings = tiny(name="killed", **overrides)
    plain = {k: v for k, v in config.to_dict(settings).items() if k not in ("profile", "sweep")}
    folder = killed_at_random(settings, pair_store, plain, kills=kills, seed=seed)
    assert same_weights(whole, final(folder))
    assert [line["step"] for line in history.read(folder)] == list(range(1, 4 * epochs + 1))


def test_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(tmp_path, pair_store, tiny):
    check_kills(tmp_path, pair_store, tiny, kills=1, epochs=20, seed=0)


@pytest.mark.soak
def test_twenty_kills(tmp_path, pair_store, tiny):
    check_kills(tmp_path, pair_store, tiny, kills=20, epochs=200, seed=1)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def changed(content: bytes) -> bytes:
    """With other weights, which torch would load."""
    largest = max(zipfile.ZipFile(io.BytesIO(content)).infolist(), key=lambda part: part.file_size)
    middle = largest.header_offset + largest.file_size // 2
    assert any(content[middle : middle + 32])
    return content[:middle] + bytes(32) + content[middle + 32 :]


def misled(content: bytes) -> bytes:
    """With another place of the table of contents, from which all parts lie before the first byte."""
    return content[:-47] + b"\xff" + content[-46:]


def folded(content: bytes) -> bytes:
    """With one bit changed: it makes a folder of some weights, for which torch gives what happens to be in memory."""
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0")) + 38  # of its line in the table
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [truncated, changed])
def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tiny, pair_store, monkeypatch, capsys, damage):
    settings = tiny(name="damaged")
    whole = final(pretrain.run(tiny(name="whole"), pair_store))
    real, calls = pretrain.loss, []

    def die_in_step_8(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyError("stop here")
        return real(*arguments)

    monkeypatch.setattr(pretrain, "loss", die_in_step_8)
    with pytest.raises(KeyError):
        pretrain.run(settings, pair_store)
    monkeypatch.setattr(pretrain, "loss", real)
    newest = runs.path(settings, "pretrain", runs.title(settings)) / "checkpoint-000000006.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    folder = pretrain.run(settings, pair_store)
    said = capsys.readouterr().out
    assert "checkpoint-000000006.pt cannot be read" in said and "resumes after step 3" in said
    assert same_weights(whole, final(folder))


def test_both_checkpoints_damaged_start_the_run_again(tiny, pair_store, monkeypatch, capsys):
    whole = final(pretrain.run(tiny(name="whole"), pair_store))
    settings = tiny(name="damaged")
    stop_after(8, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(settings, pair_store)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    for file in (folder / "checkpoint-000000006.pt", folder / "checkpoint-000000008.pt"):
        file.write_bytes(changed(file.read_bytes()))
    assert same_weights(whole, final(pretrain.run(settings, pair_store)))
    assert capsys.readouterr().out.count("cannot be read (BadZipFile: the checksum of") == 2
    assert [line["step"] for line in history.read(folder)] == list(range(1, 17))


def test_a_run_that_begins_again_keeps_its_new_checkpoints(tiny, pair_store, monkeypatch, capsys):
    settings = tiny()
    folder, calls = runs.path(settings, "pretrain", runs.title(settings)), stop_after(12, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(settings, pair_store)
    for file in checkpoints.files(folder):
        file.write_bytes(bytes(file.stat().st_size))
    stop_after(5, monkeypatch)
    with pytest.raises(pretrain.Interrupted, match="after step 5 of 16"):
        pretrain.run(settings, pair_store)
    assert "no checkpoint can be read; the run begins again" in capsys.readouterr().out
    assert [f.name for f in checkpoints.files(folder)] == ["checkpoint-000000003.pt", "checkpoint-000000005.pt"]
    calls.clear()
    pretrain.run(settings, pair_store)
    assert len(calls) == 11, "goes on after step 5"


@pytest.mark.parametrize("damage", [truncated, changed, misled, folded])
def test_a_damaged_end_is_named_with_the_way_out(tiny, pair_store, damage):
    file = pretrain.run(tiny(epochs=1), pair_store) / "final.pt"
    whole = final(file.parent)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        OSError, match=rf"{file} cannot be read \(BadZipFile: .*\); if it is removed, the same call trains again"
    ):
        pretrain.run(tiny(epochs=1), pair_store)
    file.unlink()
    assert same_weights(whole, final(pretrain.run(tiny(epochs=1), pair_store)))


def test_a_signal_while_the_end_is_written_waits_for_it(tiny, pair_store, monkeypatch):
    real = checkpoints.save

    def signalled(state, file):
        if file.name == "final.pt":
            os.kill(os.getpid(), signal.SIGTERM)
        real(state, file)

    monkeypatch.setattr(checkpoints, "save", signalled)
    assert final(pretrain.run(tiny(), pair_store))["step"] == 16


def test_what_a_kill_leaves_behind_is_removed(tiny, pair_store, monkeypatch):
    settings = tiny()
    folder, calls = runs.path(settings, "pretrain", runs.title(settings)), stop_after(7, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(settings, pair_store)
    half = folder / ".checkpoint-000000009.pt.4711"  # killed while it wrote this
    half.write_bytes(b"half a checkpoint")
    real = checkpoints.save

    def killed_after_the_end(state, file):
        real(state, file)
        if file.name == "final.pt":
            raise KeyError("killed")

    monkeypatch.setattr(checkpoints, "save", killed_after_the_end)
    with pytest.raises(KeyError):
        pretrain.run(settings, pair_store)
    assert not half.exists() and list(folder.glob("checkpoint-*"))
    assert pretrain.run(settings, pair_store) == folder and len(calls) == 16
    assert sorted(f.name for f in folder.iterdir()) == [".lock", "final.pt", "history.jsonl", "run.json"]


def test_full_disk_is_reported_and_the_run_goes_on(tiny, pair_store, monkeypatch, capsys):
    real = checkpoints.save

    def full(state, file):
        if file.name.startswith("checkpoint"):
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(checkpoints, "save", full)
    folder = pretrain.run(tiny(), pair_store)
    assert "checkpoint not written" in capsys.readouterr().out
    assert (folder / "final.pt").exists()


def test_a_log_holds_what_a_run_says_before_it_is_killed(tmp_path):
    (tmp_path / "checkpoint-000000002.pt").write_bytes(b"torn")
    script = """if True:
        import os, sys
        from pathlib import Path
        from decur_core.running import checkpoints
        folder = Path(sys.argv[1])
        checkpoints.newest(folder, {})
        checkpoints.save_or_say({}, folder / "checkpoint-000000002.pt" / "of a file", "step 3")
        os._exit(9)
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", script, tmp_path]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert "trying the one before" in said and "step 3: checkpoint not written" in said


def test_a_file_that_finds_no_room_is_named_with_the_reason(tiny, pair_store, capsys):
    settings = tiny()
    folder = runs.path(settings, "pretrain", runs.title(settings))
    with file_limit(40000), pytest.raises(OSError, match=r"final.pt cannot be written: .*File too large"):
        pretrain.run(settings, pair_store)
    assert "step 3: checkpoint not written" in (said := capsys.readouterr().out) and "File too large" in said
    assert sorted(f.name for f in folder.iterdir()) == [".lock", "history.jsonl", "run.json"]
    assert len(history.read(pretrain.run(settings, pair_store))) == 16


def test_a_history_that_finds_no_room_is_named_with_the_way_out(tiny, pair_store, monkeypatch):
    whole, settings = final(pretrain.run(tiny(name="whole"), pair_store)), tiny()
    file = runs.path(settings, "pretrain", runs.title(settings), "history.jsonl")
    real, calls, cannot = pretrain.loss, [], f"{file}: cannot be written \\(File too large\\); make room and run"

    def full(*arguments):
        calls.append(1)
        if len(calls) == 5:
            limit(file.stat().st_size + 20)
        return real(*arguments)

    monkeypatch.setattr(pretrain, "loss", full)
    with file_limit() as limit, pytest.raises(OSError, match=cannot):
        pretrain.run(settings, pair_store)
    assert same_weights(whole, final(pretrain.run(settings, pair_store))) and len(calls) == 5 + 13
    assert [line["step"] for line in history.read(file.parent)] == list(range(1, 17))


def test_lines_of_a_history_that_cannot_be_read_are_left_out(tmp_path):
    (tmp_path / "history.jsonl").write_bytes(b'{"step": 1}\n\xff\0\xfe\n{"step": 2}\n{"ste')
    assert history.read(tmp_path) == [{"step": 1}, {"step": 2}] and history.read(tmp_path / "none") == []


def test_other_settings_refuse_to_resume_and_are_named(tiny, pair_store):
    pretrain.run(tiny(), pair_store)
    with pytest.raises(config.ConfigError, match="holds a run with other settings") as error:
        pretrain.run(tiny(lambd=0.02, epochs=5), pair_store)
    assert "epochs: 4 there, 5 now" in str(error.value) and "lambd: 0.015625 there, 0.02 now" in str(error.value)
    assert error.value.args[0].count(" there, ") == 2


def test_other_data_of_the_same_size_are_refused(tiny, pair_store, tmp_path, monkeypatch):
    other = make_store(tmp_path / "other", count=32, seasons=2, labels=False, seed=1)
    stop_after(7, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(tiny(), pair_store)
    for _ in ("on the way", "at the end"):
        with pytest.raises(config.ConfigError, match=r"\(data.sha256: \w+ there, \w+ now\)"):
            pretrain.run(tiny(), other)
        folder = pretrain.run(tiny(), pair_store)
    state = final(folder)
    del state["settings"]["data.sha256"]  # as runs were before it was noted
    torch.save(state, folder / "final.pt")
    assert pretrain.run(tiny(), other) == folder


def test_a_run_from_before_a_setting_existed_did_what_is_its_default_now(tiny, pair_store, monkeypatch):
    folder = pretrain.run(tiny(), pair_store)
    state = final(folder)
    for name in ("intra", "temperature", "projector"):
        del state["settings"][name]
    torch.save({**state, "settings": {**state["settings"], "projector": [16, 16, 8]}}, folder / "final.pt")
    assert pretrain.run(tiny(), pair_store) == folder
    with pytest.raises(config.ConfigError, match=r"\(intra: True there, False now\)"):
        pretrain.run(tiny(intra=False), pair_store)
    torch.save(state, folder / "final.pt")
    with pytest.raises(config.ConfigError, match=r"\(projector: \[8192, 8192, 8192\] there, \[16, 16, 8\] now\)"):
        pretrain.run(tiny(), pair_store)
    state["settings"] |= {"projector": [16, 16, 8], "gone": 3}
    torch.save(state, folder / "final.pt")
    with pytest.raises(config.ConfigError, match=r"\(gone: 3 there, None now\)"):
        pretrain.run(tiny(), pair_store)


def test_non_finite_loss_names_step_term_and_checkpoint(tiny, pair_store, monkeypatch):
    real, calls = pretrain.loss, []

    def poisoned(*arguments):
        terms = real(*arguments)
        calls.append(1)
        if len(calls) == 5:
            terms = {**terms, "unique": terms["unique"] * float("nan"), "total": terms["total"] * float("nan")}
        return terms

    monkeypatch.setattr(pretrain, "loss", poisoned)
    match = r"terms total = nan, unique = nan at step 5; last good checkpoint: checkpoint-000000003.pt"
    with pytest.raises(pretrain.NonFinite, match=match):
        pretrain.run(tiny(), pair_store)


@pytest.mark.parametrize(("step", "good"), [(6, "checkpoint-000000003.pt"), (16, "checkpoint-000000015.pt")])
def test_weights_that_are_no_numbers_are_not_kept(tiny, pair_store, monkeypatch, step, good):
    real, calls = pretrain.train_step, []

    def diverging(settings, model, *arguments):
        terms = real(settings, model, *arguments)
        calls.append(1)
        if len(calls) == step:  # of a finite loss, an update that overflows
            next(model.parameters()).data.fill_(float("inf"))
        return terms

    monkeypatch.setattr(pretrain, "train_step", diverging)
    with pytest.raises(pretrain.NonFinite, match=rf"weights \S+ = inf at step {step}; last good checkpoint: {good}"):
        pretrain.run(tiny(), pair_store)
    folder = runs.path(tiny(), "pretrain", runs.title(tiny()))
    assert checkpoints.files(folder)[-1].name == good and not (folder / "final.pt").exists()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (pretrain.NonFinite("nan"), pretrain.NonFinite),
        (RuntimeError("2 of 2 processes died without a word"), pretrain.Interrupted),
    ],
)
def test_a_signal_does_not_hide_what_went_wrong(tiny, pair_store, monkeypatch, error, kind):
    def launch(*arguments, tick, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        assert tick() == signal.SIGTERM
        raise error

    monkeypatch.setattr(pretrain.processes, "launch", launch)
    with pytest.raises(kind):
        pretrain.run(tiny(processes=2), pair_store)


def test_two_processes_cannot_share_a_folder(tiny, pair_store):
    settings = tiny()
    folder = runs.path(settings, "pretrain", runs.title(settings))
    with runs.locked(folder), pytest.raises(RuntimeError, match="in use by another process"):
        pretrain.run(settings, pair_store)


def test_a_command_whose_folder_is_in_use_ends_with_a_sentence(tmp_path, pair_store, monkeypatch):
    monkeypatch.setattr(prepare, "pretraining_store", lambda settings: pair_store)
    settings = config.members(config.load("start", {"runs": str(tmp_path)}))[0]
    folder = runs.path(settings, "pretrain", runs.title(settings))
    with runs.locked(folder), pytest.raises(SystemExit, match=f"{folder} is in use by another process; wait for it"):
        pretrain.main(["start", "--set", f"runs={tmp_path}"])


def test_a_command_says_in_a_sentence_what_the_first_steps_show(tmp_path, pair_store, monkeypatch):
    monkeypatch.setattr(prepare, "pretraining_store", lambda settings: pair_store)
    command = ["start", "--set", f"runs={tmp_path}", "sweep={}", "batch_size=8", "epochs=1", "crop_size=20"]
    with pytest.raises(SystemExit, match=r"crop_size = 20; mit_b0 needs 29 or more"):
        pretrain.main([*command, "backbone=mit_b0"])
    with pytest.raises(
        SystemExit, match=r"dim_common = 'auto': 32 of 32 samples .*: expected 64 or more; train longer"
    ):
        pretrain.main([*command, "dim_common=auto"])


def test_batch_larger_than_the_store_is_refused(tiny, pair_store):
    with pytest.raises(config.ConfigError, match=r"batch_size = 64, but .* holds 32 pairs"):
        pretrain.run(tiny(batch_size=64), pair_store)


def test_random_is_the_untrained_network_of_the_same_seed(tiny, pair_store):
    untrained = final(pretrain.run(tiny(method="random"), pair_store))
    settings = tiny()
    torch.manual_seed(settings.seed)
    expected = MultimodalModel(settings.backbone, CHANNELS, settings.projector).state_dict()
    assert all(torch.equal(untrained["model"][k], v) for k, v in expected.items())


TERMS = {
    "decur": {"common", "unique", "intra/sar", "intra/optical"},
    "barlow_twins": set(),
    "barlow_twins_single": set(),
    "vicreg": {"invariance", "variance", "covariance"},
    "clip": {"anchor/sar", "anchor/optical", "scale"},
    "simclr": {"anchor/sar", "anchor/optical"},
}


@pytest.mark.parametrize("method", TERMS)
def test_every_method_goes_through_the_same_loop_with_its_terms_on_record(tiny, pair_store, method):
    folder = pretrain.run(tiny(method=method), pair_store)
    lines = history.read(folder)
    terms = TERMS[method]
    assert len(lines) == 16 and set(lines[0]) == {"step", "learning_rate", "pairs_per_second", "total", *terms}
    for line in lines:
        assert not terms or line["total"] == pytest.approx(sum(line[t] for t in terms - {"scale"}), rel=1e-5)
    torch.manual_seed(0)
    start, end = MultimodalModel("small", CHANNELS, [16, 16, 8]).state_dict(), final(folder)
    changed = {".".join(k.split(".")[:2]) for k, v in start.items() if not torch.equal(end["model"][k], v)}
    single = method == "barlow_twins_single"
    assert changed == {
        f"{part}.{m}" for part in ("backbones", "projectors") for m in (("sar",) if single else CHANNELS)
    }
    assert end["trained"] == (["sar"] if single else ["sar", "optical"])
    assert json.loads((folder / "run.json").read_text())["trained"] == end["trained"]
    assert ("log_scale" in end["model"]) == (method == "clip")


@pytest.mark.parametrize("method", ["random", "supervised"])
def test_rows_without_pretraining_take_no_step(tiny, pair_store, method):
    folder = pretrain.run(tiny(method=method, processes=2), pair_store)
    assert history.read(folder) == [] and final(folder)["trained"] == []
    torch.manual_seed(0)
    start = MultimodalModel("small", CHANNELS, [16, 16, 8]).state_dict()
    assert all(torch.equal(final(folder)["model"][k], v) for k, v in start.items())


def seen(monkeypatch, settings, store) -> set:
    """Which views the network is given in a run."""
    real, keys = pretrain.loss, set()

    def watched(settings, model, views):
        keys.update((m, v) for m, both in views.items() for v, x in zip("ab", both, strict=True) if x is not None)
        return real(settings, model, views)

    monkeypatch.setattr(pretrain, "loss", watched)
    pretrain.run(settings, store)
    monkeypatch.setattr(pretrain, "loss", real)
    return keys


def test_only_what_a_loss_looks_at_is_computed(tiny, pair_store, monkeypatch):
    one_each, second = {("sar", "a"), ("optical", "a")}, {("optical", "a"), ("optical", "b")}
    for overrides, wanted in (
        ({"method": "decur"}, one_each | {("sar", "b"), ("optical", "b")}),
        ({"intra": False, "name": "cross"}, one_each),
        ({"method": "vicreg"}, one_each),
        ({"method": "clip"}, one_each),
        ({"method": "simclr"}, one_each),
        ({"method": "barlow_twins"}, one_each),
        ({"method": "barlow_twins_single", "single": "optical"}, second),
    ):
        assert seen(monkeypatch, tiny(epochs=1, **overrides), pair_store) == wanted, overrides


def test_every_view_has_a_season_of_its_own(tiny, pair_store):
    store = Store(pair_store)
    batches = pretrain.batches(tiny(), store, range(4), torch.device("cpu"))
    drawn = [[], [], [], []]
    for batch in batches:
        assert [*batch] == ["sar", "optical"]
        for k, (v, name) in enumerate(itertools.product((0, 1), batch)):
            stored = {store.read(i, name, s).tobytes(): (i, s) for i in range(32) for s in range(2)}
            drawn[k] += [stored[image.numpy().tobytes()] for image in batch[name][v]]
    for column in drawn:
        assert [i for i, _ in column] == [i for i, _ in drawn[0]] and sorted(i for i, _ in column) == [*range(32)]
    seasons = [tuple(s for _, s in column) for column in drawn]
    assert len(set(seasons)) == 4 and all(5 < sum(s) < 27 for s in seasons)


def test_each_modality_alone_has_a_run_of_its_own(tiny, pair_store):
    first, second = (tiny(method="barlow_twins_single", single=m, epochs=1) for m in CHANNELS)
    assert [runs.title(s) for s in (first, second)] == [
        f"sar_optical-barlow_twins_single_{m}-seed0" for m in ("sar", "optical")
    ]
    assert runs.label(second) == "Barlow Twins, single modality, optical, seed 0"
    ends = [final(pretrain.run(s, pair_store)) for s in (first, second)]
    assert [end["trained"] for end in ends] == [["sar"], ["optical"]]
    assert not same_weights(*ends)
    decur = tiny()
    assert (runs.title(decur), runs.label(decur)) == ("sar_optical-decur-seed0", "DeCUR, seed 0")


def test_a_single_modality_sees_the_views_that_decur_gives_it(tiny, pair_store):
    """The intra-modal term of DeCUR at the first step is the loss of Barlow Twins on one modality."""
    decur = history.read(pretrain.run(tiny(epochs=1), pair_store))[0]
    for m in CHANNELS:
        settings = tiny(method="barlow_twins_single", single=m, epochs=1)
        alone = history.read(pretrain.run(settings, pair_store))[0]
        assert alone["total"] == pytest.approx(decur[f"intra/{m}"], rel=1e-5)


def test_without_both_of_its_parts_decur_is_cross_modal_barlow_twins(tiny, pair_store):
    without = pretrain.run(tiny(intra=False, decoupling=False, name="neither"), pair_store)
    barlow_twins = pretrain.run(tiny(method="barlow_twins"), pair_store)
    for a, b in zip(*map(history.read, (without, barlow_twins)), strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=1e-5)
        assert a["unique"] == a["intra/sar"] == a["intra/optical"] == 0
    one, two = final(without)["model"], final(barlow_twins)["model"]
    for k, v in one.items():
        torch.testing.assert_close(two[k], v, rtol=1e-3, atol=1e-5)
    coupled = history.read(pretrain.run(tiny(decoupling=False, name="coupled", epochs=1), pair_store))
    assert coupled[0]["unique"] == 0 < coupled[0]["intra/sar"]


def test_without_projector_the_features_are_trained(tiny, pair_store):
    end = final(pretrain.run(tiny(projector=[], dim_common=112, epochs=1), pair_store))
    assert not [k for k in end["model"] if k.startswith("projector")]
    with pytest.raises(config.ConfigError, match="dim_common = 129 is more than the width of small; allowed: 0 to 128"):
        pretrain.run(tiny(projector=[], dim_common=129, name="wide"), pair_store)
    pretrain.run(tiny(projector=[], dim_common=129, method="barlow_twins", epochs=1), pair_store)  # has no such part


def test_a_shared_projector_is_trained_by_both(tiny, pair_store):
    end = final(pretrain.run(tiny(shared_projector=True, epochs=1), pair_store))["model"]
    assert all(
        torch.equal(v, end[k.replace("sar", "optical")]) for k, v in end.items() if k.startswith("projectors.sar")
    )
    alone = tiny(shared_projector=True, method="barlow_twins_single", single="optical", epochs=1)
    torch.manual_seed(0)
    start = pretrain.network(alone, CHANNELS).state_dict()
    end = final(pretrain.run(alone, pair_store))["model"]
    assert not torch.equal(end["projectors.sar.0.weight"], start["projectors.sar.0.weight"])
    assert all(torch.equal(v, end[k]) for k, v in start.items() if k.startswith("backbones.sar"))


def test_the_temperature_is_learnt_saved_and_resumed(tiny, pair_store, monkeypatch):
    rates = {"method": "clip", "learning_rate_biases": 0.05}
    folder = pretrain.run(tiny(name="whole", **rates), pair_store)
    scales = [line["scale"] for line in history.read(folder)]
    assert scales[0] == pytest.approx(1 / 0.07) and len({round(s, 6) for s in scales}) == 16
    calls = stop_after(7, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(tiny(name="stopped", **rates), pair_store)
    resumed = pretrain.run(tiny(name="stopped", **rates), pair_store)
    assert len(calls) == 16 and same_weights(final(folder), final(resumed))


def test_layers_that_draw_resume_exactly(tiny, pair_store, monkeypatch):
    """Such as the stochastic depth of Mix Transformers."""
    real = backbones.build

    def with_dropout(name, channels):
        network, features = real(name, channels)
        return torch.nn.Sequential(network, torch.nn.Dropout(0.5)), features

    monkeypatch.setattr(backbones, "build", with_dropout)
    whole = final(pretrain.run(tiny(name="whole"), pair_store))
    stop_after(7, monkeypatch)
    with pytest.raises(pretrain.Interrupted):
        pretrain.run(tiny(name="stopped"), pair_store)
    assert same_weights(whole, final(pretrain.run(tiny(name="stopped"), pair_store)))
    assert not same_weights(whole, final(pretrain.run(tiny(name="other", seed=1), pair_store)))


def test_a_store_of_another_preprocessing_is_refused(tiny, pair_store, monkeypatch):
    other = dataclasses.replace(SAR, mean=(-10.0, -17.0))
    monkeypatch.setattr(datasets, "modalities_of", lambda pair: (other, OPTICAL))
    with pytest.raises(ValueError, match="sar was converted with another preprocessing"):
        pretrain.run(tiny(), pair_store)


def test_a_sensor_that_is_declared_otherwise_since_it_was_measured_is_refused(tiny, tmp_path, monkeypatch):
    sensor = Modality(name="sar", bands=("VV", "VH"), unit="dB", valid_range=(-99, 99))
    mapped = dataclasses.replace(sensor, scheme="range_8bit", low=(-30, -30), high=(0, 0))
    store = make_store(tmp_path / "store", count=16, seasons=1, labels=False, modalities=(mapped, OPTICAL))
    monkeypatch.setattr(datasets, "modalities_of", lambda pair: (sensor, OPTICAL))
    pretrain.run(tiny(epochs=1), store)
    for change in ({"copies": 2}, {"bands": ("VH", "VV")}):  # the run would silently be that of the old declaration
        other = dataclasses.replace(sensor, **change)
        monkeypatch.setattr(datasets, "modalities_of", lambda pair, other=other: (other, OPTICAL))
        with pytest.raises(ValueError, match="sar was converted with another preprocessing"):
            pretrain.run(tiny(epochs=1, name="again"), store)


@pytest.mark.soak
def test_compiled_backbones_train_the_same_run_within_rounding(tiny, pair_store):
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    plain = history.read(pretrain.run(tiny(name="plain"), pair_store))
    folder = pretrain.run(tiny(name="compiled", compile="default"), pair_store)
    compiled = history.read(folder)
    assert [line["step"] for line in compiled] == [line["step"] for line in plain]
    assert compiled[0]["total"] == pytest.approx(plain[0]["total"], rel=1e-4)
    assert set(final(folder)["model"]) == set(MultimodalModel("small", CHANNELS, [16, 16, 8]).state_dict())


def test_members_of_a_sweep_are_shared_out_between_jobs(monkeypatch, pair_store):
    settings = config.load("start", {"sweep": {"dim_common": [8, 16, 24], "seed": [0, 1]}})
    seen: list[str] = []
    monkeypatch.setattr(pretrain, "run", lambda member, store: seen.append(runs.title(member)) or Path("x"))
    everything = [runs.title(member) for member in config.members(settings)]
    for part in range(4):
        pretrain.run_members(settings, pair_store, shard=(part, 4))
    assert sorted(seen) == sorted(everything) and seen[:2] == everything[0::4]
    assert seen == sum((everything[k::4] for k in range(4)), [])


@pytest.mark.parametrize("shard", ["1", "2/2", "a/b", "-1/2", "1/2/3"])
def test_a_shard_that_cannot_be_is_refused_before_any_work(capsys, shard):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["start", f"--shard={shard}"])
    assert stop.value.code == 2 and "expected I/N with I from 0 to N - 1" in capsys.readouterr().err


def test_a_signal_in_the_last_step_of_a_member_stops_the_sweep_before_the_next(tiny, pair_store, monkeypatch):
    settings, calls = tiny(sweep={"seed": [0, 1, 2]}), stop_after(16, monkeypatch)
    with pytest.raises(pretrain.Interrupted, match="SIGTERM: 1 of 3 runs are finished"):
        pretrain.run_members(settings, pair_store)
    assert len(calls) == 16
    assert len(pretrain.run_members(settings, pair_store)) == 3 and len(calls) == 48
    assert not runs._listening and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_a_member_is_set_up_stops_it_after_its_first_step(tiny, pair_store, monkeypatch):
    settings, real = tiny(sweep={"seed": [0, 1]}), pretrain.network

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments)

    monkeypatch.setattr(pretrain, "network", signalled)
    with pytest.raises(pretrain.Interrupted, match="SIGUSR1 after step 1 of 16"):
        pretrain.run_members(settings, pair_store)


def test_a_signal_at_the_very_end_of_a_sweep_is_not_swallowed(tiny, pair_store, monkeypatch):
    settings, real = tiny(sweep={"seed": [0]}, checkpoint_steps=100), checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *a: real(*a) or os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(pretrain.Interrupted, match="SIGINT: 1 of 1 runs are finished"):
        pretrain.run_members(settings, pair_store)
    monkeypatch.setattr(checkpoints, "save", lambda *a: pytest.fail("trained again"))
    assert len(pretrain.run_members(settings, pair_store)) == 1


@pytest.mark.parametrize("shard", [(3, 3), (-1, 2), (0, 0)])
def test_a_part_of_a_sweep_that_cannot_be_is_refused(pair_store, shard):
    with pytest.raises(config.ConfigError, match="expected I/N with I from 0 to N - 1"):
        pretrain.run_members(config.load("start"), pair_store, shard=shard)
