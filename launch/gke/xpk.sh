#!/usr/bin/env bash
# The same through xpk, on a cluster that xpk made (docs/pods.md):
#
#   CLUSTER=llip ZONE=us-west4-a TPU_TYPE=v5litepod-256 IMAGE=us-docker.pkg.dev/PROJECT/llip/train:1 STORAGE=llip-runs \
#     launch/gke/xpk.sh g14 --config configs/llip_g14.py --workdir /mnt/llip/g14 \
#       --config.data.source=webdataset --config.data.path='/mnt/llip/data/*.tar' [--config.FIELD=VALUE ...]
#
# XPK_FLAGS: further flags of "xpk workload create", such as "--dry-run" or "--priority=high".
set -euo pipefail

: "${CLUSTER:?name of the cluster}" "${ZONE:?its zone}" "${TPU_TYPE:?slice, as v5litepod-256}"
: "${IMAGE:?container image}" "${STORAGE:?what xpk storage attach named the bucket}"
name="${1:?name of the run}"
shift

# "exec": xpk starts a subshell and sends SIGTERM to that, so the training must take its place.
command="exec python launch/train.py$(printf ' %q' "$@")"
read -r -a flags <<<"${XPK_FLAGS:-}"

# Exit code 2, bad configuration, is not among those that restart.
exec xpk workload create --workload="$name" --cluster="$CLUSTER" --zone="$ZONE" --tpu-type="$TPU_TYPE" \
  --docker-image="$IMAGE" --storage="$STORAGE" --max-restarts=100 --restart-on-exit-codes=1,75 \
  --termination-grace-period-seconds=600 --command="$command" "${flags[@]}"
