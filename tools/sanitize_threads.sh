#!/bin/sh
# The kernels' own threads under the thread sanitizer, without Python: kernel_check at full size, where sweeps start two and three
# of them. `make sanitize-threads`, about four minutes; ISA=avx2 by default, any name of recog_fast.native.available_isas().
set -eu
cd "$(dirname "$0")/.."
py=${PY:-.venv/bin/python}
build=build/sanitize/threads
$py -m cmake -G Ninja -S . -B $build -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS="-fsanitize=thread -O1 -g1" \
  -DCMAKE_EXE_LINKER_FLAGS=-fsanitize=thread -DRECOG_FAST_CUDA=off -DPython_EXECUTABLE="$("$py" -c 'import sys; print(sys.executable)')" \
  -Dpybind11_DIR="$("$py" -m pybind11 --cmakedir)" -DCMAKE_MAKE_PROGRAM="$("$py" -c 'import os, ninja; print(os.path.join(ninja.BIN_DIR, "ninja"))')" >/dev/null
$py -m cmake --build $build --target kernel_check
# Its shadow memory wants addresses that are not random.
TSAN_OPTIONS="halt_on_error=1:exitcode=66" setarch "$(uname -m)" -R $build/kernel_check "${ISA:-avx2}" all full
