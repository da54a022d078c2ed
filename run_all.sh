#!/usr/bin/env bash
# The truth: every command of a reproduction, in order.
#
#     bash run_all.sh [RECIPE] [--seeds N] [--plan]
#
# RECIPE: a name in recipes/ or a TOML file; without one: paper_1.5b where 8 cards are, else toy. Each command is printed before
# it runs and its output kept in runs/RECIPE/logs; a command that has finished is not run again, one that was stopped goes on
# where it stopped. --plan only prints commands, tokens, memory, hours, disk and what is missing here.
# Several nodes: start it on each with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set, on a shared file system.
set -euo pipefail
cd "$(dirname "$0")"

recipe="" seeds="" plan=""
while [ $# -gt 0 ]; do
  case "$1" in
    --seeds) seeds="${2:?--seeds needs a number}"; shift 2 ;;
    --plan) plan=1; shift ;;
    -h|--help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "error: unknown option $1 (see --help)" >&2; exit 2 ;;
    *) recipe="$1"; shift ;;
  esac
done
bare=.venv/bin/python                                # plan.py needs Python alone: it speaks before anything is installed
[ -x $bare ] || bare="${PYTHON:-python3}"
"$bare" -c 'import tomllib' 2>/dev/null || { echo "error: Python 3.11 or newer is needed, as python3 or in PYTHON" >&2; exit 2; }
GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
if [ -z "$recipe" ]; then
  recipe=toy
  [ "$GPUS" -ge 8 ] && recipe=paper_1.5b
  echo "no recipe named, $GPUS cards here: running '$recipe'"
fi
[ -f "$recipe" ] || recipe="recipes/$recipe.toml"
[ -f "$recipe" ] || { echo "error: no recipe $recipe; there are: $(cd recipes && echo *.toml)" >&2; exit 2; }

variables="$("$bare" -m tools.plan "$recipe" --shell)"     # arms, rlvr_arms, benchmarks, ... of the recipe's [run], shell-quoted
eval "$variables"
seeds="${seeds:-$n_seeds}"
if [ "$seeds" -gt 1 ]; then                           # the study: controls come with more seeds
  arms+=(${study_arms[@]+"${study_arms[@]}"}) rlvr_arms+=(${study_rlvr_arms[@]+"${study_rlvr_arms[@]}"})
fi
NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}"
run="${RUNS:-runs}/$(basename "$recipe" .toml)"
if [ -n "$plan" ]; then
  NPROC="${NPROC:-${cards:-1}}"
else
  "$bare" -m tools.plan "$recipe" --check                  # what is missing here is said now, not hours later
  source ./setup.sh
  NPROC="${NPROC:-$GPUS}"                            # ranks on this node: a card each; NPROC=2 tries two ranks on a CPU
  mkdir -p "$run/logs"
fi
[ "$GPUS" -gt 0 ] || export OMP_NUM_THREADS=1        # one thread per process beats two, on two cores
export TOKENIZERS_PARALLELISM=false

