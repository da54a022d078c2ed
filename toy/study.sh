#!/usr/bin/env bash
# The whole toy study: the main run with controls, the contrast world, longer RLVR, the ablations, what explains it, the report.
#
#     bash toy/study.sh [SEEDS [PART...]]      SEEDS of the main run, 5 without it
#
# Parts, in this order, all without any: main, contrast, longer, ablations, explain, report.
# Each command is printed before it runs; what has finished is not run again, what was stopped goes on where it stopped.
# At most two processes side by side (SIDE_BY_SIDE), one thread each. Ablations go to runs/toy/ablations/seed-S/NAME-VALUE; the
# value that the main run has is its own arm (ul_weight: oxa_full; mu_quantile: oxa_mle) and is not run again. A cap says
# something only where queries are few: its ablation is made on a fifth of the teacher's rows and asks for 400 examples.
set -euo pipefail
cd "$(dirname "$0")/.."
seeds="${1:-5}" parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(main contrast longer ablations explain report)
[[ "$seeds" =~ ^[1-9][0-9]*$ ]] || { echo "error: SEEDS must be a number, not '$seeds'" >&2; exit 2; }
for part in "${parts[@]}"; do
  case $part in main|contrast|longer|ablations|explain|report) ;; *) echo "error: no part '$part' (see the head of $0)" >&2; exit 2 ;; esac
done
source ./setup.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

recipe=recipes/toy.toml runs="${RUNS:-runs}"
run="$runs/toy" easy="$runs/toy_easy"

say() { echo "+ $*"; "$@"; }
step() {                                              # DIR NAME COMMAND...: log to DIR/NAME.log, remember in DIR/NAME.done
  local log="$1/$2.log" mark="$1/$2.done"; shift 2
  [ "$(cat "$mark" 2>/dev/null)" = "$*" ] && return 0
  echo "+ $*"
  "$@" > "$log" 2>&1 || { tail -n 20 "$log" >&2; echo "error: failed; its log is $log" >&2; exit 1; }
  echo "$*" > "$mark"
}
arm() {                                               # DIR SEED DATA [training flags]: train, evaluate
  step "$1" sft python 03_train_oxa.py --recipe "$recipe" --model toy/base --data "$3" --out "$1/sft" --seed "$2" "${@:4}"
  evaluate "$1" "$2" "$1/sft"
}
evaluate() {                                          # DIR SEED MODEL
  local data="$run/seed-$2/data"
  step "$1" eval python 05_eval.py --recipe "$recipe" --model "$3" --problems "$data/id.jsonl" "$data/hard.jsonl" --out "$1/eval" --seed "$2"
}
ablation() {                                          # SEED NAME VALUE
  local d="$run/ablations/seed-$1/$2-$3" s="$run/seed-$1"
  local teacher="$s/data/teacher.scored.jsonl" flags=()
  mkdir -p "$d"
  case "$2" in
    ul_weight) arm "$d" "$1" "$s/oxa_full/train.jsonl" --ul-weight "$3"; return ;;
    mu_quantile) flags=(--mu-quantile "$3") ;;
    cap)
      flags=(--cap "$3" --n-ce 400)
      head -n $(($(wc -l < "$teacher") / 5)) "$teacher" > "$d/teacher.jsonl"
      teacher="$d/teacher.jsonl" ;;
  esac
  step "$d" select python 02_verify_score.py select --recipe "$recipe" --arm oxa_mle --teacher "$teacher" --out "$d/train.jsonl" --seed "$1" "${flags[@]}"
  arm "$d" "$1" "$d/train.jsonl"
}
longer() {                                            # how the lead closes: 40 steps of RLVR instead of 15, first seed
  local a d
  for a in sft oxa_full; do
    d="$run/longer/$a"
    mkdir -p "$d"
    spawn rlvr_and_evaluate "$d" "$run/seed-0/$a/sft"
  done
  join
}
rlvr_and_evaluate() {                                 # DIR MODEL
  step "$1" rlvr python 04_rlvr.py --recipe "$recipe" --model "$2" --problems "$run/seed-0/data/rlvr.jsonl" --out "$1/rlvr" --seed 0 --max-steps 40
  evaluate "$1" 0 "$1/rlvr"
}
spawn() {                                             # two at once; the first failure ends the study
  while [ "$(jobs -rp | wc -l)" -ge "${SIDE_BY_SIDE:-2}" ]; do wait -n || exit $?; done
  "$@" & pids+=($!)
}
join() { for pid in "${pids[@]}"; do wait "$pid" || exit $?; done; pids=(); }
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM
pids=()

main() { say bash run_all.sh toy --seeds "$seeds"; }
contrast() { say bash run_all.sh toy_easy; }
ablations() {
  local value seed
  for value in 0.3 0.5 0.7 0.85; do spawn ablation 0 mu_quantile "$value"; done
  for value in 1 2 6; do spawn ablation 0 cap "$value"; done
  for ((seed = 0; seed < seeds && seed < 3; seed++)); do
    for value in 1e-3 1e-2 1e-1; do spawn ablation "$seed" ul_weight "$value"; done
  done
  join
}
explain() { say python toy/explain.py "$run" --contrast "$easy"; }
report() { say python -m tools.report --recipe "$recipe" "$run" --contrast "$easy"; }

for part in "${parts[@]}"; do "$part"; done
