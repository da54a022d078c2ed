#!/usr/bin/env bash
# Every command of a reproduction, in order: data, perplexities, training sets, fine-tuning, RLVR, evaluation, report.
#
#     bash run_all.sh [RECIPE] [--seeds N] [--plan]
#
# RECIPE: a name in recipes/ or a TOML file; without one: paper_1.5b where 8 cards are, else toy. --plan runs nothing: it prints
# the commands with their tokens, memory, hours and disk, and says what is missing here.
# A command that has finished is not run again, unless the recipe's values for it or its inputs have changed; one that was
# stopped goes on where it stopped. Output is kept in runs/RECIPE/logs.
# By hand: `source tools/jobs.sh; begin RECIPE` in a bash, then `seed=42 arm=sft` and the commands below, one at a time.
# Several nodes: start it on each with NNODES, NODE_RANK, MASTER_ADDR (and MASTER_PORT) set, on a shared file system.
set -euo pipefail
cd "$(dirname "$0")"
case "${1-}" in -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit ;; esac

# step, spawn, join, show; and what the recipe's [run] says: $recipe, $run (where everything goes), $base and $self_model,
# ${seeds[@]}, ${arms[@]}, ${benchmarks[@]}, ... A script after "${ranks[@]}" runs on all cards, after python in one process.
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
in_data="${data#"$run"/}" in_out="seed-$seed"    # names of the steps, and of their logs, begin like this

# 1. Data: problems with their answers, teacher traces, benchmarks, the RLVR prompts.
if [ "$world" != none ]; then

  # The toy makes its own.
  step "$in_data/world" python toy/world.py --world "$world" --out "$data" --seed "$data_seed" "${world_args[@]}"

  step "$in_data/teacher" python 01_sample.py teacher --recipe "$recipe" \
    --source "$data/teacher_source.jsonl" --name teacher --model "$base" \
    --problems "$data/problems.jsonl" --answers join --out "$data/teacher.jsonl"

else

  # The base with 40,000 positions, without a system prompt, stopping at both end tokens.
  step prepare-base python -m tools.prepare_base --recipe "$recipe" --model "$base_model" --out "$base"

  # The benchmarks come first: training problems that overlap them are dropped.
  for benchmark in "${benchmarks[@]}"; do
    step "$in_data/$benchmark" python 01_sample.py problems \
      --source "${source_of[$benchmark]}" --out "$data/$benchmark.jsonl"
  done

  # Verified teacher traces, several a problem.
  step "$in_data/teacher" python 01_sample.py teacher --recipe "$recipe" --model "$base" \
    --benchmarks "${tests[@]}" --out "$data/teacher.jsonl" --problems-out "$data/problems.jsonl"

  # The prompts of RLVR.
  overlap=()
  if [ "$rlvr_drop_overlap" = true ]; then overlap=(--benchmarks "${tests[@]}"); fi
  step "$in_data/rlvr" python 01_sample.py problems --recipe "$recipe" --source "$rlvr_source" "${overlap[@]}" \
    --out "$data/rlvr.jsonl"

fi

# Self-distillation: samples of the base itself, or of its R1-distilled sibling. Only the wrong ones are of use later.
spawn "$in_data/sample-self" "${ranks[@]}" 01_sample.py model --recipe "$recipe" --model "$self_model" \
  --problems "$data/problems.jsonl" --out "$data/self.jsonl" --seed "$data_seed"

# 2. Which responses are right, and how likely did the base find them?
spawn "$in_data/verify-teacher" python 02_verify_score.py verify --recipe "$recipe" \
  --samples "$data/teacher.jsonl" --problems "$data/problems.jsonl" --out "$data/teacher.verified.jsonl"
join

spawn "$in_data/verify-self" python 02_verify_score.py verify --recipe "$recipe" \
  --samples "$data/self.jsonl" --problems "$data/problems.jsonl" --out "$data/self.verified.jsonl"

spawn "$in_data/score-teacher" "${ranks[@]}" 02_verify_score.py score --recipe "$recipe" \
  --samples "$data/teacher.verified.jsonl" --model "$base" --out "$data/teacher.scored.jsonl"
join

spawn "$in_data/score-self" "${ranks[@]}" 02_verify_score.py score --recipe "$recipe" --only wrong \
  --samples "$data/self.verified.jsonl" --model "$base" --out "$data/self.scored.jsonl"

# Where the base stands before any training.
spawn "$in_out/base/eval" "${ranks[@]}" 05_eval.py --recipe "$recipe" --model "$base" \
  --problems "${tests[@]}" --out "$out/base/eval" --seed "$seed"
join

# The training set of each arm: Gaussian-guided perplexity sampling, high-confidence errors, or neither.
for arm in "${arms[@]}"; do
  spawn "$in_out/$arm/select" python 02_verify_score.py select --recipe "$recipe" --arm "$arm" \
    --teacher "$data/teacher.scored.jsonl" --self "$data/self.scored.jsonl" --out "$out/$arm/train.jsonl" --seed "$seed"
done
join

# 3. Fine-tuning: cross entropy on the low-confidence truths, unlikelihood on the high-confidence errors.
for arm in "${arms[@]}"; do
  spawn "$in_out/$arm/sft" "${ranks[@]}" 03_train_oxa.py --recipe "$recipe" --model "$base" \
    --data "$out/$arm/train.jsonl" --out "$out/$arm/sft" --seed "$seed"
done
join

# 5. Evaluation of the fine-tuned models: Pass@1, Pass@k, entropy. (Before RLVR, which takes by far the longest.)
for arm in "${arms[@]}"; do
  spawn "$in_out/$arm/eval" "${ranks[@]}" 05_eval.py --recipe "$recipe" --model "$out/$arm/sft" \
    --problems "${tests[@]}" --out "$out/$arm/eval" --seed "$seed"
done

# 4. RLVR: GRPO with verifiable reward. With rlvr_limits = "published" an arm has a response limit of its own.
if is_in "$seed" "${rlvr_seeds[@]}"; then
  for arm in "${rlvr_arms[@]}"; do
    spawn "$in_out/$arm/rlvr" "${ranks[@]}" 04_rlvr.py --recipe "$recipe" --model "$out/$arm/sft" \
      --problems "$data/rlvr.jsonl" --out "$out/$arm/rlvr" --seed "$seed" \
      ${rlvr_limit[$arm]:+--max-response-tokens "${rlvr_limit[$arm]}"}
  done
  join

  for arm in "${rlvr_arms[@]}"; do
    spawn "$in_out/$arm/eval_rlvr" "${ranks[@]}" 05_eval.py --recipe "$recipe" --model "$out/$arm/rlvr" \
      --problems "${tests[@]}" --out "$out/$arm/eval_rlvr" --seed "$seed"
  done
fi

done
join

# 6. Report: what the run showed, with intervals and verdicts.
show python -m tools.report --recipe "$recipe" "$run"
