"""Builds the sdist and from it the wheel, checks both, installs the wheel in a fresh environment and uses it there.

    .venv/bin/python tools/check_wheel.py                                          # CPU wheel of this Python (CI)
    .venv/bin/python tools/check_wheel.py --cuda cu130 --output dist               # with nvcc: recog_fast-0.1.0+cu130-...
    .venv/bin/python tools/check_wheel.py --python A/bin/python B/bin/python       # one wheel and one environment for each
    .venv/bin/python tools/check_wheel.py --wheel dist/recog_fast-0.1.0-...whl     # checks of a wheel that is there, no build

Each interpreter needs setuptools, wheel, cmake, ninja, pybind11, torch and NumPy: nothing is downloaded, and where `unshare`
can, the build runs without a network. The fresh environment is a venv that sees torch, NumPy and what those two require, by links
into the interpreter's own packages, and nothing else: no other package, no editable installation. What is checked of a wheel:
tools/wheel_checks.py; what it must do: tools/wheel_smoke.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import wheel_checks as checks
from wheel_checks import ROOT

# Prints the site-packages folder, and the top-level names there of torch, NumPy and all they require (extras they name included).
CLOSURE = r"""
import importlib.metadata as m, re, sysconfig
seen, todo, tops = set(), ["torch", "numpy"], set()
while todo:
    name, _, extras = re.match(r"([A-Za-z0-9._-]+)\s*(\[([^\]]*)\])?", todo.pop()).groups()
    key = (re.sub(r"[-_.]+", "-", name).lower(), extras)
    if key in seen: continue
    seen.add(key)
    try: d = m.distribution(name)
    except m.PackageNotFoundError: continue
    tops |= {f.parts[0] for f in d.files or () if f.parts[0] not in ("..", "__pycache__") and not f.name.endswith(".pth")}
    for one in d.requires or ():
        extra = re.search(r"extra == ['\"]([^'\"]+)", one)
        if extra is None or extra[1] in [e.strip() for e in (extras or "").split(",")]: todo.append(one)
