# syntax=docker/dockerfile:1
# The recipe in a container, for GPUs or CPU. The environment is in /opt/venv, outside the mounted project.
#
#   docker build -t japanese-lm .
#   alias in-container='docker run --rm -it --gpus all --network host -v "$PWD":/workspace japanese-lm'
#   (without an NVIDIA GPU, leave out --gpus all)
#   in-container bash run_all.sh
#   in-container tensorboard --logdir outputs/tiny            # http://localhost:6006
#   in-container python fine-tuning/chat.py --web             # http://localhost:7860
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive LANG=C.UTF-8
# g++ and Python.h: torch.compile, DeepSpeed's kernels. dpkg (with apt) reads the packaged sources.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        apt-utils ca-certificates dpkg g++ git ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Only what setup.sh reads is copied: an edit of the code or of a recipe does not build the environment again.
WORKDIR /workspace
COPY setup.sh requirements.txt pyproject.toml ./
# While an image is built no GPU is seen, but the build of torch for CUDA is needed (or of the CPU: --build-arg).
ARG TORCH_CPU_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip TORCH_CPU_INDEX=$TORCH_CPU_INDEX VENV=/opt/venv bash setup.sh

# The scripts use this environment as it is.
ENV RECIPE_PYTHON=/opt/venv/bin/python PATH=/opt/venv/bin:$PATH
CMD ["bash", "run_all.sh"]
