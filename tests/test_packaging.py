"""What is shipped, what an import costs, and what happens without the compiled kernels.

The sdist is made from a copy of the tree, the wheel from the unpacked sdist, once for the whole file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

import recog_fast

pytestmark = pytest.mark.slow

BUILT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", ".*_cache", ".hypothesis"
)
HEAVY = "matplotlib PIL simplejpeg scipy sklearn tensorboard rich jsonargparse yaml safetensors triton onnx onnxruntime faiss pandas torchvision".split()


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Output and error text of a command that must end with `code`."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=900)
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    return text


def python(code: str, cwd: Path) -> str:
    """What `code` prints, run where `recog_fast` comes from `cwd` alone; fails if anything goes to stderr."""
    # The finder of an editable installation would fill in what the folder lacks.
    alone = "sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, '__name__', '').startswith('_Editable')]"
    program = f"import sys; sys.path.insert(0, {str(cwd)!r}); {alone}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this tree without anything built."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=BUILT))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    for tool in ("setuptools", "pybind11", "cmake", "ninja"):
        pytest.importorskip(tool, reason=f"{tool} builds the package")
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})", cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # our own archive; Python < 3.11.4 has no filters
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist, over the cache of a build that another folder left behind."""
    cache = f"cmake.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = sdist / "build" / cache / "recog_fast._native" / "CMakeCache.txt"
    stale.parent.mkdir(parents=True)
    stale.write_text("CMAKE_HOME_DIRECTORY:INTERNAL=/gone\nCMAKE_MAKE_PROGRAM:FILEPATH=/gone/ninja\n")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "--wheel-dir", folder, sdist, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def sources(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    for name in ("csrc", "cmake", "triton_kernels", "recog_fast", "tests", "tools"):
        assert sources(sdist / name) >= {f for f in sources(ROOT / name) if not f.endswith(".so")}, name
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md", "Makefile"):
        assert (sdist / name).is_file(), name


def test_wheel_holds_package_kernels_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    expected = {f"recog_fast/{f}" for f in sources(ROOT / "recog_fast") if not f.endswith(".so")}
    expected |= {f"recog_fast/triton_kernels/{f}" for f in sources(ROOT / "triton_kernels")}
    expected.add(f"recog_fast/_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert not expected - names
    rest = {name for name in names - expected if ".dist-info/" not in name}
    assert not rest, "nothing but the package: no tests, no sources of the kernels"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_compiled_kernels_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = """
import torch, recog_fast as rf
import recog_fast.triton_kernels
loss = rf.margin_softmax_loss(torch.ones(2, 4), torch.eye(4), torch.tensor([0, 3]))
print(rf.__file__, rf.triton_kernels.__file__, rf.backends()["cpu"], loss.isfinite().item())
"""
    package, kernels, kind, *_, finite = python(code, tmp_path).split()
    assert Path(package).parent == tmp_path / "recog_fast"
    assert Path(kernels).parent == tmp_path / "recog_fast" / "triton_kernels"
    assert (kind, finite) == ("native", "True")


def test_one_version_everywhere(wheel: Path, sdist: Path) -> None:
    version = recog_fast.__version__
    assert wheel.name.split("-")[1] == version
    assert sdist.name == f"recog_fast-{version}"
    assert f"\nVersion: {version}\n" in (sdist / "PKG-INFO").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == version


def test_without_the_extension_it_falls_back_and_says_so_once(source: Path) -> None:
    code = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import recog_fast as rf
    assert not caught, "importing is silent"
    x, w, y = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True), torch.tensor([0, 4, 2])
    loss = rf.margin_softmax_loss(x, w, y)
    loss.backward()
    rf.margin_softmax_loss(x, w, y)
(warning,) = [str(c.message) for c in caught if issubclass(c.category, RuntimeWarning)]
with rf.ops.use_backend("reference"):
    assert torch.equal(loss, rf.margin_softmax_loss(x, w, y))
print(rf.backends()["cpu"])
print(warning)
"""
    backend, warning = python(code, source).strip().splitlines()
    assert backend.startswith("reference: compiled kernels not built")
    assert "compiled CPU kernels not built" in warning
    assert "pip install" in warning


def test_import_loads_torch_and_numpy_only_and_prints_nothing() -> None:
    """Heavy packages that torch itself does not load are loaded by whoever needs them."""
    code = f"""
import numpy, torch
before = set(sys.modules)
import recog_fast
assert recog_fast.MarginHead and recog_fast.ArcFace
print(sorted((set(sys.modules) - before) & set({HEAVY})))
"""
    assert python(code, ROOT) == "[]\n"


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        ("maybe", 1, "RECOG_FAST_CUDA: expected auto, on or off, got maybe"),
        ("on", 1, "RECOG_FAST_CUDA=on: {nvcc} does not compile here (1): error: unsupported GNU version"),
        ("auto", 0, "recog_fast: no CUDA kernels: {nvcc} does not compile here (1): error: unsupported GNU version"),
        ("off", 0, "recog_fast: no CUDA kernels: RECOG_FAST_CUDA=off"),
    ],
)
def test_without_a_working_nvcc(value: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`on` fails and says why, `auto` says why in one line and leaves the kernels out."""
    pybind11, ninja = pytest.importorskip("pybind11"), pytest.importorskip("ninja")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho building >&2; echo 'error: unsupported GNU version!' >&2; exit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    configure = [
        sys.executable, "-m", "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build", f"-DRECOG_FAST_CUDA={value}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DCMAKE_MAKE_PROGRAM={ninja.BIN_DIR}/ninja",
    ]  # fmt: skip
    assert message.format(nvcc=nvcc) in " ".join(run(*configure, cwd=tmp_path, code=code).split())
