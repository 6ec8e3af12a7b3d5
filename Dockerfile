# The image of vblora-serve, for the CPU or for CUDA. Building and running it: docs/docker.md
#
#   docker build --build-arg TORCH_INDEX_URL=<PyTorch's CPU wheel index> -t vblora-serve .
#   docker build --build-arg TORCH_VARIANT=cuda -t vblora-serve:cuda .

ARG BASE_IMAGE=python:3.12-slim


# Local wheels are preferred to downloaded ones of the same version. The folder may be empty;
# `--build-context wheels=DIR` puts another in its place.
FROM scratch AS wheels
COPY deploy/wheels/ /


# pip lives in a venv of its own, so that none is installed into the image.
FROM ${BASE_IMAGE} AS tools
ARG PIP_INDEX_URL=
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_NO_INDEX=
ENV PIP_INDEX_URL=${PIP_INDEX_URL} \
    PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} \
    PIP_NO_INDEX=${PIP_NO_INDEX} \
    PIP_FIND_LINKS=/wheels \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/pip


FROM tools AS dependencies
RUN python3 -m venv --without-pip /opt/venv

# `+cpu` is on no CUDA wheel: a CPU build fails here rather than download gigabytes.
ARG TORCH_VARIANT=cpu
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.crt \
    case "$TORCH_VARIANT" in \
        cpu) torch="torch==$TORCH_VERSION+cpu" ;; \
        cuda) torch="torch==$TORCH_VERSION" ;; \
        *) echo "TORCH_VARIANT is cpu or cuda, not '$TORCH_VARIANT'" >&2; exit 1 ;; \
    esac \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps \
        ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch" \
    || { echo "No torch for TORCH_VARIANT=$TORCH_VARIANT: see 'Where torch comes from' in docs/docker.md" >&2; exit 1; }

# Of pyproject.toml's extras, those that the image is to have, with spaces between: "shared guided".
ARG EXTRAS=
COPY pyproject.toml constraints.tx[t] deploy/requirements.py /src/
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.crt \
    cd /src \
    && python3 requirements.py pyproject.toml $EXTRAS > requirements.txt \
    && touch constraints.txt \
    && /opt/venv/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
        > torch.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install \
        --requirement requirements.txt --requirement torch.txt --constraint constraints.txt \
    && /opt/venv/bin/python -c 'import sys, torch; \
        built = "cuda" if torch.version.cuda else "cpu"; \
        sys.exit(built != sys.argv[1] and f"this torch is built for {built}, TORCH_VARIANT is {sys.argv[1]}")' \
        "$TORCH_VARIANT"


FROM tools AS package
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adapters/ adapters/
COPY service/ service/
COPY vblora_vllm/ vblora_vllm/
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.crt \
    /opt/pip/bin/pip wheel --no-deps --wheel-dir /package .


FROM ${BASE_IMAGE}
RUN groupadd --gid 10001 vblora \
    && useradd --uid 10001 --gid vblora --home-dir /cache --no-create-home --shell /usr/sbin/nologin vblora \
    && install --directory --owner=vblora --group=vblora /data /cache

# The dependencies are one layer, our own code a thin one on top: an upgrade pulls the second.
COPY --from=dependencies /opt/venv /opt/venv
COPY deploy/entrypoint deploy/healthcheck.py /usr/local/bin/
RUN --mount=type=bind,from=package,source=/package,target=/mnt/package \
    --mount=type=bind,from=tools,source=/opt/pip,target=/opt/pip \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-index --no-deps /mnt/package/*.whl \
    && /opt/pip/bin/pip --python /opt/venv/bin/python check

# All that is ever written lies in /data, /cache and /tmp, so the root may be read-only
# (bytecode was compiled when the packages were installed). torch makes its folder when it is
# imported, for every user, hence /tmp.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VBLORA_HOST=0.0.0.0 \
    VBLORA_DATA_DIR=/data

VOLUME ["/data", "/cache"]
EXPOSE 8000
USER 10001:10001
WORKDIR /data
HEALTHCHECK --interval=30s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "/usr/local/bin/healthcheck.py"]
ENTRYPOINT ["/usr/local/bin/entrypoint"]

ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="vblora-serve" \
      org.opencontainers.image.description="Serve many VB-LoRA adapters from one base model." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
