# syntax=docker/dockerfile:1
# From logs to a bundle: `genretrieval run`, and `torchrun` for several GPUs. Mount logs and results under /data.
# TORCH_INDEX_URL is the package index of the wanted build of torch, as PyTorch's install page names it; without it,
# PyPI's, which on Linux is the one for CUDA.
#
#     docker build --file deploy/train.Dockerfile --tag genretrieval/train:0.1.0 .
#     docker run --rm --volume "$PWD:/data" --user "$(id -u):$(id -g)" genretrieval/train:0.1.0 \
#         run next_item --data logs --output bundle

ARG BASE=python:3.12-slim

FROM ${BASE} AS wheel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY . .
RUN pip install --constraint constraints.txt hatchling \
    && pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${BASE} AS environment
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
ARG EXTRAS=train,minilm
ARG TORCH_INDEX_URL
COPY constraints.txt ./
# torch first and on its own, so that a change of the code does not install it again.
RUN python -m venv --without-pip /opt/genretrieval \
    && pip --python /opt/genretrieval/bin/python install --constraint constraints.txt \
        ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} torch
COPY --from=wheel /wheels /wheels
RUN pip --python /opt/genretrieval/bin/python install --constraint constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]"

FROM ${BASE}
COPY --from=environment /opt/genretrieval /opt/genretrieval
# Caches of libraries go where any user may write.
ENV PATH=/opt/genretrieval/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
ENTRYPOINT ["genretrieval"]
CMD ["--help"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="genretrieval training" \
      org.opencontainers.image.description="Trains and exports a bundle from Parquet logs." \
      org.opencontainers.image.source="https://github.com/genretrieval/genretrieval" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
