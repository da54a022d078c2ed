#!/usr/bin/env bash
# The first ten minutes on a GPU: does each line that only a GPU reaches do what it should?
#     bash tests/gpu.sh              no network, no download; torch >= 2.11, transformers >= 5.17, vLLM or not
# Prints a table, predicted beside seen. Exit code: 0 all as it should be, 1 a check failed, 2 no GPU here.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" tests/gpu_checks.py "$@"
