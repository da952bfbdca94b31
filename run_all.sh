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
run methods/cal_dpo.py --overwrite
run methods/dpo_gamma.py --overwrite
run studies/dpo_gamma_figures.py
run methods/ranking_accuracy.py --overwrite
run methods/generate.py --model results/dpo --overwrite
run methods/dpl.py --overwrite
run methods/twisted_smc.py --overwrite
run methods/imh_adaptors.py --overwrite
