# Save what the agent made, for the session's next turn. A step of worker/repo/steps.py, run after GIT.
#
# It goes into a repository of ours, made anew, which has the clone's objects and nothing else of it: no
# configuration, no hooks, no filters. Only refs are read with the clone's configuration.
#
# $1: work branch. $2: its commit at the start. $3: the repository's commit of it, or empty.
# $4: target branch. $5: name and $6: mail of the author.
#
# What an agent can make many of is bounded: repositories inside, branches, errors that are told.
#
# Prints lines: `head COMMIT ours` (without `ours` if the next turn would start there anyhow), `lost TEXT` for
# what could not be saved, `note TEXT` for what was saved in another way than the agent left it.

cd "$repo"; branch=refs/heads/$1; base=$2; known=$3; target=$4
export GIT_AUTHOR_NAME="$5" GIT_AUTHOR_EMAIL="$6" GIT_COMMITTER_NAME="$5" GIT_COMMITTER_EMAIL="$6"
export GIT_CEILING_DIRECTORIES="$repo"
say() { word=$1; shift; printf '%s %s\n' "$word" "$(printf '%s' "$*" | tr '\n\r' '  ' | cut -c1-300)"; }

# 0. Git would wait for ever at a pipe, and read a device without end. A link that leads nowhere does no harm.
find . \( -path './.git/*' -o -name '.git*' \) ! -type f ! -type d -exec sh -c '
    for file; do
        if test -e "$file" && ! test -f "$file" && ! test -d "$file"; then rm -f -- "$file"; fi
    done' sh {} + 2> /dev/null || :

format=$(theirs rev-parse --show-object-format 2>&1) || { echo "$format"; exit 1; }
rm -rf "$ours"
git init --quiet --bare --template= --object-format="$format" "$ours"
mkdir "$work"
git init --quiet --bare --template= --object-format="$format" "$work/none"
theirs for-each-ref --format='^%(objectname)' refs/remotes/origin > "$work/known"

# 1. Where the agent stopped. The branch may be gone, HEAD detached or on another branch.
tip=$(theirs rev-parse --quiet --verify "$branch^{commit}" || echo "$base")
at=$(theirs rev-parse --quiet --verify 'HEAD^{commit}' || echo "$tip")
on=$(theirs symbolic-ref --quiet HEAD || :)

# 2. The agent's index saves reading all files again. Marks in it that hide changes are removed.
if ! cp "$(theirs rev-parse --git-path index)" "$ours/index" 2> "$work/said" \
    || ! inside ls-files -v > "$work/listed" 2> "$work/said"; then
    rm -f "$ours/index"; inside read-tree "$at"; inside ls-files -v > "$work/listed"
fi
if grep -q '^[a-z]' "$work/listed"; then
    inside ls-files -z | inside update-index --no-assume-unchanged -z --stdin
fi

# 3. A repository inside is no part of a commit: Git would store its name alone, or nothing. Its files are
# added one by one. A submodule stays one, but what only it has is lost.
submodule() {
    git config --file .gitmodules --get-regexp '^submodule\..*\.path$' 2> "$work/said" | cut -d' ' -f2- \
        | grep -qxF -e "$1" || inside --literal-pathspecs ls-tree "$base" -- "$1" | grep -q '^160000'
}
# What could not even be looked into.
unread() {
    { grep '^warning: could not open directory' "$work/said" || :; } | head -n 20 \
        | while IFS= read -r line; do say lost "$line"; done
}
# Git stops at the first file that it cannot read.
one_by_one() (
    cd "$1"
    export GIT_DIR="$ours" GIT_WORK_TREE="$repo" GIT_INDEX_FILE="$ours/index"
    export GIT_OBJECT_DIRECTORY="$repo/.git/objects"
    head -zn 2000 "$work/files" | xargs -0 -n 1 git update-index --add --replace --
)
# The first letter of what a commit in the submodule would add, asked without its configuration.
dirty() (
    cd "$1"; at=$(git rev-parse --verify HEAD)
    GIT_OBJECT_DIRECTORY=$(git rev-parse --absolute-git-dir)/objects
    export GIT_OBJECT_DIRECTORY GIT_DIR="$work/none" GIT_WORK_TREE="$PWD" GIT_INDEX_FILE="$work/index"
    git read-tree "$at" && git add --all --dry-run . | head -c 1
) 2> "$work/said"
{
    find . -mindepth 2 -name .git -prune 2> "$work/said" | sed -e 's|^\./||' -e 's|/\.git$||'
    inside ls-files -s | grep '^160000' | cut -f2-
} | sort -u > "$work/nested" || :
printf '.\0' > "$work/paths"
# No bundle has room for such a file, and to read a sparse one takes hours.
find . -path ./.git -prune -o -type f -size +2097152 -print0 2> "$work/said" | head -zn 200 > "$work/large"
xargs -0 -r -n 1 sh -c 'printf ":(exclude,literal)%s\0" "${1#./}"' sh < "$work/large" >> "$work/paths"
tr '\n\0' ' \n' < "$work/large" | while IFS= read -r path; do
    say lost "${path#./}, which is larger than 1 GiB"
