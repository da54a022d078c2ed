#!/usr/bin/env bash
# Every command of a reproduction, in order: data, perplexities, training sets, fine-tuning, RLVR,
# evaluation, report.
#
#     bash run_all.sh [RECIPE] [--seeds N] [--plan]
#
# RECIPE: a name in recipes/ or a TOML file; without one: paper_1.5b where 8 GPUs are, else toy.
# --plan runs nothing: it prints the commands with their tokens, memory, hours and disk, and says
# what is missing here.
# A command that has finished is not run again, unless the recipe's values for it or its inputs have
# changed; one that was stopped goes on where it stopped. Output is kept in runs/RECIPE/logs.
# By hand: `source tools/jobs.sh; begin RECIPE` in a bash, then paste from `out=` on, with seed and
# arm set (seed=42 arm=sft), one command at a time.
# Several nodes, with a shared file system: start it on each with NNODES, NODE_RANK, MASTER_ADDR
# (and MASTER_PORT) set.
set -euo pipefail
cd "$(dirname "$0")"
case "${1-}" in -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit ;; esac

# step, spawn, join and show; and what the recipe says: $recipe, $run (where everything goes),
# $base, $warmup, ${seeds[@]}, ${arms[@]}, ${benchmarks[@]}, ... A script after "${ranks[@]}" runs
# on all GPUs, after python in one process.
source tools/jobs.sh
begin "$@"

for seed in "${seeds[@]}"; do

out="$run/seed-$seed"
data="$run/data" data_seed="${seeds[0]}"         # one import for all seeds,
if [ "$data_per_seed" = true ]; then             # or data of its own for each
  data="$out/data" data_seed="$seed"
fi
tests=("${benchmarks[@]/#/$data/}")              # $data/NAME.jsonl of each benchmark
tests=("${tests[@]/%/.jsonl}")
in_data="${data#"$run"/}" in_out="seed-$seed"    # names of steps and of their logs begin like this

# 1. Data: problems with their answers, teacher traces, benchmarks, the RLVR prompts.
warmup_data="$warmup"                            # training sets of a base and of a teacher, if any
teacher_data="$teacher_solutions"
if [ "$world" = word-problems ]; then

  # Everything but the traces, which a model has to write. (A recipe may name solutions too.)
  step "$in_data/world" python toy/word_problems.py "${world_args[@]}" \
    --out "$data" --seed "$data_seed"
  warmup_data="${warmup:-$data/warmup.jsonl}"
  teacher_data="${teacher_solutions:-$data/solutions.jsonl}"

elif [ "$world" != none ]; then

  # The toy makes its own.
  step "$in_data/world" python toy/world.py --world "$world" "${world_args[@]}" \
    --out "$data" --seed "$data_seed"

  step "$in_data/teacher" python 01_sample.py teacher --recipe "$recipe" --model "$base" \
    --source "$data/teacher_source.jsonl" --name teacher --answers join \
    --problems "$data/problems.jsonl" --out "$data/teacher.jsonl"

fi

if [ -n "$base_model" ]; then

  # The base with enough positions, without a system prompt, stopping at both end tokens.
  step prepare-base python -m tools.prepare_base --recipe "$recipe" \
    --model "$base_model" --out "$run/base"
  base="$run/base"

  # A base that does not know the format gets a short fine-tuning on a few solutions first:
  # `warmup`, a training set as 03 reads it. Its settings are [train]'s, but for the epochs.
  if [ -n "$warmup_data" ]; then
    step "$in_data/warmup" "${ranks[@]}" 03_train_oxa.py --recipe "$recipe" --model "$base" \
      --data "$warmup_data" --epochs "$warmup_epochs" --out "$data/base" --seed "$data_seed"
    base="$data/base"
  fi

fi

if [ "$world" = none ]; then

  # The benchmarks come first: training problems that overlap them are dropped.
  for benchmark in "${benchmarks[@]}"; do
    step "$in_data/$benchmark" python 01_sample.py problems \
      --source "${source_of[$benchmark]}" --out "$data/$benchmark.jsonl"
  done

  if [ -n "$problems_source" ]; then
    # Problems that a teacher has to solve.
    step "$in_data/problems" python 01_sample.py problems --source "$problems_source" \
      --benchmarks "${tests[@]}" --out "$data/problems.jsonl"
  else
    # Verified teacher traces, several per problem.
    step "$in_data/teacher" python 01_sample.py teacher --recipe "$recipe" --model "$base" \
      --benchmarks "${tests[@]}" --out "$data/teacher.jsonl" --problems-out "$data/problems.jsonl"
  fi

  # The prompts of RLVR.
  overlap=()
  if [ "$rlvr_drop_overlap" = true ]; then overlap=(--benchmarks "${tests[@]}"); fi
  step "$in_data/rlvr" python 01_sample.py problems --recipe "$recipe" \
    --source "$rlvr_source" "${overlap[@]}" --out "$data/rlvr.jsonl"

