#!/usr/bin/env bash
# Make the environment in $VENV and install mnemon into it, exactly as constraints.txt says.
#
# TRANSFORMERS=4.57 makes one for another release of transformers, in .venv-4.57 unless $VENV says
# otherwise, with what its tests need. constraints-4.57.txt names what differs from constraints.txt.
#
# Where the interpreter already has a torch that is new enough, that one is used instead of
# downloading another (on a machine with a GPU it is the right build, and it is gigabytes).
set -euo pipefail

python=${PYTHON:-python3}
release=${TRANSFORMERS:-}
venv=${VENV:-.venv${release:+-$release}}
pins=constraints.txt
extras=dev

if ! "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))'; then
  echo "mnemon needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1)." >&2
  echo "Name another one: make setup PYTHON=python3.12" >&2
  exit 1
fi
if [ -n "$release" ] && [ ! -f "constraints-$release.txt" ]; then
  echo "There are no pins for transformers $release; there are: $(ls constraints-*.txt)." >&2
  exit 1
fi

torch_is_there() {
  "$1" - <<'PY' 2>/dev/null
import importlib.metadata as metadata
version = tuple(int(part) for part in metadata.version("torch").split("+")[0].split(".")[:2])
raise SystemExit(version < (2, 9))
PY
}

if [ ! -x "$venv/bin/python" ]; then
  if torch_is_there "$python"; then
    echo "using the torch that $python already has"
    "$python" -m venv --system-site-packages "$venv"
  else
    "$python" -m venv "$venv"
  fi
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

used=$(mktemp)
trap 'rm -f "$used"' EXIT
cp "$pins" "$used"
if [ -n "$release" ]; then
  extras=test
  names=$(sed 's/==.*//' "constraints-$release.txt" | paste -sd '|')
  grep -viE "^($names)==" "$pins" >"$used"
  cat "constraints-$release.txt" >>"$used"
fi
if torch_is_there "$venv/bin/python"; then
  # Whatever torch is there stays; everything else is pinned.
  sed -i '/^torch==/d' "$used"
else
  pip install --quiet "$(grep '^torch==' "$pins")"
fi
if "$venv/bin/python" -c 'import triton' 2>/dev/null; then
  # torch for CUDA brings the triton that belongs to it.
  sed -i '/^triton==/d' "$used"
fi
pip install --quiet --constraint "$used" --editable ".[$extras]"
"$venv/bin/python" -c 'import torch, transformers, mnemon; print(
  f"ready: mnemon {mnemon.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")'
