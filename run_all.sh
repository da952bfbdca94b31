#!/usr/bin/env bash
# Every method once, at its default setting: the tiny world, on this machine.  Two at a time, one thread each; a line for
# each that has ended, and all that it printed in results/log/.  PYTHON=... chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p results/log

run() {  # name, then what python is to run
  local name=$1 start=$SECONDS
  shift
  if "${PYTHON:-python}" "$@" >"results/log/$name.txt" 2>&1; then
    echo "$name: $((SECONDS - start)) s, results/log/$name.txt"
  else
    echo "$name: FAILED, results/log/$name.txt: $(tail -n 1 "results/log/$name.txt")"
    return 1
  fi
}

one() {
  run dpl methods/dpl.py --overwrite &&
    run dpo_gamma methods/dpo_gamma.py --overwrite &&
    run dpo_gamma_figures studies/dpo_gamma_figures.py
}

other() {  # generate answers with the DPO model
  run dpo methods/dpo.py --overwrite &&
    run generate methods/generate.py --model results/dpo --overwrite &&
    run cal_dpo methods/cal_dpo.py --overwrite &&
    run sft methods/sft.py --overwrite &&
    run twisted_smc methods/twisted_smc.py --overwrite &&
    run imh_adaptors methods/imh_adaptors.py --overwrite
}

run tiny_world -c "import common; common.tiny_folder()" || exit 1
one &
first=$!
other &
second=$!
failed=0
wait $first || failed=1
wait $second || failed=1
run ranking_accuracy methods/ranking_accuracy.py --overwrite || failed=1  # of the models that were trained
exit $failed
