# One image for every process of Plexus: `docker build .`, then `docker run IMAGE serve vectors`.
ARG PYTHON=3.11.13-slim-bookworm

FROM python:${PYTHON} AS build
# As in the Makefile.
ARG UV_VERSION=0.13.8
RUN pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}"
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=/opt/plexus
WORKDIR /src
# What Plexus depends on changes less often than Plexus: a layer of its own.
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN --mount=type=cache,target=/root/.cache/uv uv sync --frozen --no-dev --no-install-project
COPY services services
COPY clients/python clients/python
COPY generated generated
COPY gateway gateway
COPY consul consul
RUN --mount=type=cache,target=/root/.cache/uv uv sync --frozen --no-dev --no-editable

FROM python:${PYTHON}
# Of whoever owns the secrets, so that their files can stay closed to all others; see .env.
ARG HOST_UID=10001
ARG HOST_GID=10001
RUN groupadd --non-unique --gid "${HOST_GID}" plexus \
 && useradd --non-unique --uid "${HOST_UID}" --gid "${HOST_GID}" --no-create-home --home-dir /tmp plexus \
 && install -d -o plexus -g plexus -m 0700 /state /state/models
COPY --from=build /opt/plexus /opt/plexus
ENV PATH=/opt/plexus/bin:${PATH} PLEXUS_STATE=/state HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER plexus
WORKDIR /tmp
# The agent's verdict on the gRPC health of `plexus serve NAME`; its command line says which.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --start-interval=2s --retries=4 \
  CMD ["python", "-m", "services.mesh.consul.verdict"]
ENTRYPOINT ["plexus"]
CMD ["--help"]
