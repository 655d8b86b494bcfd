#!/usr/bin/env bash
# Bring this commit and its environment to every worker.   tpu/setup.sh [--dry-run]
# May be run again: it takes up where it was.
# shellcheck source=tpu/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

[ -n "$REPOSITORY" ] || die "no repository to clone: set REPOSITORY to an address that the workers can reach"
[ -n "$COMMIT" ] || die "no commit to check out: set COMMIT"

# The first ssh to each worker makes keys and asks; all at once they trip over each other.
count=$(hosts)
for ((worker = 0; worker < count; worker++)); do
  on_worker "$worker" true
done

# Images ship older Pythons: uv brings its own.
on_worker all "set -e
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d ponder/.git ] || git clone '$REPOSITORY' ponder
cd ponder
git fetch --quiet origin
git checkout --quiet --detach $COMMIT
[ -d .venv ] || ~/.local/bin/uv venv --quiet --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu]'
command -v tmux > /dev/null || sudo apt-get install -qq -y tmux"
