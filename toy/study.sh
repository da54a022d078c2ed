#!/usr/bin/env bash
# The whole toy study: the main run with controls, the contrast world, longer RLVR, the ablations,
# what explains it, the report.
#
#     bash toy/study.sh [SEEDS [PART...]]      SEEDS of the main run, 5 without it
#
# Parts, in this order, all without any: main, contrast, longer, ablations, explain, report.
# What has finished is not run again, what was stopped goes on where it stopped (tools/jobs.sh). Two
# processes run side by side (SIDE_BY_SIDE), one thread each. Ablations go to
# runs/toy/ablations/seed-S/NAME-VALUE; the value that the main run has is its own arm (ul_weight:
# oxa_full; mu_quantile: oxa_mle) and is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/jobs.sh             # step, spawn, join, show

n_seeds="${1:-5}" parts=("${@:2}")
[[ "$n_seeds" =~ ^[1-9][0-9]{0,2}$ ]] || fail "SEEDS must be a number, not '$n_seeds'"
if [ ${#parts[@]} = 0 ]; then parts=(main contrast longer ablations explain report); fi
for part in "${parts[@]}"; do
  is_in "$part" main contrast longer ablations explain report ||
    fail "no part '$part' (see the head of $0)"
done

plain_python
recipe=recipes/toy.toml
read_recipe "$recipe"
run="${RUNS:-runs}/toy" easy="${RUNS:-runs}/toy_easy"
logs="$run"                      # a step's log and mark stand beside what it makes
side_by_side="${SIDE_BY_SIDE:-2}"
whole_number SIDE_BY_SIDE "$side_by_side"
lock "$run/study.lock"
source ./setup.sh
watch_signals
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

main() { show bash run_all.sh toy --seeds "$n_seeds"; }

contrast() { show bash run_all.sh toy_easy; }

# How the lead closes: 40 steps of RLVR instead of 15, first seed.
longer() {
  local arm
  for arm in sft oxa_full; do
    spawn "longer/$arm/rlvr" python 04_rlvr.py --recipe "$recipe" --max-steps 40 --seed 0 \
      --model "$run/seed-0/$arm/sft" --problems "$run/seed-0/data/rlvr.jsonl" \
      --out "$run/longer/$arm/rlvr"
  done
  join
  for arm in sft oxa_full; do
    evaluate "longer/$arm" 0 "$run/longer/$arm/rlvr"
  done
  join
}

# The Gaussian's centre, the cap per query, the weight of the unlikelihood loss; each is trained and
# evaluated as an arm is.
ablations() {
  local value seed name trained=()
  local teacher="$run/seed-0/data/teacher.scored.jsonl" few="$run/ablations/few_queries.jsonl"
  local select=(python 02_verify_score.py select --recipe "$recipe" --arm oxa_mle --seed 0)

  for value in 0.3 0.5 0.7 0.85; do
    name="ablations/seed-0/mu_quantile-$value" trained+=("$name")
    spawn "$name/select" "${select[@]}" --teacher "$teacher" --mu-quantile "$value" \
      --out "$run/$name/train.jsonl"
  done

  # A cap says something only where queries are few: a fifth of the teacher's rows, 400 examples.
  mkdir -p "$run/ablations"
  if [ ! "$few" -nt "$teacher" ]; then
    head -n $(($(wc -l < "$teacher") / 5)) "$teacher" > "$few.tmp"
    mv "$few.tmp" "$few"
  fi
  for value in 1 2 6; do
    name="ablations/seed-0/cap-$value" trained+=("$name")
    spawn "$name/select" "${select[@]}" --teacher "$few" --cap "$value" --n-ce 400 \
      --out "$run/$name/train.jsonl"
  done
  join
  for name in "${trained[@]}"; do
    spawn "$name/sft" python 03_train_oxa.py --recipe "$recipe" --model toy/base --seed 0 \
      --data "$run/$name/train.jsonl" --out "$run/$name/sft"
  done

  for ((seed = 0; seed < n_seeds && seed < 3; seed++)); do
    for value in 1e-3 1e-2 1e-1; do
      name="ablations/seed-$seed/ul_weight-$value" trained+=("$name")
      spawn "$name/sft" python 03_train_oxa.py --recipe "$recipe" --model toy/base --seed "$seed" \
        --ul-weight "$value" --data "$run/seed-$seed/oxa_full/train.jsonl" --out "$run/$name/sft"
    done
  done
  join
  for name in "${trained[@]}"; do
    seed="${name#ablations/seed-}"
    evaluate "$name" "${seed%%/*}" "$run/$name/sft"
  done
  join
}

evaluate() {                     # NAME SEED MODEL
  spawn "$1/eval" python 05_eval.py --recipe "$recipe" --model "$3" --seed "$2" \
    --out "$run/$1/eval" \
    --problems "$run/seed-$2/data/id.jsonl" "$run/seed-$2/data/hard.jsonl"
}

explain() { show python toy/explain.py "$run" --contrast "$easy"; }

report() { show python -m tools.report --recipe "$recipe" "$run" --contrast "$easy"; }

for part in "${parts[@]}"; do "$part"; done
