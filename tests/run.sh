#!/usr/bin/env bash
# Installs what the tests need, beside the project in .venv-test/, and runs them all. Arguments go to pytest.
#   tests/run.sh                    everything but the slow tier
#   tests/run.sh tests/unit         one folder
#   tests/run.sh --slow             the slow tier too (what it needs beyond this, each test says when it skips)
# PYTHON=python3.13 tests/run.sh    with another Python
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=.venv-test

# Debian packages: a C compiler (a stand-in for the NVML library), curl, Slurm and sshd, a browser and npm (which fetches axe-core), and venv for Debian's own Python.
missing=()
PATH=$PATH:/usr/sbin
for pair in gcc:gcc cc:libc6-dev curl:curl \
    slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge sshd:openssh-server \
    ssh:openssh-client ip:iproute2 tcsh:tcsh fish:fish zsh:zsh \
    chromium:chromium npm:npm; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
[[ -e /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf ]] || missing+=(fonts-dejavu-core)
"$PYTHON" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if ((${#missing[@]})); then
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
  else
    echo "not installed: ${missing[*]} (the tests that need them skip); sudo apt-get install ${missing[*]}" >&2
  fi
fi

[[ -x $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
# The client is tested with both current generations of the OpenAI SDK.
[[ -x $VENV/openai2/bin/python ]] || "$PYTHON" -m venv "$VENV/openai2"
"$VENV/openai2/bin/python" -m pip install --quiet --disable-pip-version-check 'openai>=2,<3' 'pytest>=9,<10'
export AGENT_INFRA_OPENAI2_PYTHON=$PWD/$VENV/openai2/bin/python

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
# As on macOS: names that Python has only on Linux stand behind IS_LINUX.
"$VENV/bin/mypy" --platform darwin --always-false IS_LINUX --cache-dir .mypy_cache/darwin agent_infra.py agent_infra_core
# Most of the time is spent waiting for real parts, so a file each to three processes; AGENT_INFRA_TEST_PROCESSES=0: one by one.
exec "$VENV/bin/python" -m pytest -n "${AGENT_INFRA_TEST_PROCESSES:-3}" --dist loadfile --no-loadscope-reorder "$@"
