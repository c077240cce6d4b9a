# AsyPPO on the image that verl 0.9 is tested in: CUDA 13, torch 2.11, vLLM 0.24, flash-attn.
#
#   docker build -t asyppo_verl .
#   docker run --rm -it --gpus all --net=host --shm-size=32g -v "$PWD/runs:/opt/asyppo_verl/runs" \
#       -v "$PWD/data:/opt/asyppo_verl/data" -e HF_HOME=/opt/asyppo_verl/data/huggingface \
#       asyppo_verl bash scripts/run_asyppo_qwen3_4b.sh
ARG BASE=verlai/verl:vllm024.dev2
FROM ${BASE}

ARG VERL=0.9.1
RUN python3 -m pip install --no-cache-dir --no-deps "verl==${VERL}"
# Small packages that the image may lack; its torch, vLLM, flash-attn and transformers stay as they are.
RUN python3 -m pip install --no-cache-dir "wrapt>=1.16" "math-verify==0.9.0" "TransferQueue>=0.1.10"

WORKDIR /opt/asyppo_verl
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY asyppo_verl asyppo_verl
COPY recipe recipe
COPY scripts scripts
RUN python3 -m pip install --no-cache-dir --no-deps --editable .

# Stops the build if the plugin does not load with this image's verl, or a package that the recipe needs is missing.
RUN python3 -c "import math_verify, transfer_queue, recipe.asyppo.data.prepare_data, \
    asyppo_verl.plugin, asyppo_verl.config as c; assert c.is_supported_verl(), c.verl_version()"
