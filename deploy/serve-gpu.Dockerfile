# syntax=docker/dockerfile:1
# The server on NVIDIA GPUs: as serve.Dockerfile, with the onnxruntime for CUDA. The base has the CUDA 13 and cuDNN 9
# that the onnxruntime-gpu of constraints.txt was built for; change the two together.
#
#     docker build --file deploy/serve-gpu.Dockerfile --tag genretrieval/serve-gpu:0.1.0 .

ARG BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

FROM python:3.12-slim AS wheel
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
COPY . .
RUN pip install --constraint constraints.txt hatchling \
    && pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# The environment is made by the Python that will run it, which is the base's own.
FROM ${BASE} AS environment
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
ARG EXTRAS=serve-gpu,postgres,redis,otel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt ./
COPY --from=wheel /wheels /wheels
RUN python3 -m venv --without-pip /opt/genretrieval \
    && pip --python /opt/genretrieval/bin/python install --constraint constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]"

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libjemalloc2 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/lib/*-linux-gnu/libjemalloc.so.2 /usr/local/lib/libjemalloc.so.2 \
    && install --directory --owner=10001 --group=10001 /changes /log
COPY --from=environment /opt/genretrieval /opt/genretrieval
ENV PATH=/opt/genretrieval/bin:$PATH \
    LD_PRELOAD=/usr/local/lib/libjemalloc.so.2 \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 8081 8082
ENTRYPOINT ["genretrieval"]
CMD ["serve", "--help"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="genretrieval server for GPUs" \
      org.opencontainers.image.description="Serves a bundle by gRPC and REST on NVIDIA GPUs." \
      org.opencontainers.image.source="https://github.com/genretrieval/genretrieval" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
