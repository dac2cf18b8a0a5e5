"""Drives CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent.resolve()


class CMakeExtension(Extension):
    """An extension whose sources CMakeLists.txt lists."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures and builds with CMake and Ninja; CMAKE_ARGS and RECOG_FAST_CUDA (auto, on, off) are passed on."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Not build_temp: an editable installation throws it away, and every change would compile all files again.
        build = ROOT / "build" / f"cmake.{self.plat_name}-{sys.implementation.cache_tag}" / ext.name
        build.mkdir(parents=True, exist_ok=True)
        # The cmake and ninja of this environment, also where it is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = {**os.environ, "PATH": path}
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRECOG_FAST_CUDA={os.environ.get('RECOG_FAST_CUDA') or 'auto'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        stale = (build / "CMakeCache.txt").exists()
        done = subprocess.run(configure, check=not stale, env=environment)
        if done.returncode:
            # An earlier build's cache can name a folder, compiler or ninja that is gone.
            subprocess.run([*configure, "--fresh"], check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=environment)


# A wheel built otherwise than the usual one says so in its version: 0.1.0+cu130 holds the CUDA kernels.
LABEL = os.environ.get("RECOG_FAST_LOCAL_VERSION", "")
if LABEL and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", LABEL):
    sys.exit(f"RECOG_FAST_LOCAL_VERSION: expected lower-case letters, digits and dots (cu130), got {LABEL!r}")


class LabelledVersion(egg_info):
    """The version of _version.py with the label, whatever the setup.cfg says that an sdist brings along."""

    def finalize_options(self) -> None:
        self.tag_build = f"+{LABEL}" if LABEL else None
        super().finalize_options()


setup(ext_modules=[CMakeExtension("recog_fast._native")], cmdclass={"build_ext": CMakeBuild, "egg_info": LabelledVersion})
