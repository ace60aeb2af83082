# The edge service: pictures in, bitstreams to the cloud.
#
#   docker build -f deploy/containers/edge.Dockerfile -t sightline-edge .
#
# The GPU comes with torch's own wheels, which carry CUDA, so that the base needs no toolkit: the host's driver and the
# NVIDIA container runtime are enough, and the same image runs on a machine without a GPU. Nothing but /var/lib/sightline
# and /tmp is written: run it with a read-only root file system.
FROM python:3.11.13-slim-bookworm AS build
# `--build-arg TORCH_BACKEND=cpu`: PyTorch's CPU build, a fifth of the size, for devices without a GPU.
ARG TORCH_BACKEND=
COPY . /src
WORKDIR /src
# The versions of the lock file, and of those only what this side needs.
RUN python -m venv /opt/sightline \
 && /opt/sightline/bin/python -m pip install --no-cache-dir --disable-pip-version-check "$(grep '^uv==' requirements.lock)" \
 && /opt/sightline/bin/uv pip install --no-cache --python /opt/sightline/bin/python --constraint requirements.lock \
    ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} ".[edge,reflection,tracing]" \
 && /opt/sightline/bin/python -m compileall -q /opt/sightline/lib

FROM python:3.11.13-slim-bookworm
RUN groupadd --gid 10001 sightline \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/sightline --shell /usr/sbin/nologin sightline \
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/sightline
COPY --from=build /opt/sightline /opt/sightline
# Compiled kernels go to /tmp: the packages' folder is not writable, and shall not be.
ENV PATH=/opt/sightline/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    OMP_WAIT_POLICY=PASSIVE \
    NUMBA_CACHE_DIR=/tmp/numba \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SIGHTLINE_EDGE_LISTEN=0.0.0.0:7411 \
    SIGHTLINE_EDGE_METRICS_LISTEN=0.0.0.0:7412 \
    SIGHTLINE_EDGE_METRICS_INSECURE=true \
    SIGHTLINE_EDGE_DATA_DIR=/var/lib/sightline \
    SIGHTLINE_EDGE_LOG_FORMAT=json \
    SIGHTLINE_EDGE_TLS_CERTIFICATE=/etc/sightline/tls/tls.crt \
    SIGHTLINE_EDGE_TLS_KEY=/etc/sightline/tls/tls.key \
    SIGHTLINE_EDGE_TLS_CLIENT_CA=/etc/sightline/tls/ca.crt
USER 10001:10001
WORKDIR /var/lib/sightline
VOLUME ["/var/lib/sightline"]
EXPOSE 7411 7412
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7412/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["sightline"]
CMD ["edge"]