done
number=0
while IFS= read -r dir; do
    number=$((number + 1))
    if test "$number" -gt 200; then
        printf ':(exclude,literal)%s\0' "$dir" >> "$work/paths"
        say lost "$dir, which is one of too many Git repositories"
        continue
    fi
    if ! test -d "$dir" || test -L "$dir" || inside check-ignore --quiet -- "$dir"; then continue; fi
    if submodule "$dir"; then
        if test -e "$dir/.git"; then
            only=$(git -C "$dir" rev-list --count HEAD --not --remotes 2> "$work/said" || echo some)
            if test "$only$(dirty "$dir")" != 0; then say lost "what was done in the submodule $dir"; fi
        fi
        continue
    fi
    if inside --literal-pathspecs ls-files -s -- "$dir" | grep -qv '^160000'; then continue; fi
    printf ':(exclude,literal)%s\0' "$dir" >> "$work/paths"
    inside update-index --force-remove -- "$dir"
    set -- --others --exclude-standard
    if test -f .gitignore; then set -- "$@" --exclude-from="$repo/.gitignore"; fi
    (
        export GIT_DIR="$work/none" GIT_WORK_TREE="$repo/$dir"; cd "$dir"; git ls-files -z "$@"
    ) 2> "$work/said" | { grep -zv '/$' || :; } > "$work/files"
    unread
    if ! (cd "$dir"; inside update-index --add --replace -z --stdin < "$work/files" > "$work/said" 2>&1); then
        one_by_one "$dir" > "$work/said" 2>&1 || :
        grep '^fatal:' "$work/said" | head -n 20 | while IFS= read -r line; do say lost "$line"; done
    fi
    say note "$dir is a Git repository of its own: its files were committed, its history was not"
done < "$work/nested"

# 4. All else. If some file cannot be converted as its attributes say, all are stored as they are.
add() {
    inside add --all --ignore-errors --pathspec-from-file="$work/paths" --pathspec-file-nul \
        > "$work/said" 2>&1
}
if ! add; then
    mkdir -p "$ours/info"; echo '* -text !eol !working-tree-encoding -ident -filter' > "$ours/info/attributes"
    add || grep -E '^(error|fatal):' "$work/said" | head -n 100 \
        | while IFS= read -r line; do say lost "$line"; done
fi
unread
inside ls-files -s | { grep '^160000' || :; } | cut -f2- | while IFS= read -r dir; do
    submodule "$dir" || say lost "the directory $dir, which is a Git repository of its own"
done

# 5. Commit what the agent left uncommitted, on what it had checked out.
tree=$(inside write-tree)
if test "$tree" != "$(inside rev-parse "$at^{tree}")"; then
    set -- -p "$at"
    for other in $(head -n 16 "$(theirs rev-parse --git-path MERGE_HEAD)" 2> "$work/said" || :); do
        inside rev-parse --quiet --verify "$other^{commit}" > "$work/said" || continue
        set -- "$@" -p "$other"
    done
    at=$(inside commit-tree "$tree" "$@" -m 'Save what the agent left uncommitted')
fi
echo "$at" > "$work/at"

# 6. That is the work branch's new commit if it has the old one in it. What is not in it is kept beside it.
head=$tip
if inside merge-base --is-ancestor "$tip" "$at"; then head=$at; fi
inside update-ref "$branch" "$head"
if test "$on" != "$branch" && test "$head" = "$at" && test "$at" != "$tip"; then
    say note "the agent had left the work branch: what it did on ${on:-a detached HEAD} was put on it"
fi
echo "$at ${on:-refs/detached/$(echo "$at" | cut -c1-12)}" > "$work/refs"
theirs for-each-ref --format='%(objectname) %(refname)' --no-merged="$head" --sort=-committerdate \
    refs/heads refs/stash refs/outwake/aside > "$work/others" 2> "$work/said" \
    || theirs for-each-ref --format='%(objectname) %(refname)' refs/heads refs/stash refs/outwake/aside \
        > "$work/others"
if test "$(wc -l < "$work/others")" -gt 200; then say lost "commits on more than 200 branches"; fi
head -n 200 "$work/others" >> "$work/refs"
beside=
while read -r commit ref; do
    if test "$ref" = "$on"; then commit=$at; fi
    only=$(inside rev-list --max-count=1 "$commit" "^$head" --stdin < "$work/known")
    if test -z "$only"; then continue; fi
    case $ref in refs/outwake/aside/*) name=$ref ;; *) name=refs/outwake/aside/${ref#refs/} ;; esac
    if inside update-ref "$name" "$commit" 2> "$work/said"; then
        beside=yes; say note "commits that are not on the work branch are kept as $name"
    else say lost "the commits of $ref"; fi
done < "$work/refs"

# 7. Content that Git LFS has put aside is in no commit.
lfs=$(theirs rev-parse --git-path lfs/objects)
if test -d "$lfs"; then
    inside diff-tree -r --no-renames --diff-filter=AM "$base" "$head" | head -n 1000 \
        | while IFS="$(printf '\t')" read -r about path; do
            about=${about% *}; blob=${about##* }
            if test "$(inside cat-file -s "$blob")" -gt 1024; then continue; fi
            oid=$(inside cat-file blob "$blob" | sed -n 's/^oid sha256:\([0-9a-f]*\)$/\1/p' | head -n 1)
            if test -n "$oid" && test -n "$(find "$lfs" -name "$oid" | head -n 1)"; then
                say lost "the content of $path, which is in Git LFS"
            fi
        done
fi

# Nothing is ours to save if the next turn would start from it anyhow. That the repository has the commits
# under some other name is not enough.
ours_too=ours
if test -n "$beside"; then :
elif test -n "$known"; then test "$head" != "$known" || ours_too=
elif inside merge-base --is-ancestor "$head" "$(theirs rev-parse "refs/remotes/origin/$target")"
then ours_too=; fi
echo "head $head $ours_too"