ranks=(python)                                       # how a script that uses all cards is started
if [ "$NPROC" -gt 1 ] || [ "$NNODES" -gt 1 ]; then
  ranks=(torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$NPROC" --log_dir "$run/logs/ranks" --tee 3)
  [ "$NNODES" -gt 1 ] && ranks+=(--rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:?}:${MASTER_PORT:-29500}") || ranks+=(--standalone)
fi

# step NAME COMMAND...: run once, log, remember. On the other nodes a single-process command is waited for.
step() {
  local name="$1" mark="$run/logs/$1.done" begin=$SECONDS; shift
  [ "$(head -n 1 "$mark" 2>/dev/null)" = "$*" ] && return 0
  if [ "$NODE_RANK" -gt 0 ] && [ "$1" = python ]; then
    until [ "$(head -n 1 "$mark" 2>/dev/null)" = "$*" ]; do sleep 2; done
    return 0
  fi
  echo "+ $*"
  mkdir -p "$(dirname "$mark")"
  if [ "$side_by_side" = 1 ]; then "$@" > >(tee "$run/logs/$name.log") 2>&1 &
  else "$@" > "$run/logs/$name.log" 2>&1 & fi
  wait $! || {                                       # in the background and waited for, so that a signal is acted on at once
    local code=$?
    tail -n 20 "$run/logs/$name.log" >&2
    grep -E '(^|\]:)error: ' "$run/logs/$name.log" | head -n 3 >&2 || true    # a rank's own message, above torchrun's summary
    echo "error: '$name' ended with code $code; its log is $run/logs/$name.log; the same command goes on from here" >&2
    exit "$code"
  }
  printf '%s\nseconds %s\n' "$*" "$((SECONDS - begin))" > "$mark"
  echo "  done: $name, $((SECONDS - begin)) s"
}

fail() { trap - INT TERM; kill $(jobs -p) 2>/dev/null; wait; exit "$1"; }     # our own children, which save and leave; nobody else's
trap 'fail 130' INT TERM
pids=()
spawn() {                                            # at most side_by_side at once; the first failure ends the run
  while [ "$(jobs -rp | wc -l)" -ge "$side_by_side" ]; do wait -n || fail $?; done
  (trap 'fail 130' INT TERM; "$@") & pids+=($!)
}
join() { for pid in "${pids[@]}"; do wait "$pid" || fail $?; done; pids=(); }

grade_and_score() {                                  # DATA NAME [score flags]
  step "$s/verify-$2" python 02_verify_score.py verify --recipe "$recipe" --samples "$1/$2.jsonl" --problems "$1/problems.jsonl" --out "$1/$2.verified.jsonl"
  step "$s/score-$2" "${ranks[@]}" 02_verify_score.py score --recipe "$recipe" --samples "$1/$2.verified.jsonl" --model "$base" --out "$1/$2.scored.jsonl" "${@:3}"
}
self() {
  step "$s/sample-self" "${ranks[@]}" 01_sample.py model --recipe "$recipe" --model "${self_model:-$base}" --problems "$1/problems.jsonl" --out "$1/self.jsonl" --seed "$seed"
  grade_and_score "$1" self --only wrong
}
evaluate() {                                         # MODEL OUT
  step "$s/${2#"$run/$s/"}" "${ranks[@]}" 05_eval.py --recipe "$recipe" --model "$1" --problems "${tests[@]}" --out "$2" --seed "$seed"
}
arm() {                                              # select, train, evaluate; then RLVR and evaluate
  local a="$1" d="$run/$s/$1"
  step "$s/$a/select" python 02_verify_score.py select --recipe "$recipe" --arm "$a" --teacher "$data/teacher.scored.jsonl" --self "$data/self.scored.jsonl" --out "$d/train.jsonl" --seed "$seed"
  step "$s/$a/sft" "${ranks[@]}" 03_train_oxa.py --recipe "$recipe" --model "$base" --data "$d/train.jsonl" --out "$d/sft" --seed "$seed"
  evaluate "$d/sft" "$d/eval"
  [ "$i" -ge "${rlvr_seeds:-$seeds}" ] && return 0
  case " ${rlvr_arms[*]} " in *" $a "*)
    local limit=()
    [ "$a" = sft_lp ] && [ -n "${sft_lp_rlvr_max_tokens:-}" ] && limit=(--max-response-tokens "$sft_lp_rlvr_max_tokens")
    step "$s/$a/rlvr" "${ranks[@]}" 04_rlvr.py --recipe "$recipe" --model "$d/sft" --problems "$data/rlvr.jsonl" --out "$d/rlvr" --seed "$seed" "${limit[@]}"
    evaluate "$d/rlvr" "$d/eval_rlvr" ;;
  esac
}

everything() {
for ((i = 0; i < seeds; i++)); do
  seed=$((first_seed + i)) s="seed-$((first_seed + i))"
  data="$run/$s/data"
  [ "$data_per_seed" = true ] || data="$run/data"
  tests=("${benchmarks[@]/#/$data/}") && tests=("${tests[@]/%/.jsonl}")
  [ -n "$plan" ] || mkdir -p "$data" "$run/$s"
  # 1 data: problems, teacher traces, benchmarks
  if [ "$world" != none ]; then
    base="toy/$world_base"
    step "$s/world" python toy/world.py --world "$world" --out "$data" --seed "$seed" "${world_args[@]}"
    step "$s/teacher" python 01_sample.py teacher --recipe "$recipe" --source "$data/teacher_source.jsonl" --model "$base" --name teacher --out "$data/teacher.jsonl" --problems "$data/problems.jsonl" --answers join
  else
    base="$run/base"
    step prepare-base python -m tools.prepare_base --recipe "$recipe" --model "$base_model" --out "$base"
    for b in "${benchmarks[@]}"; do
      source_of="source_$b"
      step "problems-$b" python 01_sample.py problems --source "${!source_of}" --out "$data/$b.jsonl"
    done
    step teacher python 01_sample.py teacher --recipe "$recipe" --model "$base" --out "$data/teacher.jsonl" --problems-out "$data/problems.jsonl" --benchmarks "${tests[@]}"
    step problems-rlvr python 01_sample.py problems --recipe "$recipe" --source "$rlvr_source" --out "$data/rlvr.jsonl" --benchmarks "${tests[@]}"
  fi
  # 2 verify and score; the base's own wrong answers
  spawn grade_and_score "$data" teacher; spawn self "$data"; join
  # 3 to 5 the arms
  spawn evaluate "$base" "$run/$s/base/eval"
  for a in "${arms[@]}"; do spawn arm "$a"; done
  join
done
rm -f "$run/logs/report.done"                        # a report is cheap, and the run may have grown
step report python -m tools.report --recipe "$recipe" "$run"
}

if [ -n "$plan" ]; then
  step() { shift; echo "$*"; }
  spawn() { "$@"; }
  join() { :; }
  everything | "$bare" -m tools.plan "$recipe"
  exit
fi
everything
cat "$run/logs/report.log"
