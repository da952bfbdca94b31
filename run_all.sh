#!/usr/bin/env bash
# Every method at its default setting: the tiny world, on this machine, about eight minutes on two cores.
#
#   bash run_all.sh               all that has not finished before, two at a time, one thread each
#   bash run_all.sh dpo cal_dpo   these, again
#
# A line for each as it begins and ends.  What it printed is in results/<name>/log.txt, all figures
# with their sentences in results/index.html.  PYTHON=... chooses the interpreter.
set -uo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-python}"
asked="$*"
mkdir -p results

run() {  # name, then what python is to run
  local name=$1 start=$SECONDS log="results/$1.log"
  shift
  if [ -n "$asked" ]; then
    [[ " $asked " == *" $name "* ]] || return 0
  elif [ -f "results/$name/log.txt" ]; then
    echo "$name: done before; bash run_all.sh $name runs it again"
    return 0
  fi
  echo "$name: begins"
  if ! "$python" "$@" >"$log" 2>&1; then
    echo "$name: FAILED, $log: $(tail -n 1 "$log")"
    return 1
  fi
  echo "$((SECONDS - start)) s" >>"$log"
  mkdir -p "results/$name"
  mv "$log" "results/$name/log.txt"
  echo "$name: $((SECONDS - start)) s; $(sed -n 's/^here:  //p' "results/$name/log.txt" | tail -n 1)"
}

names="dpl dpo_gamma dpo_gamma_figures compare-quick dpo generate cal_dpo sft twisted_smc imh_adaptors ranking_accuracy"
for name in $asked; do
  if [[ " $names " != *" $name "* ]]; then
    echo "no $name: choose from $names"
    exit 1
  fi
done

one() {  # nothing of these waits for another
  local failed=0
  run dpl methods/dpl.py --overwrite || failed=1
  run compare-quick studies/compare_preferences.py --quick || failed=1
  run twisted_smc methods/twisted_smc.py --overwrite || failed=1
  return $failed
}

other() {  # generate and imh draw from the DPO model; ranking reads all models that were trained
  local failed=0
  run dpo methods/dpo.py --overwrite &&
    run generate methods/generate.py --model results/dpo --overwrite || failed=1
  run imh_adaptors methods/imh_adaptors.py --overwrite || failed=1
  run cal_dpo methods/cal_dpo.py --overwrite || failed=1
  run sft methods/sft.py --overwrite || failed=1
  run dpo_gamma methods/dpo_gamma.py --overwrite &&
    run dpo_gamma_figures studies/dpo_gamma_figures.py || failed=1
  run ranking_accuracy methods/ranking_accuracy.py --overwrite || failed=1
  return $failed
}

"$python" -c "import common; common.tiny_folder()" || exit 1
one &
first=$!
other &
second=$!
failed=0
wait $first || failed=1
wait $second || failed=1
"$python" studies/summary.py || failed=1
exit $failed
