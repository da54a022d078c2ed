#!/usr/bin/env bash
# The whole toy study: the main run with controls, the ablations, what explains it, the report.
#
#     bash toy/study.sh [SEEDS [PART...]]      SEEDS of the main run, 5 without it
#
# Parts, in this order, all without any: main, ablations, explain, report.
# Each command is printed before it runs; what has finished is not run again, what was stopped goes on where it stopped.
# At most two processes side by side (ablations: SIDE_BY_SIDE), one thread each. Ablations, on the first seed, go to
# runs/toy/ablations/NAME-VALUE; the value that the main run has is its own arm (ul_weight: oxa_full; mu and cap: oxa_mle) and
# is not run again. With a cap above 1 the number of examples stays, so fewer queries are used.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds="${1:-5}" parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(main ablations explain report)
[[ "$seeds" =~ ^[1-9][0-9]*$ ]] || { echo "error: SEEDS must be a number, not '$seeds'" >&2; exit 2; }
for part in "${parts[@]}"; do
  case $part in main|ablations|explain|report) ;; *) echo "error: no part '$part' (see the head of $0)" >&2; exit 2 ;; esac
done
source ./setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

recipe=recipes/toy.toml runs="${RUNS:-runs}"
run="$runs/toy" seed=0
s="$run/seed-$seed"

say() { echo "+ $*"; "$@"; }
step() {                                              # DIR NAME COMMAND...: log to DIR/NAME.log, remember in DIR/NAME.done
  local log="$1/$2.log" mark="$1/$2.done"; shift 2
  [ "$(cat "$mark" 2>/dev/null)" = "$*" ] && return 0
  echo "+ $*"
  "$@" > "$log" 2>&1 || { tail -n 20 "$log" >&2; echo "error: failed; its log is $log" >&2; exit 1; }
  echo "$*" > "$mark"
}
ablation() {                                          # NAME VALUE ARM: select unless it is about training, train, evaluate
  local d="$run/ablations/$1-$2" data="$s/$3/train.jsonl" select=() train=()
  mkdir -p "$d"
  case "$1" in
    ul_weight) train=(--ul-weight "$2") ;;            # the same training set as the run's own arm
    mu_quantile) select=(--mu-quantile "$2") ;;
    cap) select=(--cap "$2") ;;
  esac
  if [ ${#select[@]} -gt 0 ]; then
    data="$d/train.jsonl"
    step "$d" select python 02_verify_score.py select --recipe "$recipe" --arm "$3" --teacher "$s/data/teacher.scored.jsonl" --self "$s/data/self.scored.jsonl" --out "$data" --seed "$seed" "${select[@]}"
  fi
  step "$d" sft python 03_train_oxa.py --recipe "$recipe" --model toy/base --data "$data" --out "$d/sft" --seed "$seed" "${train[@]}"
  step "$d" eval python 05_eval.py --recipe "$recipe" --model "$d/sft" --problems "$s/data/id.jsonl" "$s/data/hard.jsonl" --out "$d/eval" --seed "$seed"
}
spawn() {                                             # two at once; the first failure ends the study
  while [ "$(jobs -rp | wc -l)" -ge "${SIDE_BY_SIDE:-2}" ]; do wait -n || exit $?; done
  "$@" & pids+=($!)
}
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM
pids=()

main() { say bash run_all.sh toy --seeds "$seeds"; }
ablations() {
  local value pid
  for value in 0.3 0.5 0.7 0.9; do spawn ablation mu_quantile "$value" oxa_mle; done
  for value in 2 6; do spawn ablation cap "$value" oxa_mle; done
  for value in 1e-3 1e-2 1e-1; do spawn ablation ul_weight "$value" oxa_full; done
  for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
}
explain() { say python toy/explain.py "$run"; }
report() { say python report.py --recipe "$recipe" "$run"; }

for part in "${parts[@]}"; do "$part"; done
