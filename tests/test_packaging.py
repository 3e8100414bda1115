"""The wheel and the sdist, built offline from a copy: what they hold, and that the sdist tests itself."""

import email
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path, PurePosixPath

import pytest

import csulora

ROOT = Path(__file__).parent.parent
NAME = f"csulora-{csulora.__version__}"
PACKAGES = ("csulora", "csulora_kernels")
MODULES = ("csulora_plugin.py",)
# What a build adds to an sdist.
GENERATED = ("PKG-INFO", "setup.cfg", "csulora.egg-info/*")


def run(command, cwd):
    """Runs Python on `command` in the folder `cwd`, which comes first on its path; returns the output."""
    foreign = ("PYTEST_", "PYTHONSAFEPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def source_files():
    """The project's own files, relative to its root: the tracked ones, or else all that none ignores."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode == 0:
            return {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            x for x in folders if not any(fnmatch.fnmatch(x, p) for p in [*ignored, ".git"])
        ]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in files}
    return {name for name in found if not generated(name)}


def generated(name):
    return any(fnmatch.fnmatch(name, pattern) for pattern in GENERATED)


def packaged(name):
    return name in MODULES or name.split("/")[0] in PACKAGES


@pytest.fixture(scope="module")
def sources():
    return source_files()


def build(sources, kind, folder):
    """Calls the backend's hook in a fresh copy of the sources, as a build without isolation does."""
    copy, out = folder / "copy", folder / "dist"
    out.mkdir()
    for name in sources:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    run(["-c", f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"], copy)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    built = build(sources, "wheel", tmp_path_factory.mktemp("wheel"))
    assert built.name == f"{NAME}-py3-none-any.whl"
    with zipfile.ZipFile(built) as archive:
        yield archive


@pytest.fixture(scope="module")
def sdist(sources, tmp_path_factory):
    """The folder that the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    built = build(sources, "sdist", folder)
    assert built.name == f"{NAME}.tar.gz"
    with tarfile.open(built) as archive:
        names = [PurePosixPath(name) for name in archive.getnames()]
        assert {name.parts[0] for name in names} == {NAME}
        # Set, not passed: the first releases of 3.11 know no filter.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(folder / "unpacked")
    return folder / "unpacked" / NAME


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def metadata(request):
    archive = request.getfixturevalue(request.param)
    if request.param == "wheel":
        return email.message_from_bytes(archive.read(f"{NAME}.dist-info/METADATA"))
    return email.message_from_bytes((archive / "PKG-INFO").read_bytes())


def test_the_wheel_holds_the_packages_whole_and_nothing_else(sources, wheel):
    names = [name for name in wheel.namelist() if not name.endswith("/")]
    assert len(names) == len(set(names))
    described = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert set(names) - described == {name for name in sources if packaged(name)}
    assert {name.partition("/")[2] for name in described} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }


def test_the_wheel_holds_the_type_markers_and_the_demo(wheel):
    demo = "csulora/demo/assets"
    models = [f"{demo}/{model}/model.safetensors" for model in ("base", "aligned")]
    adapter = [f"{demo}/adapter/adapter_{x}" for x in ("config.json", "model.safetensors")]
    markers = [f"{package}/py.typed" for package in PACKAGES]
    assert set(wheel.namelist()) >= {*models, *adapter, *markers, f"{demo}/card.json"}
    for name in (*models, *adapter):
        assert wheel.read(name) == (ROOT / name).read_bytes()


def test_the_wheel_installs_the_command(wheel):
    entry_points = ConfigParser()
    entry_points.read_string(wheel.read(f"{NAME}.dist-info/entry_points.txt").decode())
    (command,) = entry_points["console_scripts"].items()
    assert command == ("csulora", "csulora.cli:main")


def test_the_wheel_names_its_plugins(wheel):
    entry_points = ConfigParser()
    entry_points.read_string(wheel.read(f"{NAME}.dist-info/entry_points.txt").decode())
    assert dict(entry_points["vllm.general_plugins"]) == {"csulora": "csulora_plugin:vllm"}
    assert dict(entry_points["sglang.srt.plugins"]) == {"csulora": "csulora_plugin:sglang"}


def test_the_metadata(metadata):
    assert metadata["Name"] == "csulora"
    assert metadata["Version"] == csulora.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert not any(x.startswith("License ::") for x in metadata.get_all("Classifier"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# csulora\n")


def test_the_sdist_is_the_whole_tree(sources, sdist):
    files = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert {name for name in files if not generated(name)} == sources
    assert files >= {"README.md", "LICENSE", "constraints.txt", "pyproject.toml", ".ci/run"}
    assert files >= {"tests/conftest.py", "tests/builders.py"}
    assert {name.split("/")[0] for name in files} >= {"bench", "docs"}


def test_the_sdist_runs_its_own_tests(sdist):
    where = "import importlib.util as u; print(u.find_spec('csulora').origin)"
    assert Path(run(["-c", where], sdist).strip()) == sdist / "csulora" / "__init__.py"
    (sample,) = sdist.glob("tests/**/test_sources.py")
    # -k: this file is collected there, but not run, or it would build and unpack for ever.
    pytest_there = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", sample.name]
    ran = run([*pytest_there, "tests/test_packaging.py", str(sample)], sdist).splitlines()[-1]
    assert " passed" in ran and " deselected" in ran
