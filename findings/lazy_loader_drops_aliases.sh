#!/usr/bin/env bash
# lazy-loader 0.6 (PyPI), Python 3.11: a stub with an alias is read without it.
#
# A package's `__init__.pyi` may say `from .inner import work as run`; type checkers then see the name `run`.
# `lazy_loader.attach_stub` reads the same stub, but takes the name before `as` only: at run time the package has `work`,
# which the stub does not promise, and not `run`, which it does. Nothing is said at import; the first use of `run` is an
# ImportError. So a name that is to be public under another word has to be defined under that word in its module.
#
# Output seen:
#     names at run time: ['work']
#     run: ImportError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lazy-loader==0.6
mkdir "$folder/tools"
cat > "$folder/tools/inner.py" <<'PY'
def work():
    return 1
PY
cat > "$folder/tools/__init__.py" <<'PY'
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
PY
echo 'from .inner import work as run' > "$folder/tools/__init__.pyi"
found=$(cd "$folder" && venv/bin/python - <<'PY'
import tools

print("names at run time:", tools.__all__)
try:
    from tools import run
    print("run: imported", run)
except ImportError as error:
    print("run:", type(error).__name__)
PY
)
echo "$found"
[ "$found" = "$(printf "names at run time: ['work']\nrun: ImportError")" ]
