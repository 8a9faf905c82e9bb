#!/usr/bin/env bash
# Build the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize
# and run their tests against that build: a load behind the end of a tensor, or anything else that
# C++ leaves undefined, ends the run with a report. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$PWD/${VENV:-.venv}/bin/python
compiler=${CXX:-g++}
build=$PWD/build/sanitize

if ! "$python" -c 'import nanobind' 2>/dev/null; then
  "$python" -m pip --disable-pip-version-check install --quiet --constraint constraints.txt nanobind
fi
if [ ! -f "$build/CMakeCache.txt" ]; then
  generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  cmake -S . -B "$build" "${generator[@]}" -DMNEMON_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_CXX_COMPILER="$compiler" -DPython_EXECUTABLE="$python" >/dev/null
fi
cmake --build "$build" --parallel 2 >"$build/build.txt" || { cat "$build/build.txt" >&2; exit 1; }

# Python finds this build wherever the library asks for its module; the library knows nothing of it.
mkdir -p "$build/site"
cat >"$build/site/sitecustomize.py" <<'PY'
import importlib.util
import os
import sys


class Sanitized:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "mnemon.attention._native":
            return None
        return importlib.util.spec_from_file_location(name, os.environ["MNEMON_SANITIZED_MODULE"])


sys.meta_path.insert(0, Sanitized)
PY
module=$(ls "$build"/_native*.so)
run() {
  # Python and torch are not instrumented and keep memory to the end: leaks say nothing.
  MNEMON_SANITIZED_MODULE=$module PYTHONPATH=$build/site OMP_NUM_THREADS=2 \
    ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 UBSAN_OPTIONS=print_stacktrace=1 \
    LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)" \
    "$python" "$@"
}
# It is this build that runs, and it does see a load behind the end.
if run -c "
import torch
from mnemon.attention import cpu
assert cpu._module().__file__ == '$module', cpu._module()
x = torch.ones(1, 1, 70, 16)
cpu.decode(x[:, :, :1], x, x, mask=torch.ones(1, 1, 1, 60))" >"$build/overrun.txt" 2>&1 ||
  ! grep -q heap-buffer-overflow "$build/overrun.txt"; then
  cat "$build/overrun.txt" >&2
  echo "The sanitizers do not see a load behind the end of a tensor: nothing would be tested." >&2
  exit 1
fi
run -m pytest -q -p no:cacheprovider "$@" \
  tests/attention/test_native_kernels.py tests/attention/test_native_edges.py
