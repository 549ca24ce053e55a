"""The shell steps that make, read and save a workspace; `worker/repo/workspace.py` runs them in a sandbox.

Every script begins with GIT: git runs under our configuration only. It reads no system or user
configuration, runs no hook, no fsmonitor, no credential helper but the store of our file, asks nobody for a
password, uses no transport that the step does not allow, follows no redirect, and speaks the C locale.

A script's arguments are `$1`, `$2` …. What it prints goes together with what git prints as errors.
"""

GIT = r"""
export LC_ALL=C GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_ATTR_NOSYSTEM=1 GIT_ALLOW_PROTOCOL=none
export GIT_TERMINAL_PROMPT=0 GIT_ASKPASS= SSH_ASKPASS= GIT_SSH_COMMAND='ssh -o BatchMode=yes'
export GIT_NO_LAZY_FETCH=1
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_CONFIG_COUNT GIT_CONFIG_PARAMETERS
home=${OUTWAKE_HOME:-$HOME/outwake}; repo=$home/repo; ours=$home/save.git
credentials=$home/git-credentials; bundle=$home/work.bundle
git() {
    command git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c core.attributesFile=/dev/null \
        -c gc.auto=0 -c maintenance.auto=false -c commit.gpgSign=false -c http.followRedirects=false \
        -c credential.helper= -c credential.helper="store --file='$credentials'" "$@"
}
"""

# $1: new, or used if an earlier turn left its clone here.
PREPARE = """
umask 077; mkdir -p "$home"; chmod 700 "$home"; cd "$home"
rm -f "$credentials" "$bundle"
if test "$1" = new; then rm -rf "$repo"; fi
: > "$credentials"
pwd -P
"""

# $1: transports. $2: the URL. The rest: options of git clone.
CLONE = """
chmod 600 "$credentials"; export GIT_ALLOW_PROTOCOL="$1"; url=$2; shift 2
git clone --quiet --no-checkout --template= --origin=origin "$@" -- "$url" "$repo" 2>&1
"""

FORGET = 'rm -f "$credentials"'

# $1: target branch. $2: work branch. $3: bundle if there is one.
# Exit code 65: no such branch; 66: the repository is empty.
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
        -- "$source" "+refs/heads/$branch:refs/outwake/kept" 2>&1
    kept=$(git rev-parse --verify refs/outwake/kept)
    if test -z "$theirs" || ! git merge-base --is-ancestor "$kept" "$theirs"; then start=$kept; fi
fi
git checkout --quiet --no-track -B "$branch" "$start" -- 2>&1
echo "$start $theirs"
"""

# $1: work branch.
REUSE = """
cd "$repo"
head=$(git rev-parse --verify "refs/heads/$1")
theirs=$(git rev-parse --quiet --verify "refs/remotes/origin/$1" || :)
echo "$head $theirs"
"""

# $1: work branch. $2: the repository's commit of it at the start, or empty. $3: target branch.
SAVE = """
cd "$repo"; branch=refs/heads/$1
if test "$(git symbolic-ref --quiet HEAD || :)" = "$branch"; then
    rm -f .git/index.lock
    git add --all -- . 2>&1
    left=$(git status --porcelain --untracked-files=no)
    if test -n "$left"; then git commit --quiet -m 'Save what the agent left uncommitted' 2>&1; fi
fi
head=$(git rev-parse --verify "$branch")
# Nothing is ours to save if the next turn would start from it anyhow. That the repository has the commits
# under some other name is not enough.
ours=ours
if test -n "$2"; then test "$head" != "$2" || ours=
elif git merge-base --is-ancestor "$head" "refs/remotes/origin/$3"; then ours=; fi
echo "$head $ours"
"""

# $1: how many. $2: since. $3: work branch.
LOG = """
cd "$repo"
git log --max-count="$1" --reverse --topo-order --no-show-signature --format='= %H %s' \\
    "$2..refs/heads/$3" --
"""

# $1: transports. $2: the URL. $3: work branch. $4: the repository's commit of it, or empty.
PUSH = """
cd "$repo"; chmod 600 "$credentials"; export GIT_ALLOW_PROTOCOL="$1"; branch=refs/heads/$3
git push --quiet --no-verify --force-with-lease="$branch:$4" -- "$2" "$branch:$branch" 2>&1
git update-ref "refs/remotes/origin/$3" "$branch"
"""

# $1: work branch. Prints the bundle's SHA-256 and its size.
BUNDLE = """
cd "$repo"; rm -f "$bundle"; branch=refs/heads/$1
set -- --remotes=origin
# Git makes no empty bundle: if the repository has all of the commits, the last goes along.
if test "$(git rev-list --count "$branch" --not --remotes=origin)" = 0; then set -- "$branch^@"; fi
git bundle create --quiet "$bundle" "$branch" --not "$@" 2>&1
digest=$(sha256sum < "$bundle"); size=$(wc -c < "$bundle")
echo "${digest%% *} $size"
"""

# $1: the first byte, from 1. $2: how many.
READ = 'tail -c "+$1" "$bundle" | head -c "$2" | base64'
