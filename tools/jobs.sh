# Job control of run_all.sh and toy/study.sh, which source it.
#
#     begin [RECIPE] [--seeds N] [--plan]   sets the variables of a run from its recipe
#     step NAME COMMAND...                  runs COMMAND, its output in $logs/NAME.log;
#                                           not again if it has finished
#     spawn NAME COMMAND...                 the same in the background, $side_by_side at once
#     join                                  waits for all that were spawned
#     show COMMAND...                       runs COMMAND every time, its output on the terminal
#
# $logs/NAME.done marks a finished command: its words, its seconds, and the recipe's values for it.
# A command is run again when its words or these values have changed, or a file or model that it
# names is newer than its mark.
# Nothing of a recipe is evaluated: tools/recipe.py checks names and types, and values stand inside
# quotes.

declare -A name_of=() began_of=() words_of=() values_of=()    # running commands, by process id
declare -A section_of=()     # word of a command line -> the recipe's values for its stage, JSON
declare -A source_of=()      # benchmark -> its source
declare -A rlvr_limit=()     # arm -> its own response limit, if it has one
plan="" planned=()           # with --plan: 1, and the commands, which are not run
NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}"

# A caller adds `|| return`, so that it depends on `set -e` whether a shell ends.
fail() {
  echo "error: $*" >&2
  return 2
}

whole_number() { [[ "$2" =~ ^[0-9]{1,6}$ ]] || fail "$1 must be a whole number, not '$2'"; }

is_in() {                    # WORD LIST...
  local word
  for word in "${@:2}"; do
    if [ "$word" = "$1" ]; then return 0; fi
  done
  return 1
}

# -------------------------------------------------------------------------------------------- a run

begin() {
  local seeds_flag=() name=""
  plan="" planned=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --seeds) seeds_flag=(--seeds="${2-}"); shift $(($# > 1 ? 2 : 1)) ;;
      --plan) plan=1; shift ;;
      -*) fail "unknown option $1 (see --help)" || return ;;
      *) name="$1"; shift ;;
    esac
  done
  whole_number NNODES "$NNODES" || return
  whole_number NODE_RANK "$NODE_RANK" || return
  plain_python || return
  GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  if [ -z "$name" ]; then
    name=toy
    if [ "$GPUS" -ge 8 ]; then name=paper_1.5b; fi
    echo "no recipe named, $GPUS GPUs here: running '$name'"
  fi
  recipe="$name"
  [ -f "$recipe" ] || recipe="recipes/$name.toml"
  [ -f "$recipe" ] || fail "no recipe $recipe; there are: $(cd recipes && echo *.toml)" || return
  read_recipe "$recipe" "${seeds_flag[@]}" || return
  run="${RUNS:-runs}/$(basename "$recipe" .toml)" logs="$run/logs"
  base="$run/base"
  case "$world" in none | word-problems) ;; *) base="toy/$world_base" ;; esac
  if [ -n "$plan" ]; then
    NPROC="${NPROC:-$((cards > 0 ? cards : cpu_ranks))}"
    trap print_plan EXIT
  else
    "$plain" -m tools.recipe "$recipe" --check || return     # said now, not hours later
    lock "$run/lock" || return
    mkdir -p "$logs"
    if [ "$NODE_RANK" != 0 ]; then touch "$logs/node-$NODE_RANK.begun"; fi
    if [ "$world" = word-problems ]; then export WITH_WORDS=1; fi
    source ./setup.sh
    watch_signals
    # Ranks of this node: a GPU each; NPROC=2 tries two on a CPU.
    if [ "$GPUS" -gt 0 ]; then NPROC="${NPROC:-$GPUS}"; else NPROC="${NPROC:-$cpu_ranks}"; fi
  fi
  whole_number NPROC "$NPROC" || return
  [ "$GPUS" -gt 0 ] || export OMP_NUM_THREADS=1    # one thread per process beats two, on two cores
  export TOKENIZERS_PARALLELISM=false
  # after Ctrl-C a step is finished and saved; torchrun would kill it after 30 s
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

  ranks=(python)             # starts a script on all GPUs
  if [ "$NPROC" -gt 1 ] || [ "$NNODES" -gt 1 ]; then
    ranks=(torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$NPROC"
           --log_dir "$logs/ranks" --tee 3)
    if [ "$NNODES" -gt 1 ]; then
      ranks+=(--rdzv_backend c10d --rdzv_endpoint "${MASTER_ADDR:?}:${MASTER_PORT:-29500}")
    else
      ranks+=(--standalone)
    fi
    ranks+=(--)              # else torchrun takes a script's --n for its own
  fi
}

