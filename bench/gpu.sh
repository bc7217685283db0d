#!/usr/bin/env bash
# Every GPU figure of the README, in four parts of at most nine minutes each. `bench/gpu.sh --help` says how.
# PYTHON chooses the interpreter, which has the packages of the pipeline and of the tests (python3).
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
    echo "gpu.sh: got no interpreter $python; expected Python 3.10 or newer; set PYTHON" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "gpu.sh: got $("$python" --version 2>&1); expected Python 3.10 or newer; set PYTHON" >&2
    exit 2
fi
exec "$python" "$here/_gpu_day.py" "$@"
