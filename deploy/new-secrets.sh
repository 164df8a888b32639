#!/bin/sh
# Makes the secrets that compose.yaml mounts, in deploy/secrets/. Those that are there stay: remove one to change it.
#
# Containers read the files under users of their own, so the files are readable; the directory is yours alone.
set -eu
cd "$(dirname "$0")"
umask 022
mkdir -p secrets
chmod 700 secrets

random() { od -A n -t x1 -N 24 /dev/urandom | tr -d ' \n'; }

if [ ! -s secrets/redis_url ] || [ ! -s secrets/redis_auth.conf ]; then
    password=$(random)
    printf 'requirepass %s\n' "$password" >secrets/redis_auth.conf
    printf 'redis://:%s@redis:6379/0\n' "$password" >secrets/redis_url
fi
for name in admin_key grafana_password; do
    [ -s "secrets/$name" ] || random >"secrets/$name"
done
echo "secrets are in $(pwd)/secrets; the key that /ui asks for is in admin_key"
