# The program with CUDA-enabled torch, whose wheel brings the CUDA libraries; the host brings the driver alone.
# How to build and run it, and what of that was tested: docs/cluster.md.
ARG BASE=python:3.13.15-slim-trixie

# The packages, by pyproject.toml alone: a change of the program leaves this layer of gigabytes as it is.
FROM ${BASE} AS packages
# learn2learn is compiled. python3-dev has the headers where BASE's Python is Debian's; python:* has its own. Debian keeps
# no old versions, so none can be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir uv==0.13.9
# Bytecode is compiled here, since the user of the image cannot write it and would compile at every start.
ENV UV_CACHE_DIR=/var/cache/uv \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PROJECT_ENVIRONMENT=/opt/venv \
    UV_PYTHON=/usr/local/bin/python \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /build
COPY pyproject.toml ./
# Triton (a gigabyte) would need a compiler at run time, and torch does without it: only torch.compile is lost. Nobody
# compiles against the headers of torch and CUDA here, or runs the tests of the packages.
RUN --mount=type=cache,target=/var/cache/uv \
    uv sync --no-dev --extra optuna --no-install-project --no-install-package triton \
    && find /opt/venv/lib -type d \( -name tests -o -path '*/torch/include' -o -path '*/nvidia/*/include' \) -prune -exec rm -r {} + \
    && /opt/venv/bin/python -c "import sysconfig as s; print('/opt/fewshot', file=open(s.get_path('purelib') + '/fewshot.pth', 'w'))"

# The program, as its wheel installs it, in a folder that the line above put on Python's path.
FROM packages AS program
COPY . .
RUN uv pip install --no-deps --target /opt/fewshot . && rm -f /opt/fewshot/.lock

FROM ${BASE}
# Any uid may run it (docker run --user, OpenShift): what is written to is open to all, as /tmp is.
RUN useradd --uid 1000 --no-create-home --home-dir /home/fewshot fewshot \
    && install -d -m 1777 /home/fewshot /outputs \
    && install -d /data
COPY --from=packages /opt/venv /opt/venv
COPY --from=program /opt/fewshot /opt/fewshot
WORKDIR /app
COPY --from=program /build/train.py ./
# Runs write to outputs/ and sweeps to multirun/ here: both are the volume.
RUN ln -s /outputs outputs && ln -s /outputs multirun
# HOME holds the caches, and USER a name, for a uid that has none; TORCH_LOGS hides a warning that Triton is not there.
ENV HOME=/home/fewshot \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TORCH_LOGS=-torch.utils.flop_counter \
    USER=fewshot \
    WANDB_MODE=offline
USER 1000
VOLUME ["/data", "/outputs"]
# By its module's name: Apptainer starts in the caller's folder, not in /app.
ENTRYPOINT ["python", "-m", "fewshot.train"]
ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fewshot" \
      org.opencontainers.image.description="MAML with and without the zeroing trick: few-shot training, validation and testing by one command" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="${BASE}"
