# Read by the other scripts, not run. Settings come from the environment; --dry-run prints commands instead of running.
# shellcheck shell=bash

set -euo pipefail

die() {
  echo "tpu: $1" >&2
  exit 2
}

DRY_RUN=0
if [ "${1:-}" = "--dry-run" ]; then
  DRY_RUN=1
  shift
fi

: "${TPU:=ponder}"                          # name of the TPU VM and of its queued resource
: "${ZONE:=us-central1-a}"
: "${ACCELERATOR:=v5litepod-8}"             # type and size, as gcloud names them
: "${SPOT:=1}"                              # 1: cheap, may be taken away at any time; 0: on demand
: "${POLL_SECONDS:=60}"                     # between two looks at the state of the TPU
: "${REPOSITORY:=$(git -C "$(dirname "${BASH_SOURCE[0]}")" remote get-url origin 2>/dev/null || true)}"
: "${COMMIT:=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse HEAD 2>/dev/null || true)}"

# The runtime goes by generation.
case "$ACCELERATOR" in
  v5litepod-*) : "${RUNTIME:=v2-alpha-tpuv5-lite}" ;;
  v5p-*) : "${RUNTIME:=v2-alpha-tpuv5}" ;;
  v6e-*) : "${RUNTIME:=v2-alpha-tpuv6e}" ;;
  v2-* | v3-* | v4-*) : "${RUNTIME:=tpu-ubuntu2204-base}" ;;
  *) [ -n "${RUNTIME:-}" ] || die "ACCELERATOR is '$ACCELERATOR': give v2-, v3-, v4-, v5litepod-, v5p- or v6e-, or set RUNTIME" ;;
esac

# Prints a command in --dry-run, so that it can be pasted; else runs it.
run() {
  if [ "$DRY_RUN" = 1 ]; then
    local word line=
    for word in "$@"; do
      case "$word" in
        '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/\'\\\'\'}'" ;;
      esac
      line+="$word "
    done
    printf '%s\n' "${line% }"
  else
    "$@"
  fi
}

# A command line on one worker by its number, or on all: on_worker all 'uptime'
on_worker() {
  run gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

# Hosts of the TPU; 1 in --dry-run, where nothing is asked.
hosts() {
  if [ "$DRY_RUN" = 1 ]; then
    echo 1
  else
    gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" --format='value(networkEndpoints.len())'
  fi
}

# State of the TPU VM: READY, CREATING, PREEMPTED, ... or MISSING where there is none.
vm_state() {
  gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" --format='value(state)' 2>/dev/null || echo MISSING
}

# State of the request for it: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, FAILED, ... or MISSING.
request_state() {
  gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" --format='value(state.state)' 2>/dev/null ||
    echo MISSING
}
