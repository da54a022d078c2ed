#!/usr/bin/env bash
# The test suite on a fresh machine: makes .venv if needed, then runs pytest in two processes of one thread each.
#     bash tests/run.sh [pytest arguments]          WITH_VLLM=1 bash tests/run.sh     with the tests that need vLLM
set -euo pipefail
cd "$(dirname "$0")/.."
source ./setup.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m pytest -q -n 2 --dist worksteal --durations=10 "${@:-tests}"
