"""What surrounds the work: foreign repositories and variables, full and read-only disks, files that are not what their
names say. The environment's faults are named and never taken for the data's.
"""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decur_core import config, pretrain, run
from decur_core.data.geonrw import GeoNRW
from decur_core.data.raster import DataError
from decur_core.data.ssl4eo import SSL4EOS12
from decur_core.running import checkpoints, processes
from decur_core.running import folders as runs
from decur_core.transfer import evaluation as transfer
from decur_core.transfer import fitting

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def git(folder: Path, *command: str) -> str:
    about = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *about, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of this shape, taken for the library's own; no commit in it yet."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    for name in list(os.environ):
        if name.startswith("GIT_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "outer" / "my work"
    for name in ("decur_core/config.py", "notebooks/10_x.ipynb", "book/results.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    monkeypatch.setattr(config, "ROOT", folder)
    return folder


def committed(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    return git(folder, "rev-parse", "--short=12", "HEAD")


def test_the_commit_is_that_of_this_tree_and_new_files_count(tree):
    assert runs.commit() == ("unknown", False)
    commit = committed(tree)
    assert runs.commit() == (commit, False)
    (tree / "book" / "results.md").write_text("results do not count")
    (tree / "notes.txt").write_text("nor does what lies beside")
    assert runs.commit() == (commit, False)
    for new in ("decur_core/mine.py", "decur_core/data/deep/mine.py", "notebooks/profiles/mine.yaml"):
        (tree / new).parent.mkdir(parents=True, exist_ok=True)
        (tree / new).write_text("x")
        assert runs.commit() == (commit, True)
        (tree / new).unlink()
    git(tree, "config", "status.showUntrackedFiles", "no")
    (tree / "decur_core" / "mine.py").write_text("x")
    assert runs.commit() == (commit, True)
    (tree / "decur_core" / "mine.py").unlink()
    (tree / "decur_core" / "config.py").write_text("y")
    assert runs.commit() == (commit, True)


@pytest.mark.parametrize("tracked", [False, True])
def test_a_commit_of_another_repository_is_none(tree, tracked):
    (tree.parent / "theirs").write_text("x")
    git(tree.parent, "init", "-q")
    git(tree.parent, "add", "." if tracked else "theirs")
    git(tree.parent, "commit", "-qm", "x")
    assert git(tree, "rev-parse", "HEAD") and runs.commit() == ("unknown", False)


def test_a_repository_without_this_library_is_another_one(tree):
    git(tree, "init", "-q")
    git(tree, "add", "book")
    git(tree, "commit", "-qm", "x")
    assert runs.commit() == ("unknown", False)


def test_variables_of_git_do_not_lead_elsewhere(tree, tmp_path, monkeypatch):
    commit = committed(tree)
    (other := tmp_path / "other").mkdir()
    (other / "decur_core").mkdir()
    (other / "decur_core" / "config.py").write_text("other")
    assert committed(other) != commit
    variables = {"GIT_DIR": other / ".git", "GIT_WORK_TREE": other, "GIT_INDEX_FILE": tmp_path / "none"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert runs.commit() == (commit, False)
    (tree / "decur_core" / "new.py").write_text("x")
    assert runs.commit() == (commit, True)


def saved(path: Path, content, **options) -> Path:
    torch.save(content, path, **options)
    return path


class Unknown:
    pass


STATE = {"model": {"a.weight": torch.arange(3000.0)}, "epoch": 3}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty; download it again"),
        (b"\n <!DOCTYPE html>\n<html></html>", r"is a web page \(HTML or XML\), not weights; download the file itself"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error>', "is a web page"),
        (LFS.encode(), "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"),
        (b'{"error": "quota"}', r"is text \(JSON\), not weights; read what it says"),
        (b"\x1f\x8b\x08\x00rest", "is compressed by gzip; unpack it first"),
        (b"404: Not Found\n", r"is no file of torch.save, it begins with b'404: Not Found\\n'; download it again"),
        (
            pickle.dumps({"a": 1}, protocol=2),
            "is no file of torch.save, it begins with .*save its tensors with torch.save",
        ),
        (bytes(range(1, 100)), "is no file of torch.save, it begins with"),
    ],
)
def test_what_is_not_weights_is_named_with_the_way_out(tmp_path, content, reason):
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{file}: {reason}"):
        checkpoints.read_weights(file)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_are_cut_or_changed_are_damaged_at_every_place(tmp_path, zipped):
    whole = saved(tmp_path / "a.pth", STATE, _use_new_zipfile_serialization=zipped).read_bytes()
    assert checkpoints.read_weights(tmp_path / "a.pth")["epoch"] == 3
    for length in (*range(2, 40), 100, 300, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        (tmp_path / "a.pth").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is cut short or damaged; download it again \(\w+: "):
            checkpoints.read_weights(tmp_path / "a.pth")
    if zipped:  # the older form has no checksum
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        (tmp_path / "a.pth").write_bytes(changed)
        with pytest.raises(ValueError, match=r"damaged; download it again \(BadZipFile: the checksum of"):
            checkpoints.read_weights(tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:.*TorchScript archive", "ignore:.*torch.jit.script")
def test_more_or_less_than_weights_is_named(tmp_path):
    file = tmp_path / "a.pth"
    for zipped in (True, False):
        saved(file, STATE | {"args": Unknown()}, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="more than tensors, .*can run code; if you trust it, .*Unknown was not"):
            checkpoints.read_weights(file)
    with pytest.raises(ValueError, match="holds a Tensor; expected a dict"):
        checkpoints.read_weights(saved(file, torch.ones(3)))
    torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    with pytest.raises(ValueError, match="is a TorchScript program, not weights; open it with torch.jit.load"):
        checkpoints.read_weights(file)
    shutil.make_archive(str(tmp_path / "b"), "zip", tmp_path, "a.pth")
    with pytest.raises(ValueError, match=r"is a zip archive that torch.save did not write; it holds a.pth; unpack it"):
        checkpoints.read_weights(tmp_path / "b.zip")
    with pytest.raises(FileNotFoundError, match="absent"):
        checkpoints.read_weights(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        checkpoints.read_weights(tmp_path)


def test_a_lack_of_the_machine_is_not_taken_for_damage(tiny, pair_store, monkeypatch):
    """Else a sound checkpoint would be passed over for an older one, or called one to remove."""
    settings = tiny(epochs=1)
    folder = pretrain.run(settings, pair_store)
    lacks = {
        PermissionError: PermissionError(13, "Permission denied"),
        OSError: OSError(24, "Too many open files"),
        MemoryError: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    }
    for kind, error in lacks.items():

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fails)
        with pytest.raises(kind) as caught:
            pretrain.run(settings, pair_store)
        assert not isinstance(caught.value, checkpoints.Damaged) and "remove" not in str(caught.value)
        shutil.copy(folder / "final.pt", folder / "checkpoint-000000003.pt")
        with pytest.raises(kind):
            checkpoints.newest(folder, {})
        (folder / "checkpoint-000000003.pt").unlink()


def test_only_checkpoints_and_halves_of_files_that_are_ours_are_removed(tiny, pair_store):
    settings = tiny(epochs=1)
    folder = runs.path(settings, "pretrain", runs.title(settings))
    folder.mkdir(parents=True)
    theirs = [".notes.2024", "checkpoint-best.pt", "checkpoint-000000003 copy.pt", ".nfs.0001", ".final.pt.old.2"]
    ours = [".final.pt.4711", ".run.json.1", ".split.json.5", ".history.jsonl.22", ".checkpoint-000000003.pt.9"]
    for name in theirs + ours:
        (folder / name).write_text("x")
    pretrain.run(settings, pair_store)
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        [*theirs, ".lock", "final.pt", "history.jsonl", "run.json"]
    )


@contextlib.contextmanager
def read_only(folder: Path):
    """As a mount that nothing can be written to; the superuser needs a real one."""
    if os.geteuid():
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
        for path in modes:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        return
    bind = subprocess.run(["mount", "--bind", folder, folder], capture_output=True)
    if bind.returncode:
        pytest.skip("no right to mount here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_finished_run_is_read_where_nothing_can_be_written(tiny, pair_store):
    settings = tiny(epochs=1)
    folder = pretrain.run(settings, pair_store)
    (folder / ".lock").unlink()
    shutil.copy(folder / "final.pt", left := folder / "checkpoint-000000002.pt")  # by a kill right after the end
    with read_only(folder):
        with pytest.raises(OSError):
            (folder / "x").write_text("x")
        assert pretrain.run(settings, pair_store) == folder
        with pytest.raises(config.ConfigError, match="holds a run with other settings"):
            pretrain.run(tiny(epochs=2), pair_store)
    assert left.exists() and not (folder / ".lock").exists()
    assert pretrain.run(settings, pair_store) == folder and not left.exists()


def test_a_finished_run_is_read_by_a_process_while_another_holds_it(tiny, pair_store):
    settings = tiny(epochs=1)
    folder = pretrain.run(settings, pair_store)
    with runs.locked(folder):
        assert pretrain.run(settings, pair_store) == folder


def test_an_evaluation_goes_on_when_its_checkpoint_finds_no_room(tiny, pair_store, patch_stores, monkeypatch, capsys):
    settings = tiny(epochs=1, **{"transfer.epochs": 4, "transfer.milestones": [3], "transfer.batch_size": 16})
    folder = pretrain.run(settings, pair_store)
    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0.0)

    def full(state, file):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(checkpoints, "save", full)
    record = transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    said = capsys.readouterr().out
    assert said.count("checkpoint not written ([Errno 28] No space left on device") == 3 and ", epoch 2: " in said
    monkeypatch.undo()
    (file,) = runs.path(settings, "records").glob("*.json")
    file.unlink()
    again = transfer.evaluate(settings, folder, patch_stores, protocol="linear")
    assert [again[k] for k in ("micro", "per_class")] == [record[k] for k in ("micro", "per_class")]


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"RANK": "0"}, r"has \{'RANK': '0'\}, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with torchrun"),
        ({**WHOLE, "RANK": ""}, "but no RANK"),
        ({**WHOLE, "RANK": "first"}, "'RANK': 'first'.*expected whole numbers, RANK below WORLD_SIZE"),
        ({**WHOLE, "RANK": "2"}, "RANK below WORLD_SIZE"),
        ({**WHOLE, "MASTER_PORT": "http"}, "expected whole numbers"),
    ],
)
def test_a_part_of_what_a_launcher_sets_is_named(monkeypatch, variables, reason):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(config.ConfigError, match=reason), processes.joined(CPU):
        pytest.fail("joined nobody")
    with pytest.raises(SystemExit, match=reason):
        pretrain.main(["start", "--set", "device=cpu"])


def test_a_gpu_is_asked_for_by_every_process_of_a_node(monkeypatch):
    for name, value in {**WHOLE, "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(config.ConfigError, match=r"LOCAL_RANK = 3, but torch sees 2 GPUs; .*--nproc-per-node 2"):
        processes._check_launcher(torch.device("cuda"))
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(config.ConfigError, match="but no LOCAL_RANK"):
        processes._check_launcher(torch.device("cuda"))


@pytest.mark.parametrize("given", ["mine.yaml", "./profiles/../mine.yaml", "absolute"])
def test_a_profile_of_another_folder_reaches_the_kernel(tmp_path, monkeypatch, given):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "mine.yaml").write_text(f"epochs: 3\nruns: {tmp_path / 'runs'}\n")
    asked = []
    monkeypatch.setattr(run, "run", lambda paths, **options: asked.append(options) or 0)
    monkeypatch.chdir(tmp_path)
    assert run.main([str(tmp_path / "mine.yaml") if given == "absolute" else given, "10"]) == 0
    monkeypatch.chdir(config.ROOT)  # where a kernel starts
    (options,) = asked
    assert config.load(options["profile"], options["overrides"]).epochs == 3
    assert options["profile"] == str(tmp_path / "mine.yaml")


def test_a_profile_of_the_repository_reaches_the_kernel_without_a_path_of_this_machine(monkeypatch):
    monkeypatch.chdir(config.ROOT / "notebooks")
    assert run.from_root("profiles/start.yaml") == "notebooks/profiles/start.yaml"
    assert run.from_root("start") == "start"


def places(root: Path, names: str) -> Path:
    for folder in ("s1", "s2c"):
        for name in names:
            (root / folder / name).mkdir(parents=True)
    return root


def test_places_whose_links_lead_nowhere_are_counted(tmp_path):
    root = places(tmp_path / "root", "abc")
    for folder in ("s1", "s2c"):
        for name in "xy":
            (root / folder / name).symlink_to(tmp_path / "gone" / name)
        (root / folder / "._b").mkdir()
        (root / folder / "linked").symlink_to(root / folder / "a")
    with pytest.warns(UserWarning) as said:
        assert SSL4EOS12(root).ids == ["a", "b", "c", "linked"]
    for folder, one in zip(("s1", "s2c"), said, strict=True):
        what = "3 of */ are left out, hidden or links to what is gone, first"
        assert str(one.message) == f"{root / folder}: {what} {root / folder / '._b'}"

    (tmp_path / "geonrw" / "aachen").mkdir(parents=True)
    (tmp_path / "geonrw" / "bonn").symlink_to(tmp_path / "gone")
    with (
        pytest.warns(UserWarning, match="1 of .* links to what is gone, .*bonn"),
        pytest.raises(DataError, match="no files"),
    ):
        GeoNRW(tmp_path / "geonrw")


def test_links_that_lead_nowhere_are_counted_at_every_depth(tmp_path):
    (tmp_path / "scene" / "patch").mkdir(parents=True)
    (tmp_path / "scene" / "lost").symlink_to(tmp_path / "gone")
    (tmp_path / "another").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("x")
    with pytest.warns(UserWarning, match="2 of .* links to what is gone, first .*another"):
        assert runs.visible(tmp_path, "*/*/") == [tmp_path / "scene" / "patch"]


def test_records_of_other_programs_stay_out_of_the_book(tmp_path):
    runs.write_json(tmp_path / "a.json", {"name": "", "micro": 1})
    (tmp_path / "._a.json").write_bytes(b"\x00\x05\x16\x07")
    runs.publish_records(tmp_path, tmp_path / "out" / "records.json")
    assert json.loads((tmp_path / "out" / "records.json").read_text()) == [{"name": "", "micro": 1}]


def test_records_of_chapters_that_did_not_run_here_stay_in_the_book(tmp_path):
    """Runs lie in ignored folders, and may be on another machine than the one that makes a chapter anew."""
    target, here = tmp_path / "out" / "records.json", tmp_path / "here"
    for folder, evaluations in ((tmp_path / "there", {"a": 1, "c": 2}), (here, {"b": 3, "c": 4})):
        for name, micro in evaluations.items():
            runs.write_json(folder / f"{name}.json", {"evaluation": name, "name": "", "micro": micro})
        runs.publish_records(folder, target)
    assert {r["evaluation"]: r["micro"] for r in json.loads(target.read_text())} == {"a": 1, "b": 3, "c": 4}
    before = target.read_bytes()
    runs.publish_records(tmp_path / "none", target)
    assert target.read_bytes() == before


def test_other_systems_are_told_where_the_library_runs():
    code = "import sys; sys.modules['fcntl'] = None; import decur_core"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ImportError: decur_core runs on Linux and macOS; on Windows, use it inside WSL 2\n")
    assert "need Linux or macOS (on Windows: WSL 2)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("number", ["20", "21", "22"])
def test_a_loss_that_does_not_fall_ends_a_notebook_with_a_sentence(number):
    (path,) = run.find([number], ROOT / "notebooks")
    sources = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    (check,) = (source for source in sources if "assert lowest" in source)
    lines = [{"total": 5.0, "pairs_per_second": 1.0}, {"total": 7.0, "pairs_per_second": 1.0}]
    sentence = "DeCUR: at the first step the loss is 5, at its lowest 5; expected it to fall. Set more epochs"
    with pytest.raises(AssertionError, match=sentence):
        exec(check, {"trained": {"DeCUR": lines}})
    exec(check, {"trained": {"DeCUR": lines[::-1]}})
