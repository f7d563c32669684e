#!/usr/bin/env bash
# Installs the pinned sets of versions in constraints/ one after the other, each with its Python,
# tests them, and prints a table. One environment at a time, of about 6 GB, removed afterwards.
#
#   scripts/matrix.sh [SET…]      such as py311-oldest; all of them without
#   TESTS="tests"                 what pytest is given (default: a choice of a few minutes)
#   PIN=1                         take what a set does not pin as it comes, and write the set anew
#   KEEP=FOLDER                   make the environments there, and leave them
#
# A Python is python3.X on PATH, or pyenv's. Exit status 1 if a set that could be installed fails.
set -euo pipefail
unset PYTHONPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# set, Python, extras ("-": torch alone)
sets="
core-oldest   3.12  -
core-newest   3.13  -
py310-oldest  3.10  images,detection,video,weights,timm
py311-oldest  3.11  images,detection,video,weights,timm
py311-newest  3.11  images,detection,video,weights,timm,export
py312-newest  3.12  images,detection,video,weights,timm,export
py313-newest  3.13  images,detection,video,weights,timm,export
"
core="tests/backbones/test_gradients.py tests/backbones/test_inverse.py tests/backbones/test_models.py
    tests/backbones/test_operations.py tests/backbones/test_imports.py tests/backbones/test_keep.py"
all="$core tests/backbones/test_weights.py tests/backbones/test_timm.py tests/backbones/test_export.py
    tests/test_package.py
    tests/revdet/test_model.py tests/revdet/test_predict.py tests/revvideo/test_decode.py
    tests/revvideo/test_scan.py tests/revvideo/test_run.py"

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0

find_python() {
    local candidate
    for candidate in "python$1" "$(command -v pyenv >/dev/null && pyenv root)/versions/$1".*/bin/python; do
        if "$candidate" -c 'import ensurepip' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# The set as it came: what this project and its tests asked for, and what that brought.
pin() {
    {
        sed -n '/^#/p' "$2"
        "$1" -m pip freeze --exclude-editable --exclude setuptools | grep -v '^sal-detectron2\|^nvidia\|^cuda\| @ '
        "$1" -m pip freeze --all | grep '^setuptools==' || true
    } >"$tmp/pinned"
    cp "$tmp/pinned" "$2"
}

version() { "$py" -m pip list --format freeze 2>/dev/null | sed -n "s/^$1==//p" | grep . || echo "-"; }

try() { # set, Python, extras
    local file=constraints/$1.txt python venv=${KEEP:-$tmp}/$1 what result tests=${TESTS:-}
    [ "$1" = py311-newest ] && file=constraints.txt
    python=$(find_python "$2")
    if [ -z "$python" ]; then
        echo "| $1 | $2 | | | | | no Python $2 here |" >>"$tmp/table"
        return
    fi
    printf '==> [%ss] %s: installing\n' "$SECONDS" "$1" >&2
    [ -d "$venv" ] || "$python" -m venv "$venv"
    py=$venv/bin/python
    what=.$([ "$3" = - ] || echo "[$3]")
    [ -n "$tests" ] || tests=$([ "$3" = - ] && echo "$core" || echo "$all")
    if ! "$py" -m pip install --quiet --disable-pip-version-check --no-cache-dir -c "$file" \
        -e "$what" pytest $([ "$3" = - ] || echo scikit-image setuptools) >"$tmp/$1.log" 2>&1; then
        result="no set of wheels: $(grep '^ERROR' "$tmp/$1.log" | head -n 1 | cut -c 8-120)"
    elif [ "$3" != - ] && ! "$py" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        --target "$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
        --python-version 3.10 --implementation cp --abi none --platform any --only-binary=:all: \
        --no-deps --require-hashes -r detectron2-requirements.txt >"$tmp/$1.log" 2>&1; then
        result="no Detectron2"
    else
        printf '==> [%ss] %s: testing\n' "$SECONDS" "$1" >&2
        if ! "$py" -m pytest -q -p no:cacheprovider $tests >"$tmp/$1.log" 2>&1; then
            failed=1
            grep '^FAILED\|^ERROR' "$tmp/$1.log" >&2 || tail -n 20 "$tmp/$1.log" >&2
        fi
        result=$(tail -n 1 "$tmp/$1.log" | sed 's/ in .*//; s/=//g; s/, [0-9]* warnings*//')
        [ -z "${PIN:-}" ] || pin "$py" "$file"
    fi
    printf '==> [%ss] %s: %s\n' "$SECONDS" "$1" "$result" >&2
    echo "| $1 | $("$py" -V | cut -c 8-) | $(version torch) | $(version torchvision) | $(version numpy) | $(version av) | $result |" >>"$tmp/table"
    [ -n "${KEEP:-}" ] || rm -rf "$venv"
}

while read -r name python extras; do
    if [ -n "$name" ] && { [ $# = 0 ] || [[ " $* " == *" $name "* ]]; }; then
        try "$name" "$python" "$extras" </dev/null
    fi
done <<<"$sets"
printf '\n| set | Python | torch | torchvision | NumPy | PyAV | tests |\n|---|---|---|---|---|---|---|\n'
cat "$tmp/table"
exit "$failed"
