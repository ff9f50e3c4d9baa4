# syntax=docker/dockerfile:1
# The server on CPUs: the wheel with the extras that serve. No torch, no compiler, no shell needed to start or to stop.
#
#     docker build --file deploy/serve.Dockerfile --tag genretrieval/serve:0.1.0 .

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
ARG EXTRAS=serve,postgres,redis,otel
COPY constraints.txt ./
COPY --from=wheel /wheels /wheels
RUN python -m venv --without-pip /opt/genretrieval \
    && pip --python /opt/genretrieval/bin/python install --constraint constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]"

FROM ${BASE}
# With jemalloc a server is smaller after a few swaps of bundles than with glibc's malloc. The link is alike on every CPU.
# /changes and /log are there for volumes, which take over whose they are.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libjemalloc2 \
    && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/lib/*-linux-gnu/libjemalloc.so.2 /usr/local/lib/libjemalloc.so.2 \
    && install --directory --owner=10001 --group=10001 /changes /log
COPY --from=environment /opt/genretrieval /opt/genretrieval
ENV PATH=/opt/genretrieval/bin:$PATH \
    LD_PRELOAD=/usr/local/lib/libjemalloc.so.2 \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, because Kubernetes cannot tell of a name that it is not root. Nothing but /tmp and mounts is written to.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 8081 8082
ENTRYPOINT ["genretrieval"]
CMD ["serve", "--help"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="genretrieval server" \
      org.opencontainers.image.description="Serves a bundle by gRPC and REST on CPUs." \
      org.opencontainers.image.source="https://github.com/genretrieval/genretrieval" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
