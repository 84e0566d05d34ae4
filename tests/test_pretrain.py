"""The loop: every step on record, exact resume after any death, refusals before any compute is spent."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from decur_core import config, pretrain, runs

ROOT = Path(__file__).resolve().parents[1]


def final(folder: Path) -> dict:
    return torch.load(folder / "final.pt", weights_only=True)


def same_weights(a: dict, b: dict) -> bool:
    assert a["model"].keys() == b["model"].keys()
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_history_has_every_step_once_with_all_terms(tiny, pair_store):
    settings = tiny(log_steps=5)
    lines = runs.read_history(pretrain.run(settings, pair_store))
    assert [line["step"] for line in lines] == list(range(1, 17))
    for k, line in enumerate(lines):
        assert line["total"] == pytest.approx(sum(line[t] for t in ("common", "unique", "intra1", "intra2")), rel=1e-5)
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


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_stop_signal_writes_a_checkpoint_and_resume_is_exact(tiny, pair_store, monkeypatch, optimizer):
    whole = final(pretrain.run(tiny(name="whole", optimizer=optimizer), pair_store))
    settings = tiny(name="stopped", optimizer=optimizer)
    real, calls = pretrain._loss, []

    def signal_in_step_7(*arguments):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(pretrain, "_loss", signal_in_step_7)
    with pytest.raises(pretrain.Interrupted, match=r"SIGTERM after step 7 of 16"):
        pretrain.run(settings, pair_store)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    assert sorted(p.name for p in folder.glob("checkpoint-*"))[-1] == "checkpoint-000000007.pt"
    resumed = pretrain.run(settings, pair_store)
    assert len(calls) == 16, "steps before the checkpoint must not be computed again"
    assert same_weights(whole, final(resumed))
    assert [line["step"] for line in runs.read_history(resumed)] == list(range(1, 17))


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
        while process.poll() is None and len(runs.read_history(folder)) < after:
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
    assert [line["step"] for line in runs.read_history(folder)] == list(range(1, 4 * epochs + 1))


def test_killed_run_ends_bit_for_bit_where_an_uninterrupted_one_ends(tmp_path, pair_store, tiny):
    check_kills(tmp_path, pair_store, tiny, kills=1, epochs=20, seed=0)


@pytest.mark.soak
def test_twenty_kills(tmp_path, pair_store, tiny):
    check_kills(tmp_path, pair_store, tiny, kills=20, epochs=200, seed=1)


def test_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tiny, pair_store, monkeypatch, capsys):
    settings = tiny(name="damaged")
    whole = final(pretrain.run(tiny(name="whole"), pair_store))
    real, calls = pretrain._loss, []

    def die_in_step_8(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyError("stop here")
        return real(*arguments)

    monkeypatch.setattr(pretrain, "_loss", die_in_step_8)
    with pytest.raises(KeyError):
        pretrain.run(settings, pair_store)
    monkeypatch.setattr(pretrain, "_loss", real)
    newest = runs.path(settings, "pretrain", runs.title(settings)) / "checkpoint-000000006.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    folder = pretrain.run(settings, pair_store)
    said = capsys.readouterr().out
    assert "checkpoint-000000006.pt cannot be read" in said and "resumes after step 3" in said
    assert same_weights(whole, final(folder))


def test_full_disk_is_reported_and_the_run_goes_on(tiny, pair_store, monkeypatch, capsys):
    real = pretrain._save

    def full(state, file):
        if file.name.startswith("checkpoint"):
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(pretrain, "_save", full)
    folder = pretrain.run(tiny(), pair_store)
    assert "checkpoint not written" in capsys.readouterr().out
    assert (folder / "final.pt").exists()


def test_other_settings_refuse_to_resume_and_are_named(tiny, pair_store):
    pretrain.run(tiny(), pair_store)
    with pytest.raises(config.ConfigError, match="holds a run with other settings") as error:
        pretrain.run(tiny(lambd=0.02, epochs=5), pair_store)
    assert "epochs: 4 there, 5 now" in str(error.value) and "lambd: 0.015625 there, 0.02 now" in str(error.value)


def test_non_finite_loss_names_step_term_and_checkpoint(tiny, pair_store, monkeypatch):
    real, calls = pretrain._loss, []

    def poisoned(*arguments):
        terms = real(*arguments)
        calls.append(1)
        if len(calls) == 5:
            terms = {**terms, "unique": terms["unique"] * float("nan"), "total": terms["total"] * float("nan")}
        return terms

    monkeypatch.setattr(pretrain, "_loss", poisoned)
    with pytest.raises(pretrain.NonFinite, match=r"nan at step 5; last good checkpoint: checkpoint-000000003.pt"):
        pretrain.run(tiny(), pair_store)


def test_two_processes_cannot_share_a_folder(tiny, pair_store):
    settings = tiny()
    folder = runs.path(settings, "pretrain", runs.title(settings))
    with runs.locked(folder), pytest.raises(RuntimeError, match="in use by another process"):
        pretrain.run(settings, pair_store)


def test_batch_larger_than_the_store_is_refused(tiny, pair_store):
    with pytest.raises(config.ConfigError, match=r"batch_size = 64, but .* holds 32 pairs"):
        pretrain.run(tiny(batch_size=64), pair_store)


def test_random_is_the_untrained_network_of_the_same_seed(tiny, pair_store):
    untrained = final(pretrain.run(tiny(method="random"), pair_store))
    settings = tiny()
    torch.manual_seed(settings.seed)
    expected = pretrain.MultimodalModel(settings.backbone, [2, 13], settings.projector).state_dict()
    assert all(torch.equal(untrained["model"][k], v) for k, v in expected.items())


def test_barlow_twins_runs_through_the_same_loop(tiny, pair_store):
    folder = pretrain.run(tiny(method="barlow_twins"), pair_store)
    lines = runs.read_history(folder)
    assert len(lines) == 16 and set(lines[0]) == {"step", "learning_rate", "pairs_per_second", "total"}


def test_a_store_of_another_preprocessing_is_refused(tiny, pair_store, monkeypatch):
    sar, optical = pretrain.PAIRS["sar_optical"]
    other = dataclasses.replace(sar, preprocessing=dataclasses.replace(sar.preprocessing, mean=(-10.0, -17.0)))
    monkeypatch.setitem(pretrain.PAIRS, "sar_optical", (other, optical))
    with pytest.raises(ValueError, match="sar was converted with another preprocessing"):
        pretrain.run(tiny(), pair_store)


@pytest.mark.soak
def test_compiled_backbones_train_the_same_run_within_rounding(tiny, pair_store):
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    plain = runs.read_history(pretrain.run(tiny(name="plain"), pair_store))
    folder = pretrain.run(tiny(name="compiled", compile="default"), pair_store)
    compiled = runs.read_history(folder)
    assert [line["step"] for line in compiled] == [line["step"] for line in plain]
    assert compiled[0]["total"] == pytest.approx(plain[0]["total"], rel=1e-4)
    assert set(final(folder)["model"]) == set(pretrain.MultimodalModel("small", [2, 13], [16, 16, 8]).state_dict())