plain_python() {             # $plain: plan.py and recipe.py speak before anything is installed
  plain=.venv/bin/python
  [ -x "$plain" ] || plain="${PYTHON:-python3}"
  "$plain" -c 'import tomllib' 2>/dev/null ||
    fail "Python 3.11 or newer is needed, as python3 or in PYTHON"
}

read_recipe() {              # RECIPE [--seeds=N]
  local lines key value
  lines="$("$plain" -m tools.recipe "$@")" || return
  world_args=() arms=() rlvr_arms=() seeds=() rlvr_seeds=() benchmarks=() self_model=""
  while IFS=$'\t' read -r key value; do
    case "$key" in
      world | world_base | base_model | self_model | rlvr_source | rlvr_drop_overlap | \
        data_per_seed | cards | side_by_side | cpu_ranks | warmup | warmup_epochs | \
        teacher_model | teacher_solutions | teacher_epochs | teacher_samples | problems_source)
        printf -v "$key" %s "$value" ;;
      world_args) world_args+=("$value") ;;
      arms) arms+=("$value") ;;
      rlvr_arms) rlvr_arms+=("$value") ;;
      seeds) seeds+=("$value") ;;
      rlvr_seeds) rlvr_seeds+=("$value") ;;
      benchmarks) benchmarks+=("$value") ;;
      source_of.*) source_of["${key#*.}"]="$value" ;;
      rlvr_limit.*) rlvr_limit["${key#*.}"]="$value" ;;
      section_of.*) section_of["${key#*.}"]="$value" ;;
      *) fail "tools/recipe.py named '$key', which tools/jobs.sh does not know" || return ;;
    esac
  done <<< "$lines"
}

# One shell at a time works on a run. The lock is a file that this shell and all its commands hold
# open (as number 9), so it lasts until the last of them has ended, whatever ended them; that the
# commands end with this shell is the part of setpriv, below.
lock() {                     # FILE
  local file="$1" fd pid holders=()
  if [ "$NODE_RANK" != 0 ]; then file="$1.$NODE_RANK"; fi
  mkdir -p "$(dirname "$file")" || return
  command -v flock > /dev/null || return 0
  exec 9>> "$file"
  flock -n 9 && return
  for fd in /proc/[0-9]*/fd/9; do
    pid="${fd#/proc/}" pid="${pid%%/*}"
    if [ "$fd" -ef "$file" ] && [ "$pid" != $$ ]; then holders+=("$pid"); fi
  done
  fail "another start of this command is at work here ($file is held by process ${holders[*]});" \
    "wait until it ends, or stop it"
}

# ----------------------------------------------------------------------------------------- commands

tied=()                      # what ties a command to this shell: it ends with it, even by kill -9
if command -v setpriv > /dev/null; then tied=(setpriv --pdeathsig TERM); fi

watch_signals() {            # called when all is set up
  if [[ $- != *i* ]]; then   # not where somebody pastes commands into a terminal
    trap 'exit 130' INT
    trap 'exit 143' TERM
    trap stop_all EXIT
  fi
}

print_plan() {
  local code=$?
  if [ "$code" = 0 ]; then
    printf '%s\n' "${planned[@]}" | "$plain" -m tools.plan "$recipe" || code=$?
  fi
  exit "$code"
}

