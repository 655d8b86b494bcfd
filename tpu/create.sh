#!/usr/bin/env bash
# Ask for a TPU and wait until it is there.   tpu/create.sh [--dry-run]
# shellcheck source=tpu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

spot=()
if [ "$SPOT" = 1 ]; then spot=(--spot); fi

run gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
  --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${spot[@]+"${spot[@]}"}

if [ "$DRY_RUN" = 1 ]; then
  run gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" --format='value(state.state)'
  exit 0
fi
while state=$(request_state) && [ "$state" != ACTIVE ]; do
  case "$state" in
    FAILED | SUSPENDED | SUSPENDING | MISSING) die "the request for $TPU is $state; delete it, then create it again" ;;
  esac
  echo "$TPU: $state"
  sleep "$POLL_SECONDS"
done
echo "$TPU: ACTIVE"
