# llmq in a container; the models and results are in a folder of the host, mounted as /work:
#
#   docker build -t llmq .
#   docker run --rm -v "$PWD":/work llmq quantize /work/model /work/out --calibration /work/text.jsonl
#   docker run --rm --gpus all -v "$PWD":/work llmq quantize Qwen/Qwen3-8B /work/out
#
# The build of torch comes from INDEX, by default the one for CUDA 12.8; for a CPU:
#   docker build -t llmq-cpu --build-arg INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.12-slim

ARG INDEX=https://download.pytorch.org/whl/cu128
RUN pip install --no-cache-dir --index-url "$INDEX" "torch>=2.8"

# Triton compiles a small program when it first runs; any compiler will do.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/llmq
COPY pyproject.toml README.md LICENSE ./
COPY llmq llmq
COPY kernels kernels
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[datasets,plots]"

# The cache of the Hub is in the mounted folder, so a downloaded model is kept.
ENV HF_HOME=/work/.huggingface
RUN useradd --create-home --uid 1000 llmq && mkdir /work && chown llmq /work
USER 1000
WORKDIR /work
ENTRYPOINT ["llmq"]
CMD ["--help"]
