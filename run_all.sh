#!/usr/bin/env bash
# Every method once, at its default setting: the tiny world, on this machine.  PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
run() {
  echo "== python $*"
  "${PYTHON:-python}" "$@"
}
run methods/sft.py --overwrite
run methods/dpo.py --overwrite
run methods/generate.py --overwrite
