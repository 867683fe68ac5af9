#!/usr/bin/env bash
# Makes .venv: Python 3.12, the locked packages for CPU, and this project in editable form.
#
# `make setup` runs it; PYTHON=/path/to/python3.12 names the interpreter.
# Needs Python 3.12 with its venv module, and a network. Runs again in milliseconds when nothing that it depends on changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
lock=requirements/cpu-linux-x86_64.txt
bootstrap=requirements/bootstrap.txt
stamp=$venv/setup.stamp
say() { printf '%s\n' "$*" >&2; }

# ---- Is there anything to do? -------------------------------------------------------------------------------------------------
# The stamp holds the hash of everything that the environment is made from. The folder's own path is part of it: scripts in a
# venv name their interpreter by absolute path, so a tree that was moved or copied is set up again.
wanted=$({ pwd -P; cat "$lock" "$bootstrap" pyproject.toml megatron_dgrpo/__init__.py tools/setup.sh; } | sha256sum | cut -d' ' -f1)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi
if [[ $(uname -s) != Linux || $(uname -m) != x86_64 ]]; then
    say "The locked packages are for Linux on x86_64; this is $(uname -s) on $(uname -m)."
    say "Remedy: work on such a machine or in such a container, or install the extras 'cpu' and 'dev' of pyproject.toml by hand."
    exit 1
fi

# ---- Find Python 3.12 ---------------------------------------------------------------------------------------------------------
# A candidate is run, not only looked up: pyenv's shims exist for versions that are not selected, and then fail.
is_312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }
can_make_venvs() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

candidates() {
    printf '%s\n' python3.12 python3 python
    local root
    root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || printf '%s' "${HOME:-}/.pyenv")}
    ls -d "$root"/versions/3.12*/bin/python 2>/dev/null | sort -Vr || true
    uv python find --no-python-downloads 3.12 2>/dev/null || true
    ls -d "${XDG_DATA_HOME:-${HOME:-}/.local/share}"/uv/python/cpython-3.12*/bin/python3.12 2>/dev/null | sort -Vr || true
}

python=
without_venv=
if [[ -n ${PYTHON:-} ]]; then
    if ! is_312 "$PYTHON"; then
        say "PYTHON=$PYTHON does not run as Python 3.12. Remedy: name one that does, or unset PYTHON to have one found."
        exit 1
    fi
    if can_make_venvs "$PYTHON"; then python=$PYTHON; else without_venv=$PYTHON; fi
else
    while read -r candidate; do
        is_312 "$candidate" || continue
        if can_make_venvs "$candidate"; then python=$candidate; break; fi
        without_venv=${without_venv:-$candidate}
    done < <(candidates)
fi

if [[ -z $python && -n $without_venv ]]; then
    say "$without_venv is Python 3.12 without its venv module."
    say "Remedy: apt install python3.12-venv (Debian, Ubuntu), or name another with PYTHON=/path/to/python3.12."
    exit 1
elif [[ -z $python ]]; then
    say "No Python 3.12 was found (on PATH, in pyenv, in uv's folder). Any of these installs one:"
    say "  apt install python3.12 python3.12-venv      Debian 13 has 3.13 only; Ubuntu 24.04 has 3.12"
    say "  pyenv install 3.12"
    say "  uv python install 3.12"
    say "Then run this again, or name one that stands elsewhere: make setup PYTHON=/path/to/python3.12"
    exit 1
fi

# ---- Make the environment -----------------------------------------------------------------------------------------------------
rm -f "$stamp"
say "Setting up $venv with $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
if [[ -e $venv ]] && ! is_312 "$venv/bin/python"; then
    "$python" -m venv --clear "$venv" # left by another version, or its interpreter is gone
elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv "$venv"
fi
quiet=()
[[ -t 2 ]] || quiet=(--quiet)
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r "$bootstrap"
uv() { VIRTUAL_ENV=$PWD/$venv "$venv/bin/uv" "$@"; }
# Only wheels: nothing is built, so nothing but the locked bytes decides what is installed. Compiled here and once: a container
# that sets PYTHONDONTWRITEBYTECODE would otherwise compile vLLM at every start (25 s against 9 s).
uv pip sync "${quiet[@]}" --require-hashes --only-binary :all: --compile-bytecode "$lock" "$bootstrap"
uv pip install "${quiet[@]}" --no-deps --no-build-isolation --editable .
printf '%s\n' "$wanted" >"$stamp"
say "Ready: $venv/bin/dgrpo doctor"
