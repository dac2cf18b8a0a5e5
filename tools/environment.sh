#!/bin/sh
# Makes .venv whole: interpreter, pinned packages, build tools, this package with its compiled kernels.
# Works from any state: no .venv, an interrupted or damaged one, one copied here from another folder, a stale build.
set -eu
cd "$(dirname "$0")/.."
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX || true
python=${PYTHON:-python3}
venv=.venv
py=$venv/bin/python
pip="$py -m pip --disable-pip-version-check --quiet"

fail() {
  echo "make: $1" >&2
  exit 1
}

apt="On Debian or Ubuntu: apt-get install python3 python3-venv python3-dev g++ make"
command -v "$python" >/dev/null 2>&1 || fail "no '$python'. $apt; or name an interpreter: make PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "expected Python 3.11 or newer, got '$python' ($("$python" --version 2>&1)). Name another one: make PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "'$python' has no venv module. $apt"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
  fail "'$python' has no headers (Python.h). $apt"
command -v "${CXX:-c++}" >/dev/null 2>&1 || fail "no C++ compiler (${CXX:-c++}). $apt"

# One at a time: a second make, or what a killed one left running, would write into the same folder.
mkdir -p build
if command -v flock >/dev/null 2>&1; then
  exec 9>build/.environment.lock
  flock 9
fi

# Packages. `.unfinished` stands while they are being installed, `.packages` names the folder they were installed for.
# An environment that somebody else made is used as it is, if its pip works.
broken=
[ ! -e $venv/.unfinished ] || broken=yes
[ ! -e $venv/.packages ] || "$py" tools/check_venv.py packages || broken=yes
"$py" -m pip --version >/dev/null 2>&1 || "$py" -m ensurepip >/dev/null 2>&1 || broken=yes
[ -z "$broken" ] || rm -rf $venv
if [ ! -e $venv/.packages ] || [ -n "$(find pyproject.toml constraints.txt tools/environment.sh -newer $venv/.packages)" ]; then
  mkdir -p $venv
  touch $venv/.unfinished
  [ -x $py ] || "$python" -m venv $venv || fail "'$python -m venv' failed. $apt"
  grep -v '^triton' constraints.txt >$venv/constraints.txt
  echo "Installing packages into $venv: torch (a download of 200 MB, or of 3 GB where only the CUDA build is offered)"
  $pip install --constraint $venv/constraints.txt torch numpy
  if ! "$py" -c 'import importlib.metadata as m; m.version("triton")' 2>/dev/null; then
    $pip install --no-deps --constraint constraints.txt triton || echo "No triton for this platform: its tests are skipped"
  fi
  echo "Installing packages into $venv: build tools, training, development (minutes)"
  "$py" -c 'import tomllib
with open("pyproject.toml", "rb") as file: settings = tomllib.load(file)
extras = settings["project"]["optional-dependencies"]
print(*settings["build-system"]["requires"], "wheel", *settings["project"]["dependencies"], *extras["train"], *extras["dev"], sep="\n")' \
    >$venv/requirements.txt
  $pip install --constraint $venv/constraints.txt --requirement $venv/requirements.txt
  pwd >$venv/.packages
  rm $venv/.unfinished
fi

echo "Building the kernels (a minute or two; with those for CUDA, where nvcc is found, some more: RECOG_FAST_CUDA=off leaves them out)"
$pip install --no-build-isolation --no-deps --editable .
"$py" tools/check_venv.py
touch $venv/.installed