stop_all() {                 # the commands that still run save and leave; nobody else's are touched
  local code=$?
  trap - EXIT INT TERM
  if [ ${#name_of[@]} -gt 0 ]; then
    kill "${!name_of[@]}" 2>/dev/null || true
    wait || true
  fi
  exit "$code"
}

# No $( ) from here on: bash 5.2 ends in a syntax error if a trap is due while it waits for one.

quote() {                    # COMMAND... -> $quoted: its words as they can be pasted
  printf -v quoted '%q ' "$@"
  quoted="${quoted% }"
}

find_values() {              # COMMAND... -> $values: what the recipe says for its stage
  local word
  values=""
  for word; do
    if [ -n "${section_of[$word]+known}" ]; then
      values="${section_of[$word]}"
      return
    fi
  done
}

finished() {                 # NAME COMMAND...
  local mark="$logs/$1.done" lines=() word input before=""; shift
  if [ ! -f "$mark" ]; then return 1; fi
  mapfile -t lines < "$mark" # words, seconds, values
  quote "$@"
  find_values "$@"
  if [ "${lines[0]-}" != "$quoted" ] || [ "${lines[2]-}" != "$values" ]; then return 1; fi
  for word; do
    if [ "$before" = --out ] && [ ! -e "$word" ]; then return 1; fi    # it was removed
    before="$word"
    case "$word" in *.py | *.toml) continue ;; esac    # a new version of the code is no new input
    for input in "$word" "$word/config.json" "$word/final/config.json"; do
      if [ -f "$input" ] && [ "$input" -nt "$mark" ]; then return 1; fi
    done
  done
}

step() {                     # NAME COMMAND...
  spawn "$@" && join
}

spawn() {                    # NAME COMMAND...
  local name="$1"; shift
  quote "$@"
  find_values "$@"
  if [ -n "$plan" ]; then
    planned+=("$quoted")
    return
  fi
  finished "$name" "$@" && return
  if [ "$NODE_RANK" -gt 0 ] && [ "$1" = python ]; then    # one process is node 0's business
    until finished "$name" "$@"; do
      if [ "$logs/$name.failed" -nt "$logs/node-$NODE_RANK.begun" ]; then
        fail "'$name' failed on node 0" || return
      fi
      sleep 2
    done
    return
  fi
  while [ ${#name_of[@]} -ge "$side_by_side" ]; do settle_one || return; done
  local log="$logs/$name.log"
  echo "+ $quoted"
  mkdir -p "${log%/*}"
  rm -f "$logs/$name.failed"
  if [ -s "$log" ]; then mv "$log" "$log.1"; fi       # of the run before
  if [ "$side_by_side" = 1 ]; then
    "${tied[@]}" "$@" > >(tee "$log") 2>&1 &
  else
    "${tied[@]}" "$@" > "$log" 2>&1 &
  fi
  name_of[$!]="$name" began_of[$!]=$SECONDS
  words_of[$!]="$quoted" values_of[$!]="$values"
}

join() {
  while [ ${#name_of[@]} -gt 0 ]; do settle_one || return; done
}

settle_one() {               # waits until one of the commands ends: its mark, or its last words
  local pid="" name code=0
  while [ -z "$pid" ]; do
    sleep 0.1
    for pid in "${!name_of[@]}"; do
      kill -0 "$pid" 2>/dev/null || break
      pid=""
    done
  done
  wait "$pid" || code=$?
  name="${name_of[$pid]}"
  unset "name_of[$pid]"
  if [ "$code" -gt 0 ]; then
    [ "$side_by_side" = 1 ] || tail -n 20 "$logs/$name.log" >&2
    # A rank's own message, which stands above torchrun's summary.
    grep -E '(^|\]:)error: ' "$logs/$name.log" | head -n 3 >&2 || true
    echo "error: '$name' ended with code $code; its log is $logs/$name.log;" \
      "the same command goes on from here" >&2
    if [ "$NODE_RANK" = 0 ]; then touch "$logs/$name.failed"; fi    # for nodes that wait
    return "$code"
  fi
  local seconds=$((SECONDS - began_of[$pid]))
  if [ "$NODE_RANK" = 0 ]; then
    printf '%s\n' "${words_of[$pid]}" "seconds $seconds" "${values_of[$pid]}" > "$logs/$name.done"
  fi
  echo "  done: $name, $seconds s"
}

show() {                     # COMMAND...
  quote "$@"
  if [ -n "$plan" ]; then
    planned+=("$quoted")
  elif [ "$NODE_RANK" = 0 ]; then
    echo "+ $quoted"
    "${tied[@]}" "$@" &
    name_of[$!]="$1"
    wait $!                  # in the background and waited for: a signal is acted on at once
    unset "name_of[$!]"
  fi
}
