"""The workflows of GitHub: when they run, what they may do, and that they run the commands of the README."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {path.stem: yaml.load(path.read_text(), yaml.BaseLoader) for path in FILES}  # BaseLoader: "on" is a key


def steps(name: str) -> list[str]:
    """What the jobs of a workflow do, in order: commands, and actions with their versions."""
    jobs = WORKFLOWS[name]["jobs"].values()
    return [step.get("run") or step["uses"] for job in jobs for step in job["steps"]]


def first(found: list[str], part: str) -> int:
    return next(i for i, step in enumerate(found) if part in step)


def test_changes_are_checked_and_tags_published():
    assert {name: workflow["on"] for name, workflow in WORKFLOWS.items()} == {
        "check": {"pull_request": ""},
        "publish": {"push": {"tags": ["v*"]}},
    }


def test_only_the_deployment_may_write():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
    granted = {(name, job): of.get("permissions") for name, w in WORKFLOWS.items() for job, of in w["jobs"].items()}
    assert granted == {
        ("check", "check"): None,
        ("publish", "book"): {"contents": "read", "pages": "read"},
        ("publish", "pages"): {"pages": "write", "id-token": "write"},
    }
    assert not any("secrets." in path.read_text() for path in FILES)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_github_s_own_of_a_pinned_version(name):
    uses = [step for step in steps(name) if step.startswith("actions/")]
    assert uses and all(re.fullmatch(r"actions/[a-z-]+@v\d+", step) for step in uses)
    assert all("uses" not in s or s["uses"] in uses for job in WORKFLOWS[name]["jobs"].values() for s in job["steps"])
    assert all(int(job["timeout-minutes"]) > 0 for job in WORKFLOWS[name]["jobs"].values())


@pytest.mark.parametrize("name", WORKFLOWS)
def test_make_targets_are_those_of_the_readme(name):
    called = [target for step in steps(name) for target in re.findall(r"^make (\w+)$", step, re.M)]
    assert called == {"check": ["test", "book", "look"], "publish": ["book", "look"]}[name]
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in called:
        assert re.search(rf"^make {target}\b", readme, re.M) and re.search(rf"^{target}:", makefile, re.M)


@pytest.mark.parametrize(("name", "upload"), [("check", "upload-artifact"), ("publish", "upload-pages-artifact")])
def test_the_book_is_looked_at_before_it_is_kept(name, upload):
    found = steps(name)
    order = [first(found, part) for part in ("apt-get install", "make book", "make look", f"/{upload}@")]
    assert order == sorted(order)
    kept = [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"] if f"/{upload}@" in str(step)]
    assert [step["with"]["path"] for step in kept] == ["_build/html"]


def test_pages_are_deployed_after_the_build():
    jobs = WORKFLOWS["publish"]["jobs"]
    assert jobs["pages"]["needs"] == "book" and jobs["pages"]["environment"]["name"] == "github-pages"
    assert steps("publish")[-1].startswith("actions/deploy-pages@")
