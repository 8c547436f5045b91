#!/usr/bin/env bash
# Installs pinned requirement files into a virtual environment, which is made if need be:
#
#   requirements/install.sh VENV FILE...
#
# By uv, which takes a third of pip's time, where the package index has it; else by pip. The pins are complete, so no
# dependency is resolved: that would bring packages that break the CPU build of torch.
set -euo pipefail
venv=$1
shift
python=$venv/bin/python
files=()
for file in "$@"; do files+=(-r "$file"); done
torch_cpu=https://download.pytorch.org/whl/cpu # has the CPU build of torch, which PyPI has not

test -x "$python" || "${PYTHON:-python3.11}" -m venv "$venv"

of_pip() { "$python" -m pip config get "global.$1" 2>/dev/null || true; }

by_uv() {
    # uv does not read pip's configuration: these are its own names for the same settings.
    env UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(of_pip find-links)}}" \
        UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$(of_pip index-url)}}" \
        "$venv/bin/uv" pip install --quiet --python "$python" --no-deps --compile-bytecode "$@"
}

by_pip() { "$python" -m pip install --quiet --no-deps "$@"; }

test -x "$venv/bin/uv" || by_pip uv==0.13.9 || echo "uv cannot be installed; pip is used" >&2
if ! test -x "$venv/bin/uv" || ! { by_uv "${files[@]}" 2>/dev/null ||
    by_uv --index "$torch_cpu" --index-strategy unsafe-best-match "${files[@]}"; }; then
    by_pip "${files[@]}" || by_pip --extra-index-url "$torch_cpu" "${files[@]}"
fi
