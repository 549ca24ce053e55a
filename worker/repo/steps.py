"""The shell steps that make, read and save a workspace; `worker/repo/workspace.py` runs them in a sandbox.

Every script begins with GIT: git runs under our configuration only. It reads no system or user
configuration, runs no hook, no fsmonitor, no credential helper but the store of our file, asks nobody for a
password, uses no transport that the step does not allow, follows no redirect, and speaks the C locale.

A script's arguments are `$1`, `$2` …. What it prints goes together with what git prints as errors.
"""

from pathlib import Path

from outwake.worker.sandboxes.files import DIGEST

GIT = r"""
export LC_ALL=C GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_ATTR_NOSYSTEM=1 GIT_ALLOW_PROTOCOL=none
export GIT_TERMINAL_PROMPT=0 GIT_ASKPASS= SSH_ASKPASS= GIT_SSH_COMMAND='ssh -o BatchMode=yes'
export GIT_NO_LAZY_FETCH=1
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_CONFIG_COUNT GIT_CONFIG_PARAMETERS
home=${OUTWAKE_HOME:-$HOME/outwake}; repo=$home/repo; ours=$home/save.git
work=$ours/work
credentials=$home/git-credentials; bundle=$home/work.bundle
git() {
    command git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c core.attributesFile=/dev/null \
        -c gc.auto=0 -c maintenance.auto=false -c commit.gpgSign=false -c http.followRedirects=false \
        -c credential.helper= -c credential.helper="store --file='$credentials'" "$@"
}
theirs() { git --git-dir="$repo/.git" "$@"; }
inside() (
    export GIT_DIR="$ours" GIT_WORK_TREE="$repo" GIT_INDEX_FILE="$ours/index"
    export GIT_OBJECT_DIRECTORY="$repo/.git/objects"
    git -c core.sparseCheckout=true -c core.excludesFile="$repo/.git/info/exclude" "$@"
)
"""

# $1: new, or used if an earlier turn left its clone here.
PREPARE = """
umask 077; mkdir -p "$home"; chmod 700 "$home"; cd "$home"
rm -f "$credentials" "$bundle"
if test "$1" = new; then rm -rf "$repo"; fi
: > "$credentials"
pwd -P
"""

# $1: transports. $2: the addresses that https may use. $3: the URL. $4: how large a file may become, in
# blocks of 512 bytes. The rest: options of git clone.
CLONE = """
chmod 600 "$credentials"; export GIT_ALLOW_PROTOCOL="$1"; addresses=$2; url=$3
trap '' XFSZ; ulimit -f "$4" || :  # ignored, so that git says what has happened
shift 4
git -c http.curloptResolve="$addresses" clone --quiet --no-checkout --template= --origin=origin "$@" \\
    -- "$url" "$repo" 2>&1
"""

FORGET = 'rm -f "$credentials"'

# $1: target branch. $2: work branch. $3: bundle if there is one. $4: how many files a work tree may have.
# $5: how many bytes.
# Exit code 65: no such branch; 66: the repository is empty; 67: too many files; 68: too many bytes.
START = """
cd "$repo"; target=refs/remotes/origin/$1; branch=$2; kept=
theirs=$(git rev-parse --quiet --verify "refs/remotes/origin/$branch" || :)
if ! start=$(git rev-parse --quiet --verify "$target"); then
    test -n "$(git for-each-ref --count=1)" && exit 65
    exit 66
fi
start=${theirs:-$start}
source=
if test "$3" = bundle; then source=$bundle
# Version 1.0 kept the work of a directory sandbox in a mirror beside it.
elif git --git-dir="$home/../mirror.git" rev-parse --quiet --verify "refs/heads/$branch" > /dev/null 2>&1
then source=$home/../mirror.git; fi
if test -n "$source"; then
    GIT_ALLOW_PROTOCOL=file git fetch --quiet --no-tags --no-write-fetch-head \\
        -- "$source" "+refs/heads/$branch:refs/outwake/kept" '+refs/outwake/aside/*:refs/outwake/aside/*' 2>&1
    kept=$(git rev-parse --verify refs/outwake/kept)
    if test -z "$theirs" || ! git merge-base --is-ancestor "$kept" "$theirs"; then start=$kept; fi
fi
over=$(git ls-tree -r -l --full-tree "$start" | awk -v files="$4" -v bytes="$5" \\
    '{ n++; sum += $4; if (n > files) over = 67; else if (sum > bytes) over = 68; if (over) exit }
    END { print over + 0 }')
if test "$over" != 0; then exit "$over"; fi
git checkout --quiet --no-track -B "$branch" "$start" -- 2>&1
echo "$start $theirs"
"""

# $1: work branch. Goes on from what SAVE found, in the sandbox that it found it in.
REUSE = """
cd "$repo"; branch=refs/heads/$1
if test -d "$ours"; then
    head=$(inside rev-parse --verify "$branch")
    inside for-each-ref --format='update %(refname) %(objectname)' refs/outwake/aside \\
        | theirs update-ref --stdin
    theirs update-ref "$branch" "$head"
    theirs symbolic-ref HEAD "$branch"
    if test "$head" = "$(cat "$work/at")"; then cp "$ours/index" "$(theirs rev-parse --git-path index)"
    else git reset --quiet --hard 2>&1; fi
else
    head=$(git rev-parse --verify "$branch")
fi
known=$(git rev-parse --quiet --verify "refs/remotes/origin/$1" || :)
echo "$head $known"
"""

# Saves what the agent made: see there.
SAVE = Path(__file__).with_name("save.sh").read_text()

# $1: how many. $2: since. $3: work branch.
LOG = """
inside log --max-count="$1" --reverse --topo-order --no-show-signature --format='= %H %<(500,trunc)%s' \\
    "$2..refs/heads/$3" --
"""

# $1: transports. $2: the addresses that https may use. $3: the URL. $4: work branch. $5: the repository's
# commit of it, or empty.
PUSH = """
chmod 600 "$credentials"; export GIT_ALLOW_PROTOCOL="$1"; branch=refs/heads/$4
inside -c http.curloptResolve="$2" push --porcelain --no-verify --force-with-lease="$branch:$5" \\
    -- "$3" "$branch:$branch" 2>&1
theirs update-ref "refs/remotes/origin/$4" "$(inside rev-parse "$branch")" || :
"""

# $1: work branch. Prints the bundle's SHA-256 and its size.
BUNDLE = (
    """
rm -f "$bundle"; branch=refs/heads/$1
# Git makes no empty bundle: if the repository has all of the commits, the last goes along.
if test -z "$(inside rev-list --max-count=1 "$branch" --stdin < "$work/known")"; then
    head=$(inside rev-parse "$branch")
    theirs for-each-ref --no-contains="$head" --format='^%(objectname)' refs/remotes/origin > "$work/known"
    echo "^$head^@" >> "$work/known"
fi
{
    cat "$work/known"; echo "$branch"; inside for-each-ref --format='%(refname)' refs/outwake/aside
} | inside bundle create --quiet "$bundle" --stdin 2>&1
set -- "$bundle"
"""
    + DIGEST
)
