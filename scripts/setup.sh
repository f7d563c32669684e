#!/usr/bin/env bash
# Makes the environment: this package, torch, Detectron2 and the developers' tools.
#
#   VENV     the environment's folder             (default: .venv)
#   PYTHON   the interpreter that it is made from (default: python3)
#
# Run it as often as you like: it does nothing while nothing has changed. A Detectron2 that
# PYTHON or VENV has already is used as it is, with the torch and torchvision it was built for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
python=${PYTHON:-python3}
py=$venv/bin/python
stamp=$venv/revvit-setup.stamp

step() { printf '==> [%ss] %s\n' "$SECONDS" "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

checksum() {
    { pwd && cat setup.cfg setup.py constraints.txt detectron2-requirements.txt scripts/setup.sh; } | cksum
}

# "none", "wheel" (the one named in detectron2-requirements.txt) or "own"; does not import it.
detectron2_of() {
    "$1" - <<'EOF'
import importlib.metadata
import importlib.util

spec = importlib.util.find_spec("detectron2")
if spec is None or spec.origin is None:  # no origin: a folder of that name, not a package
    print("none")
else:
    try:
        importlib.metadata.distribution("sal-detectron2")
        print("wheel")
    except importlib.metadata.PackageNotFoundError:
        print("own")
EOF
}

make_venv() {
    local flags=(--prompt revvit) parent=""
    command -v "$python" >/dev/null ||
        fail "no interpreter '$python': name a Python >= 3.10, e.g. make setup PYTHON=python3.11"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$("$python" -V 2>&1) is too old: name a Python >= 3.10, e.g. make setup PYTHON=python3.11"
    if [ "$(detectron2_of "$python")" != own ]; then
        step "making $venv with $("$python" -V)"
    else
        step "making $venv on top of the packages of $python, which has a Detectron2"
        flags+=(--system-site-packages)
        # If $python belongs to a virtual environment, that flag shows the packages below it, not its own.
        parent=$("$python" -c 'import sys, sysconfig
if sys.prefix != sys.base_prefix: print(sysconfig.get_path("purelib"))')
    fi
    "$python" -m venv "${flags[@]}" "$venv" ||
        fail "could not make $venv: does $python have its venv module (on Debian: apt install python3-venv)?"
    if [ -n "$parent" ]; then
        "$py" - "$parent" <<'EOF'
import pathlib
import sys
import sysconfig

line = f"import site; site.addsitedir({sys.argv[1]!r})\n"
pathlib.Path(sysconfig.get_path("purelib"), "revvit-parent.pth").write_text(line)
EOF
    fi
}

say_if_disk_is_low() {
    local free
    free=$(df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1048576) }')
    if [ "$free" -lt 7 ]; then
        step "NOTE: $free GB of disk are free, torch and its CUDA libraries need about 6 GB"
    fi
}

# A sign of life while pip is at work: the last line it wrote. Ends with this script, however that ends.
heartbeat() {
    while sleep 20 >/dev/null 2>&1 && kill -0 "$$" 2>/dev/null; do
        printf '    [%ss] %s\n' "$SECONDS" "$(grep -v WARNING "$tmp/pip.log" | tail -n 1 | cut -c 1-90)"
    done
}

stop_heartbeat() {
    if [ -n "$beat" ]; then
        kill "$beat" 2>/dev/null || true
        wait "$beat" 2>/dev/null || true
        beat=""
    fi
}

pip_install() {
    : >"$tmp/pip.log"
    heartbeat &
    beat=$!
    if ! "$py" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" \
        >"$tmp/pip.log" 2>&1; then
        grep -v '^Requirement already' "$tmp/pip.log" | tail -n 30 >&2 || true
        fail "$remedy"
    fi
    stop_heartbeat
}

sum=$(checksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && "$py" -c '' 2>/dev/null; then
    step "$venv is up to date"
    exit
fi

rm -f "$stamp"
"$py" -c 'import pip' 2>/dev/null || make_venv

tmp=$(mktemp -d)
beat=""
cleanup() {
    stop_heartbeat
    rm -rf "$tmp"
}
trap cleanup EXIT

detectron2=$(detectron2_of "$py")
if [ "$detectron2" = own ]; then
    # Its compiled part fits the torch it was built for: hold that, leave the rest to pip.
    constraints=$tmp/kept.txt
    "$py" - >"$constraints" <<'EOF'
import importlib.metadata

for name in ("torch", "torchvision"):
    try:
        print(f"{name}=={importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        pass
EOF
    kept=$(paste -s -d ' ' "$constraints")
    remedy="pip failed, see above. The torch of your Detectron2 is kept ($kept): upgrade both if it is too old."
    step "using the Detectron2 that is there, with its $kept; constraints.txt is not applied"
else
    constraints=constraints.txt
    remedy="pip failed, see above. It needs network access and about 6 GB of disk; then run make setup again."
    "$py" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || say_if_disk_is_low
fi

step "installing this package and what it needs (the first time: some minutes)"
pip_install -c "$constraints" -e ".[images,detection,video,dev]"

if [ "$detectron2" = none ]; then
    step "installing Detectron2 (pure Python part)"
    # The wheel is tagged for one Python version; its Python files serve all of them.
    pip_install --target "$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
        --python-version 3.10 --implementation cp --abi none --platform any --only-binary=:all: \
        --no-deps --require-hashes -r detectron2-requirements.txt
fi

step "checking"
"$py" - <<'EOF' || fail "an import failed, see above. To start over, remove $venv and run make setup again."
import av
import detectron2
import faster_coco_eval
import lightning
import pytorchvideo.data
import torch
import torchvision
import torchvision.ops

modules = (torch, torchvision, detectron2, faster_coco_eval, lightning, av)
print("    " + ", ".join(f"{m.__name__} {m.__version__}" for m in modules))
EOF
printf '%s\n' "$sum" >"$stamp"
step "done: $venv is ready"
