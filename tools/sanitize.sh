#!/bin/sh
# Builds the kernels with the address and undefined-behaviour sanitizers into build/sanitize, beside the normal build, and runs
# the tests of the operations on them, for every ISA this CPU runs; any finding fails. Arguments go to pytest instead of the
# usual selection. `make sanitize`; PY names another interpreter than .venv's.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
py=${PY:-.venv/bin/python}
package=$root/build/sanitize/recog_fast
tests="tests/test_ops.py tests/test_margin_softmax.py tests/test_same_bits.py tests/test_fuzz.py tests/test_isas.py"
tests="$tests tests/test_margin_softmax_golden.py tests/test_half.py tests/test_kept.py tests/test_lists.py tests/test_sampled_steps.py tests/test_sampled_kept.py"
# The reference has no kernels to check, and the sanitizer fills malloc's memory its own way.
others="reference-float or uninitialised"

# The package by links to its sources, with the sanitized extension in place of the normal one.
mkdir -p "$package"
find "$package" -maxdepth 1 -type l -delete
for file in "$root"/recog_fast/*; do
  case $file in *_native*.so | *__pycache__) ;; *) ln -s "$file" "$package/" ;; esac
done
ln -s "$root/triton_kernels" "$package/triton_kernels"

cmake="$py -m cmake"
$cmake -G Ninja -S . -B build/sanitize/cmake -DRECOG_FAST_SANITIZE=ON -DRECOG_FAST_CUDA=off -DPython_EXECUTABLE="$("$py" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$py" -m pybind11 --cmakedir)" -DCMAKE_MAKE_PROGRAM="$("$py" -c 'import os, ninja; print(os.path.join(ninja.BIN_DIR, "ninja"))')" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package" >/dev/null
$cmake --build build/sanitize/cmake --target _native kernel_check

# Every arithmetic and the kept exponentials, without Python.
UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/cmake/kernel_check all all small >build/sanitize/kernel_check.log ||
  { cat build/sanitize/kernel_check.log; exit 1; }

# Python itself is not sanitized, so the runtime comes first; libstdc++ beside it, or it cannot find __cxa_throw.
compiler=${CXX:-c++}
runtime=$("$compiler" -print-file-name=libasan.so)
[ -e "$runtime" ] || { echo "sanitize: '$compiler' has no libasan.so (GCC's; on Debian in libgcc-12-dev)" >&2; exit 1; }
export LD_PRELOAD="$runtime $("$compiler" -print-file-name=libstdc++.so)"
# Python and torch leak by design: leaks are not looked for.
# Address reports go to files, undefined behaviour to standard error, which pytest must leave alone: a dying process takes
# along what was captured.
report=$root/build/sanitize/report
rm -f "$report".*
export ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=1:log_path=$report"
export UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1"
export PYTHONPATH="$root/build/sanitize" PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
"$py" - <<'CHECK'
import recog_fast.native
path = recog_fast.native.load()[0].__file__
assert "/build/sanitize/recog_fast/" in path, f"expected the sanitized kernels, got {path}"
CHECK
[ $# -gt 0 ] || set -- $tests -k "not ($others)"
status=0
"$py" -m pytest -p no:cacheprovider --capture=sys "$@" || status=$?
unset LD_PRELOAD
for file in "$report".*; do
  [ ! -e "$file" ] || { cat "$file" >&2; status=1; }
done
exit $status
