# syntax=docker/dockerfile:1
# MegaSora on NVIDIA's PyTorch image. Linted, but never built so far: there was no Docker daemon where it was written.
#   docker build -t megasora [--build-arg BASE=...] [--build-arg APEX_REF=25.09] [--build-arg FA3_REF=COMMIT] \
#       [--build-arg TE_REF=v2.20] .
# BASE needs torch 2.13 or newer, its own pre-release builds included; the first step below checks that.
ARG BASE=nvcr.io/nvidia/pytorch:26.07-py3

# What only exists as source is compiled in a stage of its own, so that no build tree stays in the image.
FROM ${BASE} AS wheels
# Empty: not built. NVIDIA's apex comes from NVIDIA's repository only: the PyPI package of that name is another project.
ARG APEX_REF=""
ARG FA3_REF=""
# Empty: the base's own Transformer Engine, if it is new enough, else the released package.
ARG TE_REF=""
ARG MAX_JOBS=8
ENV TORCH_CUDA_ARCH_LIST=9.0 FLASH_ATTN_CUDA_ARCHS=90 NVTE_CUDA_ARCHS=90
WORKDIR /wheels
RUN python -c "import torch; v = torch.__version__; assert tuple(map(int, v.split('.')[:2])) >= (2, 13), v"
# hadolint ignore=DL3059 # a layer each: they take long, and a failure of one leaves the other built
RUN if [ -n "${APEX_REF}" ]; then APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
    pip wheel --no-cache-dir --no-deps --no-build-isolation "git+https://github.com/NVIDIA/apex@${APEX_REF}"; fi
# hadolint ignore=DL3059
RUN if [ -n "${FA3_REF}" ]; then FLASH_ATTENTION_DISABLE_SM80=TRUE \
    pip wheel --no-cache-dir --no-deps --no-build-isolation \
    "git+https://github.com/Dao-AILab/flash-attention@${FA3_REF}#subdirectory=hopper"; fi
# hadolint ignore=DL3059
RUN if [ -n "${TE_REF}" ]; then NVTE_FRAMEWORK=pytorch \
    pip wheel --no-cache-dir --no-deps --no-build-isolation "git+https://github.com/NVIDIA/TransformerEngine@${TE_REF}"; fi

FROM ${BASE}
ARG REVISION=unknown
ARG MAX_JOBS=8
ARG UID=10001
LABEL org.opencontainers.image.title="MegaSora" \
      org.opencontainers.image.description="Distributed pretraining of Sora-like video generators" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --create-home --uid "${UID}" megasora
WORKDIR /opt/megasora

# Dependencies before the source, so that a change of the source leaves their layer alone. The base's own torch is the
# constraint, and is struck from the list: its version is a pre-release such as 2.13.0a0, which ">=2.13" would refuse.
COPY pyproject.toml ./
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels <<'SCRIPT'
set -e
python - > /tmp/requirements.txt <<'PYTHON'
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *extras["gpu"], *extras["deepspeed"], *extras["encoders"]]:
    if not line.startswith("torch>"):
        print(line)
PYTHON
python -c "import torch; print('torch==' + torch.__version__)" > /opt/megasora/constraints-image.txt
pip install --no-cache-dir --no-build-isolation \
    -c /opt/megasora/constraints-image.txt -r /tmp/requirements.txt
find /wheels -name '*.whl' -exec pip install --no-cache-dir --no-deps {} +
rm /tmp/requirements.txt
SCRIPT

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

USER ${UID}
WORKDIR /home/megasora
# Counts devices without making a CUDA context, which would take memory from the run.
HEALTHCHECK --interval=5m --timeout=60s --retries=2 \
    CMD ["python", "-c", "import megasora, torch; raise SystemExit(torch.cuda.device_count() == 0)"]
CMD ["megasora", "--help"]
