# The recipe in a container, for GPUs or CPU. The environment lives in /opt/venv, outside the mounted project:
#
#   docker build -t japanese-lm .
#   docker run --rm -it --gpus all -v "$PWD":/workspace japanese-lm bash run_all.sh
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8 VENV=/opt/venv
# git and the compilers: setup.sh, torch.compile, DeepSpeed's kernels. dpkg (with apt) reads the packaged sources.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        apt-utils ca-certificates dpkg g++ git ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Only what setup.sh reads is copied, so that editing a recipe does not build the environment again.
WORKDIR /workspace
COPY setup.sh requirements.txt pyproject.toml ./
COPY pretrain/recipe pretrain/recipe
RUN bash setup.sh

CMD ["bash", "run_all.sh"]
