#!/bin/sh
# Builds the wheel and installs it into a fresh environment without a network: what the Dockerfile runs.
#
#   tools/offline_wheel.sh WHEELHOUSE VENV
#
# WHEELHOUSE holds the wheels of everything (python3 -m pip download -d WHEELHOUSE -c constraints.txt torch numpy triton cmake ninja pybind11
# setuptools wheel, where there is a network). "-": the packages are already there, in the interpreter's own or, with BASE_SITE, that folder.
set -eu
house=$1
venv=$2
root=$(cd "$(dirname "$0")/.." && pwd)
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1
py=$venv/bin/python
if [ "$house" = - ]; then
  "${PYTHON:-python3}" -m venv --without-pip "$venv" # pip and setuptools are that folder's too
  site=${BASE_SITE:-$("${PYTHON:-python3}" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')}
  echo "$site" > "$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
else
  "${PYTHON:-python3}" -m venv "$venv"
  "$py" -m pip install --quiet --find-links "$house" -c "$root/constraints.txt" torch numpy triton cmake ninja pybind11 setuptools wheel
fi
cd "$root"
"$py" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$venv/dist" .
"$py" -m pip install --quiet --no-deps --force-reinstall "$venv"/dist/recog_fast-*.whl
cd /
"$py" -m recog_fast doctor