print(sysconfig.get_paths()["purelib"], *sorted(tops), sep="\n")
"""


def run(command: list[str | Path], cwd: Path, **variables: str) -> str:
    """Output of a command that must succeed; RuntimeError with all it said otherwise."""
    # Nothing of a build outside may lead it, and no index may be asked.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "RECOG_FAST_"))}
    environment = {**clean, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def cut_off() -> list[str]:
    """What starts a command without a network, or nothing where that is not allowed."""
    there = shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    return ["unshare", "-rn"] if there else []


def build_sdist(folder: Path) -> Path:
    """The sdist, made from this tree and unpacked outside any repository."""
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run([sys.executable, "-c", program], ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return archive


def build_wheel(python: Path, source: Path, folder: Path, **variables: str) -> Path:
    """The wheel of a folder of sources, by one interpreter, offline."""
    folder.mkdir(parents=True)
    pip: list[str | Path] = [python, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*cut_off(), *pip, "--wheel-dir", folder, source], folder, **variables)
    (built,) = folder.glob("*.whl")
    return built


def fresh_environment(python: Path, folder: Path) -> Path:
    """The interpreter of a new venv beside links to torch, NumPy and what they require."""
    site, *tops = run([python, "-c", CLOSURE], ROOT).splitlines()
    borrowed = folder / "borrowed"
    borrowed.mkdir(parents=True)
    for name in tops:
        (borrowed / name).symlink_to(Path(site) / name)
    run([python, "-m", "venv", "--without-pip", folder / "env"], folder)
    fresh = folder / "env" / "bin" / "python"
    own = run([fresh, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], folder).strip()
    (Path(own) / "borrowed.pth").write_text(f"{borrowed}\n")
    found = run([fresh, "-c", "import importlib.util as u; print([n for n in ('recog_fast', 'pip', 'yaml', 'PIL') if u.find_spec(n)])"], folder)
    if found.strip() != "[]":
        raise RuntimeError(f"the fresh environment already holds {found}")
    return fresh


def install_and_use(python: Path, wheel: Path, folder: Path) -> dict[str, Any]:
    """Installs with requirements checked and runs the smoke test from elsewhere; what that said."""
    fresh = fresh_environment(python, folder)
    run([*cut_off(), python, "-m", "pip", "--python", fresh, "install", "--quiet", "--no-index", wheel], folder)
    said: dict[str, Any] = json.loads(run([fresh, "-I", ROOT / "tools" / "wheel_smoke.py"], folder).splitlines()[-1])
    return said


def one_python(python: Path, sources: Path, folder: Path, label: str, output: Path | None) -> tuple[dict[str, Any], Path, list[str]]:
    """Build, repair, check and use; (report, wheel, complaints)."""
    start = time.monotonic()
    variables = {"RECOG_FAST_CUDA": "on" if label else "off", **({"RECOG_FAST_LOCAL_VERSION": label} if label else {})}
    copy = Path(shutil.copytree(sources, folder / "sources"))
    raw = build_wheel(python, copy, folder / "raw", **variables)
    built = time.monotonic()
    (folder / "repaired").mkdir()
    wheel = checks.repair(raw, folder / "repaired")
    complaints = checks.check(wheel)
    said = install_and_use(python, wheel, folder / "fresh")
    if label and label not in said["recog_fast"]:
        complaints.append(f"expected version +{label}, got {said['recog_fast']}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, output)
    report = {
        "wheel": wheel.name, "megabytes": round(wheel.stat().st_size / 1e6, 2), "policy": checks.policy(wheel), **said,
        "build_seconds": round(built - start, 1), "check_seconds": round(time.monotonic() - built, 1),
    }  # fmt: skip
    return report, wheel, complaints


def incomplete(sources: Path) -> list[str]:
    """Files under version control that the sdist lacks; where there is no git, nothing can be said."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return []
    left_out = (".ci/", ".git")  # how this repository is checked is no part of the release
    names = [name for name in listed.stdout.splitlines() if not name.startswith(left_out) and (ROOT / name).exists()]
    return [f"the sdist lacks {name}" for name in names if not (sources / name).is_file()]


def build_and_check(pythons: list[Path], label: str, output: Path | None) -> list[str]:
    """Everything, printed as it is known; complaints."""
    complaints: list[str] = []
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        folder = Path(name)
        archive = build_sdist(folder)
        sources = folder / archive.name.removesuffix(".tar.gz")
        complaints += incomplete(sources)
        print(f"sdist {archive.name}: {archive.stat().st_size / 1e6:.2f} MB, builds {'without a network' if cut_off() else 'offline (no unshare here)'}")
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            shutil.copy(archive, output)
        for old in (ROOT / "build").glob("lib*"):
            shutil.rmtree(old)  # modules that are gone since would be packed again
        tree = build_wheel(Path(sys.executable), ROOT, folder / "tree")
        for number, python in enumerate(pythons):
            report, wheel, wrong = one_python(python, sources, folder / str(number), label, output)
            print(json.dumps(report, indent=1))
            complaints += [f"{wheel.name}: {line}" for line in [*wrong, *checks.different_files(wheel, tree)]]
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", type=Path, default=[Path(sys.executable)], help="interpreters (this one)")
    parser.add_argument("--cuda", default="", metavar="LABEL", help="build the CUDA kernels; the version becomes 0.1.0+LABEL (cu130)")
    parser.add_argument("--output", type=Path, help="folder for the sdist and the repaired wheels")
    parser.add_argument("--wheel", type=Path, help="look into this wheel only")
    options = parser.parse_args()
    try:
        complaints = checks.check(options.wheel) if options.wheel else build_and_check(
            [p.absolute() for p in options.python], options.cuda, options.output and options.output.absolute()
        )  # fmt: skip
    except RuntimeError as error:
        complaints = [str(error)]
    for line in complaints:
        print(f"check_wheel: {line}", file=sys.stderr)
    if not complaints:
        print("check_wheel: all is well")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
