#!/bin/sh
# Builds docs/ into build/docs: warnings are errors, and every link of the finished pages is looked at.
set -eu
cd "$(dirname "$0")/.."
py=${PY:-.venv/bin/python}
stamp=$(dirname "$(dirname "$py")")/.docs
if [ ! -e "$stamp" ] || [ -n "$(find pyproject.toml constraints.txt -newer "$stamp")" ]; then
  echo "Installing packages into .venv: documents"
  wanted=$("$py" -c 'import tomllib
with open("pyproject.toml", "rb") as file: print(*tomllib.load(file)["project"]["optional-dependencies"]["docs"])')
  grep -v '^triton' constraints.txt >"$stamp.constraints"
  # shellcheck disable=SC2086
  "$py" -m pip --disable-pip-version-check --quiet install --constraint "$stamp.constraints" $wanted
  touch "$stamp"
fi
export OMP_NUM_THREADS=1
"$py" -m sphinx --quiet --fail-on-warning --keep-going --fresh-env --jobs 1 --builder html -d build/doctrees "$@" docs build/docs
"$py" tools/check_site.py build/docs
