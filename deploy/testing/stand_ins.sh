#!/usr/bin/env bash
# Images under the names that the Dockerfile and compose.yaml use, for machines that reach no image registry: made of
# Debian's packages and this machine's Python 3.11. They stand in for the real ones; their label says so.
#
#   stand_ins.sh DIR PYTHON_IMAGE REDIS_IMAGE PROMETHEUS_IMAGE      DIR keeps what was downloaded
#
# Needs mmdebstrap. Certificates that this machine trusts are trusted inside too.
set -euo pipefail
directory=$(realpath -m "$1")
mkdir -p "$directory/python"
PYTHON_IMAGE=$2
REDIS_IMAGE=$3
PROMETHEUS_IMAGE=$4
label='LABEL stand-in="made of Debian packages for tests"'

if [ ! -s "$directory/base.tar" ]; then
    mmdebstrap --quiet --variant=apt --mode=root \
        --include=ca-certificates,netbase,tzdata,libssl3,libffi8,libsqlite3-0,libreadline8,libncursesw6,libuuid1,libexpat1 \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        bookworm "$directory/partial.tar"
    mv "$directory/partial.tar" "$directory/base.tar"
fi
docker image inspect baton-test-debian >/dev/null 2>&1 || docker import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin' \
    "$directory/base.tar" baton-test-debian >/dev/null

prefix=$(python3.11 -c 'import sys; print(sys.base_prefix)')
tar -C "$prefix" -cf "$directory/python/python.tar" --exclude='site-packages/*' --exclude='lib/python3.11/test' \
    --exclude=__pycache__ --exclude='*.a' --exclude=idlelib --exclude=tkinter --exclude=turtledemo --exclude='config-*' \
    bin/python3.11 bin/python3 bin/python lib include
cp -L "$(python3.11 -c 'import os, ssl; print(os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile)')" \
    "$directory/python/ca.crt"
docker build -q -t "$PYTHON_IMAGE" -f - "$directory/python" >/dev/null <<END
FROM baton-test-debian
COPY ca.crt /etc/ssl/certs/ca-certificates.crt
ADD python.tar /usr/local/
RUN ldconfig && python3 -m ensurepip && ln -sf pip3 /usr/local/bin/pip
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
$label
CMD ["python3"]
END
docker build -q -t "$REDIS_IMAGE" - >/dev/null <<END
FROM baton-test-debian
RUN apt-get update && apt-get install -y --no-install-recommends redis-server && apt-get clean \\
    && usermod --uid 999 redis && groupmod --gid 1000 redis && mkdir -p /data && chown 999:1000 /data
$label
CMD ["redis-server"]
END
docker build -q -t "$PROMETHEUS_IMAGE" - >/dev/null <<END
FROM baton-test-debian
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && apt-get clean \\
    && mkdir -p /prometheus && chown nobody:nogroup /prometheus
$label
USER nobody
ENTRYPOINT ["/usr/bin/prometheus"]
END