fi

# A teacher that is a model: `teacher_model`, or the base, fine-tuned on `teacher_solutions` if the
# recipe names some. Its samples are verified like any others, so wrong ones do no harm.
teacher="${teacher_model:-$base}"
if [ -n "$teacher_data" ]; then
  step "$in_data/train-teacher" "${ranks[@]}" 03_train_oxa.py --recipe "$recipe" \
    --model "$teacher" --data "$teacher_data" --epochs "$teacher_epochs" \
    --out "$data/teacher" --seed "$data_seed"
  teacher="$data/teacher"
fi
if [ "$teacher" != "$base" ]; then
  step "$in_data/teacher" "${ranks[@]}" 01_sample.py model --recipe "$recipe" --name teacher \
    --model "$teacher" --n "$teacher_samples" --problems "$data/problems.jsonl" \
    --out "$data/teacher.jsonl" --seed "$data_seed"
fi

# Self-distillation: samples of the base, or of its R1-distilled sibling. Of these the wrong ones
# are of use later.
spawn "$in_data/sample-self" "${ranks[@]}" 01_sample.py model --recipe "$recipe" \
  --model "${self_model:-$base}" --problems "$data/problems.jsonl" --out "$data/self.jsonl" \
  --seed "$data_seed"

# 2. Which responses are right, and how likely did the base find them?
spawn "$in_data/verify-teacher" python 02_verify_score.py verify --recipe "$recipe" \
  --samples "$data/teacher.jsonl" --problems "$data/problems.jsonl" \
  --out "$data/teacher.verified.jsonl"
join

spawn "$in_data/verify-self" python 02_verify_score.py verify --recipe "$recipe" \
  --samples "$data/self.jsonl" --problems "$data/problems.jsonl" --out "$data/self.verified.jsonl"

spawn "$in_data/score-teacher" "${ranks[@]}" 02_verify_score.py score --recipe "$recipe" \
  --model "$base" --samples "$data/teacher.verified.jsonl" --out "$data/teacher.scored.jsonl"
join

spawn "$in_data/score-self" "${ranks[@]}" 02_verify_score.py score --recipe "$recipe" --only wrong \
  --model "$base" --samples "$data/self.verified.jsonl" --out "$data/self.scored.jsonl"

# Where the base stands before any training.
spawn "$in_out/base/eval" "${ranks[@]}" 05_eval.py --recipe "$recipe" --model "$base" \
  --problems "${tests[@]}" --out "$out/base/eval" --seed "$seed"
join

# The training set of each arm: by Gaussian-guided perplexity sampling, with high-confidence errors,
# or by neither.
for arm in "${arms[@]}"; do
  spawn "$in_out/$arm/select" python 02_verify_score.py select --recipe "$recipe" --arm "$arm" \
    --teacher "$data/teacher.scored.jsonl" --self "$data/self.scored.jsonl" \
    --out "$out/$arm/train.jsonl" --seed "$seed"
done
join

# 3. Fine-tuning: cross entropy on low-confidence truths, unlikelihood on high-confidence errors.
for arm in "${arms[@]}"; do
  spawn "$in_out/$arm/sft" "${ranks[@]}" 03_train_oxa.py --recipe "$recipe" --model "$base" \
    --data "$out/$arm/train.jsonl" --out "$out/$arm/sft" --seed "$seed"
done
join

# 5. Evaluation of the fine-tuned models: Pass@1, Pass@k, entropy. (RLVR takes by far the longest.)
for arm in "${arms[@]}"; do
  spawn "$in_out/$arm/eval" "${ranks[@]}" 05_eval.py --recipe "$recipe" \
    --model "$out/$arm/sft" --problems "${tests[@]}" --out "$out/$arm/eval" --seed "$seed"
done

# 4. RLVR: GRPO with verifiable reward. An arm has a response limit of its own with
# rlvr_limits = "published".
if is_in "$seed" "${rlvr_seeds[@]}"; then
  for arm in "${rlvr_arms[@]}"; do
    spawn "$in_out/$arm/rlvr" "${ranks[@]}" 04_rlvr.py --recipe "$recipe" \
      --model "$out/$arm/sft" --problems "$data/rlvr.jsonl" --out "$out/$arm/rlvr" --seed "$seed" \
      ${rlvr_limit[$arm]:+--max-response-tokens "${rlvr_limit[$arm]}"}
  done
  join

  for arm in "${rlvr_arms[@]}"; do
    spawn "$in_out/$arm/eval_rlvr" "${ranks[@]}" 05_eval.py --recipe "$recipe" \
      --model "$out/$arm/rlvr" --problems "${tests[@]}" --out "$out/$arm/eval_rlvr" --seed "$seed"
  done
fi

done
join

# 6. Report: what the run showed, with intervals and verdicts.
show python -m tools.report --recipe "$recipe" "$run"
