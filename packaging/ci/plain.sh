#!/bin/sh
# Plain shell, for every other CI. As root on a machine with buildah, runc, /dev/fuse and the lazyfs command.
set -eu
: "${LAZYFS_IMAGE:=registry.example/app:1.2}"
: "${LAZYFS_STOP:=--until-http http://localhost:8080/healthz --timeout 2m}"
: "${LAZYFS_LIST:=start.prefetch}"
export LAZYFS_IMAGE LAZYFS_STOP LAZYFS_LIST     # and REGISTRY_USER, REGISTRY_PASSWORD from the CI's secrets
ci/lazyfs-ci
