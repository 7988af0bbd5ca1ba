#!/usr/bin/env bash
# What launch/tpu.py calls on the hosts of a TPU slice:
#   setup URL      packages, and URL (gs://BUCKET or nfs://HOST/SHARE) mounted
#   start WORDS    launch/train.py WORDS as a service: it outlives the connection, and gets SIGTERM when the host goes down
#   poll           lines of the log since the last poll, and the state of the training
#   state          the latter alone: the lines stay for the next poll
#   stop           SIGTERM to the training, and wait until it has saved
#   logs, status   for people
set -euo pipefail

unit=llip-train
mount=/mnt/llip
venv="$HOME/llip_jax_venv"
storage="$HOME/.llip_jax_storage" # the URL, to mount it again when the host was restarted
cursor="$HOME/.llip_jax_cursor"   # where the last poll ended in the log
stopped="$HOME/.llip_jax_stopped" # there after "stop"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

install_package() {
  # Unattended upgrades of a new host hold the lock for minutes.
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq update
  sudo apt-get -o DPkg::Lock::Timeout=600 -qq install --yes "$@"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  install_package gcsfuse
}

mount_storage() {
  local url
  url="$(cat "$storage")"
  if mountpoint --quiet "$mount"; then
    return
  fi
  sudo mkdir -p "$mount"
  case "$url" in
    gs://*)
      command -v gcsfuse >/dev/null || install_gcsfuse
      sudo chown "$(id -u):$(id -g)" "$mount"
      sudo systemctl reset-failed llip-storage 2>/dev/null || true
      # A service, so that a host that goes down ends it after the training. No metadata is kept: every host must see at
      # once what another has written.
      sudo systemd-run --quiet --unit=llip-storage --service-type=forking --uid="$(id -u)" --gid="$(id -g)" \
        --property=After=network-online.target "$(command -v gcsfuse)" --implicit-dirs --metadata-cache-ttl-secs=0 \
        --metadata-cache-negative-ttl-secs=0 "${url#gs://}" "$mount"
      ;;
    nfs://*)
      command -v mount.nfs >/dev/null || install_package nfs-common
      local share="${url#nfs://}"
      sudo mount -t nfs "${share%%/*}:/${share#*/}" "$mount"
      ;;
  esac
}

setup() {
  echo "$1" >"$storage"
  # The hosts' own Python is older than 3.11.
  command -v "$HOME/.local/bin/uv" >/dev/null || python3 -m pip install --quiet --user uv
  [ -d "$venv" ] || "$HOME/.local/bin/uv" venv --quiet --python 3.11 "$venv"
  cd "$root"
  VIRTUAL_ENV="$venv" "$HOME/.local/bin/uv" pip install --quiet --requirement requirements.txt --editable ".[tpu]"
  mount_storage
}

start() {
  mount_storage
  rm -f "$stopped"
  sudo systemctl stop "$unit" 2>/dev/null || true
  sudo systemctl reset-failed "$unit" 2>/dev/null || true
  # "mixed": SIGTERM to the training alone, and its data workers end with it. A service may lock little memory by default,
  # too little for the TPU driver. systemd replaces $NAME in words; $$ stands for $.
  sudo systemd-run --quiet --unit="$unit" --uid="$(id -u)" --gid="$(id -g)" --working-directory="$root" \
    --property=KillMode=mixed --property=TimeoutStopSec=900 --property=RemainAfterExit=yes \
    --property=After="network-online.target llip-storage.service mnt-llip.mount" --property=LimitMEMLOCK=infinity \
    --property=LimitNOFILE=1048576 \
    --setenv=PYTHONUNBUFFERED=1 --setenv=JAX_COMPILATION_CACHE_DIR="$mount/.compilations" \
    "$venv/bin/python" launch/train.py "${@//\$/\$\$}"
}

poll() {
  sudo journalctl --unit="$unit" --output=cat --quiet --no-pager --cursor-file="$cursor" | tail -n 1000 || true
  echo "== state =="
  state
}

state() {
  systemctl show "$unit" --property=SubState --property=ExecMainCode --property=ExecMainStatus
  if [ -e "$stopped" ]; then
    echo "Stopped=yes"
  fi
}

stop() {
  touch "$stopped"
  sudo systemctl stop "$unit" || true # it may have ended by itself
}

action="$1"
shift
case "$action" in
  setup | start | poll | state | stop) "$action" "$@" ;;
  logs) sudo journalctl --unit="$unit" --output=cat --lines=200 "$@" ;;
  status) systemctl status "$unit" --no-pager --lines=20 || true ;;
  *)
    echo "tpu_worker.sh: no action named $action" >&2
    exit 2
    ;;
esac
