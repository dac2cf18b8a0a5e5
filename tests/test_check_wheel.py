"""tools/wheel_checks.py: what it says of wheels that are wrong, and that this build's extension is right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

import recog_fast as rf
from recog_fast import native

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTENSION = f"recog_fast/_native{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheel_checks", ROOT / "tools" / "wheel_checks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(folder: Path, *, name: str = "", extra: dict[str, bytes] | None = None, without: str = "", **changes: str) -> Path:
    """A wheel with this project's metadata; `changes` replaces fields of it, "" leaves one out."""
    info = f"recog_fast-{rf.__version__}.dist-info"
    fields = {"Name": "recog-fast", "Version": rf.__version__, "Requires_Python": PROJECT["requires-python"], "License_Expression": PROJECT["license"], **changes}
    lines = [f"{key.replace('_', '-')}: {value}" for key, value in fields.items() if value]
    lines += [f"Classifier: {value}" for value in PROJECT["classifiers"]] + [f"License-File: {value}" for value in PROJECT["license-files"]]
    lines += [f"Requires-Dist: {value}" for value in PROJECT["dependencies"]] + [f"Provides-Extra: {value}" for value in PROJECT["optional-dependencies"]]
    there = {
        "recog_fast/py.typed": b"", "recog_fast/_native.pyi": b"", EXTENSION: b"", f"{info}/entry_points.txt": b"", f"{info}/licenses/LICENSE": b"",
        f"{info}/METADATA": ("\n".join(lines) + "\n").encode(), **(extra or {}),
    }  # fmt: skip
    path = folder / (name or f"recog_fast-{rf.__version__}-cp311-cp311-linux_x86_64.whl")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in there.items():
            if entry != without:
                archive.writestr(entry, content)
    return path


def compiled(folder: Path, source: str, *flags: str) -> Path:
    """A shared library of a few lines of C++."""
    (folder / "x.cpp").write_text(source)
    library = folder / "x.so"
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-fPIC", *flags, folder / "x.cpp", "-o", library], check=True)
    return library


def test_this_extension_exports_its_entry_and_needs_no_torch(checks: ModuleType) -> None:
    module, reason = native.load()
    if module is None or module.__file__ is None:
        pytest.skip(f"compiled kernels {reason}")
    if "sanitize" in Path(module.__file__).parts:
        pytest.skip("a build with sanitizers needs their library")
    assert checks.wrong_binary(Path(module.__file__)) == []


def test_a_symbol_too_many_a_strange_library_and_a_search_path_are_named(checks: ModuleType, tmp_path: Path) -> None:
    entry = 'extern "C" void PyInit__native() {}\n'
    assert checks.wrong_binary(compiled(tmp_path, entry)) == []
    assert "PyInit__native" in checks.wrong_binary(compiled(tmp_path, "static int none;"))[0]
    (wrong,) = checks.wrong_binary(compiled(tmp_path, entry + "int leaked() { return 0; }"))
    assert "leaked" in wrong and "expected ['PyInit__native'] exported" in wrong
    other = tmp_path / "libtorch_cpu.so"
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-Wl,-soname,libtorch_cpu.so", "-x", "c++", "/dev/null", "-o", other], check=True)
    wrong = checks.wrong_binary(compiled(tmp_path, entry, "-Wl,--no-as-needed", f"-L{tmp_path}", "-ltorch_cpu", f"-Wl,-rpath,{tmp_path}"))
    assert any("needs libtorch_cpu.so" in line for line in wrong) and any("PATH" in line for line in wrong)


def test_metadata_is_that_of_the_project(checks: ModuleType, tmp_path: Path) -> None:
    assert checks.wrong_metadata(make_wheel(tmp_path)) == []
    labelled = make_wheel(tmp_path, name=f"recog_fast-{rf.__version__}+cu130-cp311-cp311-linux_x86_64.whl", Version=f"{rf.__version__}+cu130")
    assert checks.wrong_metadata(labelled) == [] and checks.kind(labelled) == "cuda"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Version": "9.9"}, "Version: expected "),
        ({"Requires_Python": ">=3.8"}, "Requires-Python: expected "),
        ({"License_Expression": ""}, "License-Expression: expected Apache-2.0, got None"),
        ({"without": "recog_fast/py.typed"}, "recog_fast/py.typed is missing"),
        ({"without": EXTENSION}, "recog_fast/_native.so is missing"),
        ({"without": f"recog_fast-{rf.__version__}.dist-info/licenses/LICENSE"}, "dist-info/licenses/LICENSE is missing"),
        ({"name": "recog_fast-9.9-cp311-cp311-linux_x86_64.whl"}, "version in the name: expected "),
    ],
)
def test_wrong_metadata_is_named(checks: ModuleType, tmp_path: Path, changes: dict[str, str], message: str) -> None:
    assert any(line.startswith(message) for line in checks.wrong_metadata(make_wheel(tmp_path, **changes)))  # type: ignore[arg-type]


def test_size_files_and_libraries(checks: ModuleType, tmp_path: Path) -> None:
    small = make_wheel(tmp_path)
    assert checks.too_large(small) == []
    large = make_wheel(tmp_path, name="recog_fast-1-cp312-cp312-linux_x86_64.whl", extra={"recog_fast/blob": os.urandom(5_100_000)})
    assert checks.too_large(large) == [f"{large.stat().st_size / 1e6:.2f} MB, expected at most 5.0 MB"]
    assert checks.different_files(small, large) == [f"{large.name} alone holds recog_fast/blob"]
    library = compiled(tmp_path, 'extern "C" void PyInit__native() {}').read_bytes()
    assert checks.wrong_libraries(make_wheel(tmp_path, extra={EXTENSION: library})) == []
    grafted = make_wheel(tmp_path, extra={EXTENSION: library, "recog_fast.libs/libgomp.so.1": library})
    assert checks.wrong_libraries(grafted) == [f"expected the extension as the only library, got {[EXTENSION, 'recog_fast.libs/libgomp.so.1']}"]


def test_a_bad_local_version_stops_the_build() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "RECOG_FAST_LOCAL_VERSION": "CUDA 13"}
    )
    assert done.returncode == 1 and "RECOG_FAST_LOCAL_VERSION: expected lower-case letters, digits and dots (cu130), got 'CUDA 13'" in done.stderr
