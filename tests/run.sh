#!/usr/bin/env bash
# The test suite on a fresh machine: makes .venv if needed, then runs pytest in two processes of one
# thread each.
#     bash tests/run.sh [pytest arguments]
#     bash tests/run.sh -m "not slow"      the fast part, a minute on two cores
#     WITH_VLLM=1 bash tests/run.sh        with the tests that need vLLM
#     WITH_WORDS=1 bash tests/run.sh       with those that need the word problems (reasoning-gym)
#     bash tests/run.sh --faults           the long fault suite, which is in none of these
set -euo pipefail
cd "$(dirname "$0")/.."
source ./setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ "${1-}" = --faults ]; then set -- -m faults "${@:2}"; fi
paths=(tests)
for argument; do
  if [ -e "${argument%%::*}" ]; then paths=(); fi        # a file or a test is named: only that
done
exec python -m pytest -q -n 2 --dist worksteal --durations=10 "$@" "${paths[@]}"
