#!/usr/bin/env bash
# Start or go on with a run on every worker, in tmux, and leave.
#   tpu/run.sh [--dry-run] --config=experiments/x.py --workdir=gs://bucket/x [other options of ponder.train]
# The same command goes on with a run that was cut short. Look in with: tpu/run.sh --attach
# shellcheck source=tpu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [ "${1:-}" = "--attach" ]; then
  run gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --ssh-flag=-t --command='tmux attach -t ponder'
  exit 0
fi
[ $# -gt 0 ] || die "nothing to run: give the options of ponder.train"

workdir=
for word in "$@"; do
  case "$word" in --workdir=*) workdir=${word#--workdir=} ;; esac
done
[ -n "$workdir" ] || die "no --workdir=...: a run goes on from its workdir"
case "$workdir" in
  gs://*) ;;
  *)
    [ "$(hosts)" = 1 ] || die "--workdir=$workdir is local, but $TPU has several hosts: give a gs:// workdir"
    [ "$SPOT" != 1 ] || echo "tpu: $workdir is lost with a spot TPU: give a gs:// workdir to go on after preemption" >&2
    ;;
esac

# tmux outlives the connection. The exit code is written down, so that watch.sh can tell an end from a death.
printf -v words ' %q' "$@"
on_worker all "tmux has-session -t ponder 2> /dev/null && exit 0
cat > ~/ponder.sh << 'END'
rm -f ~/ponder.exit
cd ~/ponder
.venv/bin/python -m ponder.train$words 2>&1 | tee -a ~/ponder.log
echo \"\${PIPESTATUS[0]}\" > ~/ponder.exit
END
tmux new-session -d -s ponder 'bash ~/ponder.sh'"
