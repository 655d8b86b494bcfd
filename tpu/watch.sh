#!/usr/bin/env bash
# Keep a run going until it ends: create the TPU, set it up, run; after a preemption, or any other loss of the TPU, do
# it all again with the same command, which goes on from the last checkpoint.
#   tpu/watch.sh [--dry-run] --config=experiments/x.py --workdir=gs://bucket/x [other options of ponder.train]
# Runs where you are (a laptop that stays awake, a small VM); may itself be stopped and started again.
# Exit code 0: the run has ended well; 1: it stopped too often on a healthy TPU; 2: the command line, here or of the
# run, or the run's data was refused.
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=tpu/settings.sh
source "$here/settings.sh"

: "${RESTARTS:=3}" # of a run that stops while its TPU is well: it may not mend by itself

workdir=
for word in "$@"; do
  case "$word" in --workdir=*) workdir=${word#--workdir=} ;; esac
done
case "$workdir" in
  gs://?*) ;;
  *) die "a run that survives its TPU keeps its workdir on gs://: give --workdir=gs://..." ;;
esac

say() {
  echo "$(date -u +%FT%TZ) $TPU: $1"
}

delete() {
  run gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet
}

# What worker 0 says of the run: its exit code; running; gone, where it died without one; fresh, where there was none.
progress() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command="cat ~/ponder.exit 2> /dev/null ||
{ tmux has-session -t ponder 2> /dev/null && echo running; } || { [ -e ~/ponder.sh ] && echo gone; } || echo fresh" \
    2>/dev/null || echo unreachable
}

if [ "$DRY_RUN" = 1 ]; then
  "$here/create.sh" --dry-run
  "$here/setup.sh" --dry-run
  "$here/run.sh" --dry-run "$@"
  echo "# every $POLL_SECONDS s; where the TPU is lost, it is deleted, and all of the above is done again:"
  run gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" '--format=value(state)'
  delete
  exit 0
fi

# One look and at most one act a turn, then a rest. What fails (a busy zone, a lost connection) is tried again the next
# turn.
failures=0
while true; do
  vm=$(vm_state)
  case "$vm" in
    READY)
      now=$(progress)
      case "$now" in
        running | unreachable) ;;
        fresh)
          say "setting up"
          failures=0
          if "$here/setup.sh" && "$here/run.sh" "$@"; then say "running"; else say "not set up; trying again"; fi
          ;;
        2)
          die "the run refused its command line or its data; see ~/ponder.log on worker 0"
          ;;
        *)
          # A run that SIGTERM ends saves and leaves with 0 too: only the results say that it is over.
          if [ "$now" = 0 ] && gcloud storage ls "$workdir/results.json" >/dev/null 2>&1; then
            say "the run has ended; delete the TPU with:"
            echo "gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force --quiet"
            exit 0
          fi
          failures=$((failures + 1))
          if [ "$failures" -gt "$RESTARTS" ]; then
            say "the run stopped $failures times on a healthy TPU; see ~/ponder.log on worker 0" >&2
            exit 1
          fi
          say "the run stopped ($now): starting it again ($failures of $RESTARTS)"
          # Other workers may still wait for the one that stopped.
          on_worker all "tmux kill-session -t ponder 2> /dev/null; rm -f ~/ponder.exit" || true
          "$here/run.sh" "$@" || true
          ;;
      esac
      ;;
    MISSING)
      request=$(request_state)
      case "$request" in
        MISSING)
          say "creating"
          "$here/create.sh" || say "not created; trying again"
          ;;
        FAILED | SUSPENDING | SUSPENDED)
          say "the request is $request: deleting it"
          delete || true
          ;;
        *) say "the request is $request" ;;
      esac
      ;;
    CREATING | STARTING | RESTARTING | REPAIRING | REIMAGING | UNHIDING) say "$vm" ;;
    *) # PREEMPTED, TERMINATED, STOPPED, ...
      say "$vm: deleting it, to create it again"
      delete || true
      ;;
  esac
  sleep "$POLL_SECONDS"
done
