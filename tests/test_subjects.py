"""The runner of the published packages; the packages themselves run in `.ci/run`, which calls it."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

# Stands in for the folder beside the project: the same command line, the same answers, made-up subjects.
DRIVER = """
import json, sys, time
if sys.argv[1] == "--list":
    print("calm a==1 b\\ngreedy a==1\\nstuck a==2")
elif sys.argv[1] == "stuck":
    time.sleep(600)
elif sys.argv[1] == "broken":
    raise RuntimeError("no such attribute")
else:
    calm = sys.argv[1] == "calm"
    print("noise on stdout")
    said = {"retained": 100 if calm else 1000, "hazard": "fine", "bounded": calm, "hazard_ok": True}
    print(json.dumps(said))
    sys.exit(0 if calm else 1)
"""


@pytest.fixture(scope="module")
def subjects(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("subjects", project_root / "tools" / "subjects.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["subjects"] = module  # dataclasses look the module up by its name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.py").write_text(DRIVER)
    return tmp_path


def test_without_the_folder_it_says_so_and_succeeds(
    subjects: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine without the subjects is no failure."""
    code = subjects.main(["--ci", "--folder", str(tmp_path / "absent"), "--envs", str(tmp_path / "envs")])

    assert 0 == code
    assert capsys.readouterr().out.startswith("skipped: ")
    assert not (tmp_path / "envs").exists()


def test_an_unknown_name_is_refused_with_the_names_there_are(
    subjects: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typing error does not pass for success."""
    with pytest.raises(SystemExit) as caught:
        subjects.main(["clam", "--folder", str(folder)])

    assert 2 == caught.value.code
    assert "no subject named clam; there are: calm, greedy, stuck" in capsys.readouterr().err


def test_a_bounded_subject_passes(subjects: ModuleType, folder: Path) -> None:
    """What it retained comes from its last line, whatever it printed before."""
    outcome = subjects.run("calm", sys.executable, folder)

    assert outcome.passed
    assert 100 == outcome.retained


@pytest.mark.parametrize(("name", "said"), [("greedy", "hazard: 'fine'"), ("broken", "no such attribute")])
def test_a_failing_subject_is_told_with_its_reason(subjects: ModuleType, folder: Path, name: str, said: str) -> None:
    """A leak, and a driver that raises, fail the run and say why."""
    outcome = subjects.run(name, sys.executable, folder)

    assert not outcome.passed
    assert said in outcome.failure


def test_a_subject_that_hangs_fails(subjects: ModuleType, folder: Path) -> None:
    """Nothing waits for ever."""
    outcome = subjects.run("stuck", sys.executable, folder, timeout=0.5)

    assert not outcome.passed
    assert "still running" in outcome.failure


def test_the_table_names_who_failed_and_why(subjects: ModuleType) -> None:
    """One line each, the reasons below, and a count."""
    calm = subjects.Outcome("calm", 0.5, 100, bounded=True, hazard_ok=True)
    lost = subjects.Outcome("lost", failure="cannot be installed")

    lines = subjects.table([calm, lost]).splitlines()

    assert ["calm", "100", "yes", "yes", "0.5"] == lines[1].split()
    assert ["lost", "-", "NO", "NO", "0.0"] == lines[2].split()
    assert ["lost failed:", "cannot be installed"] == lines[4:6]
    assert "1 of 2 subjects passed" == lines[-1]


def test_what_installs_together_shares_an_environment(subjects: ModuleType) -> None:
    """One environment is made, not one per subject."""
    made = []

    def install(needs: frozenset[str]) -> str:
        made.append(needs)
        return "python"

    shared = dict(subjects.share({"calm": ["a==1", "b"], "greedy": ["a==1"]}, install))

    assert {"calm": "python", "greedy": "python"} == shared
    assert [{"a==1", "b"}] == made


def test_what_clashes_is_parted_and_what_cannot_be_had_fails_alone(subjects: ModuleType) -> None:
    """Two versions of one package, and one that does not exist, leave the others their environment."""

    def install(needs: frozenset[str]) -> str:
        if "gone" in needs or {"a==1", "a==2"} <= needs:
            raise subjects.InstallError(f"clash among {sorted(needs)}")
        return " ".join(sorted(needs))

    wanted = {"calm": ["a==1"], "greedy": ["a==1"], "stuck": ["a==2"], "lost": ["gone"]}

    shared = dict(subjects.share(wanted, install))

    assert ("a==1", "a==1", "a==2") == (shared["calm"], shared["greedy"], shared["stuck"])
    assert "clash among ['gone']" == str(shared["lost"])
