"""Whatever an agent does to its repository: the next turn has its files, or the verdict names the lost."""

import os
from pathlib import Path

import pytest

from outwake.worker.repo import workspace as module
from outwake.worker.repo.workspace import Saved
from outwake.worker.sandboxes import files as steps
from tests.integration.test_workspace import Open, Repository, anyio_backend, files, home, opened, origin, sh

__all__ = ["anyio_backend", "home", "opened", "origin"]  # fixtures

NESTED = "mkdir app; git init -q app; echo x > app/f; mkdir app/sub; echo y > app/sub/g"
COMMIT = "git add -A; git commit -qm inner"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN", (0.0,))
    monkeypatch.setattr(steps, "AGAIN", (0.0,))


async def turn(opened: Open, script: str, after: Saved | None = None) -> tuple[Saved, set[str]]:
    """What a turn of that script keeps, and the files with which the next one begins."""
    async with opened(after=after) as first:
        sh(first, script)
        kept = await first.save()
    async with opened(after=kept) as second:
        assert second.base == kept.head
        return kept, files(second)


@pytest.mark.parametrize(
    "script",
    [
        NESTED,
        f"{NESTED}; cd app; {COMMIT}",
        f"{NESTED}; cd app; {COMMIT}; cd ..; git add -A; git commit -qm outer",
        f"{NESTED}; cd app; {COMMIT}; cd ..; git add -A; git commit -qm outer; rm -rf app/.git",
        f"{NESTED}; cd app; {COMMIT}; git init -q sub",
        f"{NESTED}; cd app; git worktree add -q ../tree 2> /dev/null || :; cd ..; rm -rf tree",
        "mkdir -p app/sub; echo x > app/f; echo y > app/sub/g; git add -A; git commit -qm a; git init -q app",
    ],
)
async def test_the_files_of_a_repository_inside_are_kept(opened: Open, script: str) -> None:
    kept, left = await turn(opened, script)
    assert kept.lost == []
    assert left == {"README.md", "app/f", "app/sub/g"}


async def test_many_repositories_inside_and_odd_names_are_kept(opened: Open) -> None:
    script = """
    for name in 'a b' "it's" 'ü' '-x' 'é"q' '*' '#'; do
        mkdir -p -- "in/$name"; git init -q -- "in/$name"; echo x > "in/$name/a file"
    done
    echo ignored > .gitignore; touch in/ignored "in/a b/ignored"
    """
    kept, left = await turn(opened, script)
    assert kept.lost == []
    assert left == {
        *("README.md", ".gitignore", "in/a b/a file", "in/it's/a file", "in/ü/a file", "in/-x/a file"),
        *('in/é"q/a file', "in/*/a file", "in/#/a file"),
    }


@pytest.mark.parametrize(
    "path",
    [
        *(".gitignore", ".gitattributes", ".gitmodules", "in/.gitignore", ".git/info/exclude", ".git/index"),
        *(".git/MERGE_HEAD", ".git/commondir", ".git/objects/info/alternates", ".git/refs/heads/zz"),
    ],
)
@pytest.mark.parametrize("make", ["mkfifo", "ln -s /dev/zero"])
async def test_a_pipe_or_a_device_holds_up_nobody(opened: Open, path: str, make: str) -> None:
    """Git would wait at it, or read it without end."""
    script = f"mkdir -p in .git/info; echo a > in/a; rm -f {path}; {make} {path}"
    kept, left = await turn(opened, script)
    assert (kept.lost, left) == ([], {"README.md", "in/a"})


async def test_a_file_without_end_is_named_and_the_others_are_kept(opened: Open) -> None:
    kept, left = await turn(opened, "truncate -s 200G 'a large file'; truncate -s 2G README.md; echo b > b")
    assert sorted(kept.lost) == [
        "not kept: README.md, which is larger than 1 GiB",
        "not kept: a large file, which is larger than 1 GiB",
    ]
    assert left == {"README.md", "b"}


async def test_a_detached_heads_commits_become_the_branchs(opened: Open) -> None:
    script = "git checkout -q --detach; echo a > a; git add a; git commit -qm a; echo b > b"
    kept, left = await turn(opened, script)
    assert kept.lost == []
    assert left == {"README.md", "a", "b"}
    assert [commit.subject for commit in kept.commits] == ["a", "Save what the agent left uncommitted"]
    assert "the agent had left the work branch" in kept.notes[0]


@pytest.mark.parametrize(
    "script",
    [
        "git checkout -qb mine; echo a > a; git add a; git commit -qm a; echo b > b",
        "git branch -m mine; echo a > a; git add a; git commit -qm a; echo b > b",
        "echo a > a; git add a; git commit -qm a; echo b > b; git checkout -q --detach; git branch -D work/x",
        "git checkout -q --orphan mine; echo a > a; echo b > b",
    ],
)
async def test_work_on_another_branch_becomes_the_branchs(opened: Open, script: str) -> None:
    kept, left = await turn(opened, script)
    assert (kept.lost, left) == ([], {"README.md", "a", "b"})


async def test_commits_that_do_not_follow_the_branch_are_kept_beside_it(opened: Open) -> None:
    script = """
    echo a > a; git add a; git commit -qm a
    git checkout -q --detach HEAD~; echo b > b; git add b; git commit -qm b
    git checkout -qb other HEAD~; echo c > c; git add c; git commit -qm c
    git checkout -q --detach work/x; echo d > d; git stash -qu
    git checkout -q other; echo e > e
    """
    async with opened() as first:
        sh(first, script)
        kept = await first.save()
    assert kept.lost == []
    for _ in range(2):  # and so on, over further turns
        async with opened(after=kept) as following:
            assert files(following) == {"README.md", "a"}
            sh(following, "git show refs/outwake/aside/heads/other:c refs/outwake/aside/heads/other:e")
            sh(following, "git show refs/outwake/aside/stash^3:d")
            kept = await following.save()
        assert kept.lost == []
        assert len([note for note in kept.notes if "kept as refs/outwake/aside/" in note]) == 2


@pytest.mark.parametrize(
    "script",
    [
        "git update-index --assume-unchanged README.md; echo a > README.md",
        "git update-index --skip-worktree README.md; echo a > README.md",
        "echo garbage > .git/index; echo a > README.md",
        "rm .git/index; echo a > README.md",
        "touch .git/index.lock .git/HEAD.lock .git/refs/heads/work/x.lock; echo a > README.md",
        "git config core.splitIndex true; git update-index --split-index; echo a > README.md",
        "git config core.untrackedCache true; git status -s; echo a > README.md",
        "printf '#!/bin/sh\\nfalse\\n' > .git/hooks/pre-commit; chmod +x .git/hooks/*; echo a > README.md",
        "git config core.bare true; echo a > README.md",
        "git config core.worktree /tmp; echo a > README.md",
        "git config core.fileMode false; git config core.ignoreCase true; echo a > README.md",
        "git config commit.gpgSign true; git config gpg.program false; echo a > README.md",
        "echo '* working-tree-encoding=UTF-16' > .git/info/attributes; echo a > README.md",
    ],
)
async def test_changes_are_kept_whatever_the_clones_configuration(opened: Open, script: str) -> None:
    async with opened() as first:
        sh(first, f"mkdir -p .git/hooks .git/info; {script}")
        kept = await first.save()
    assert kept.lost == []
    async with opened(after=kept) as second:
        assert Path(second.path, "README.md").read_text() == "a\n"


async def test_a_file_that_cannot_be_converted_is_kept_as_it_is(opened: Open) -> None:
    script = (
        "echo '*.txt text working-tree-encoding=UTF-16' > .gitattributes; printf abc > odd.txt; echo b > b"
    )
    kept, left = await turn(opened, script)
    assert kept.lost == []
    assert {"b", ".gitattributes"} <= left


async def test_a_sparse_work_tree_deletes_nothing(opened: Open, origin: Repository) -> None:
    for name in ("in", "out"):
        (origin.path / name).mkdir()
        origin.commit(f"{name}/file")
    kept, left = await turn(opened, "git sparse-checkout set --cone in; echo a > in/new")
    assert kept.lost == []
    assert left == {"README.md", "in/file", "in/new", "out/file"}


async def test_an_unfinished_merge_is_kept(opened: Open) -> None:
    script = """
    git checkout -qb other; echo a > README.md; git commit -qam a
    git checkout -q work/x; echo b > README.md; git commit -qam b; git merge -q other || :
    """
    async with opened() as first:
        sh(first, script)
        kept = await first.save()
    assert kept.lost == []
    async with opened(after=kept) as second:
        assert "<<<<<<<" in Path(second.path, "README.md").read_text()


@pytest.mark.parametrize("ends", ["", "git add -A; git commit -qm sub"])
async def test_what_only_a_submodule_has_is_named(opened: Open, tmp_path: Path, ends: str) -> None:
    """A submodule stays one; one without work of its own is nobody's loss."""
    home = tmp_path / "library-home"
    home.mkdir()
    library = Repository(tmp_path / "library", home)
    library.commit("lib")
    add = f"git -c protocol.file.allow=always submodule add -q {library.path} lib"
    async with opened() as first:
        sh(first, f"{add}; git commit -qm 'Add lib'")
        kept = await first.save()
        assert kept.lost == []
        sh(first, f"cd lib; echo x > new; {ends}")
        kept = await first.save()
    assert kept.lost == ["not kept: what was done in the submodule lib"]


async def test_content_that_only_lfs_has_is_named(opened: Open) -> None:
    """Nothing is lost of a file that was not committed: it is stored itself, not a pointer to it."""
    oid = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    script = """
    echo '*.bin filter=lfs diff=lfs merge=lfs -text' > .gitattributes
    git config filter.lfs.clean 'exit 1'; git config filter.lfs.required true
    echo content > new.bin
    """
    kept, left = await turn(opened, script)
    assert (kept.lost, left) == ([], {"README.md", ".gitattributes", "new.bin"})
    pointer = f"""
    printf 'version https://git-lfs.github.com/spec/v1\\noid sha256:{oid}\\nsize 5\\n' > old.bin
    git add old.bin; git commit -qm 'Add a pointer'
    mkdir -p .git/lfs/objects/4d/7a; echo 1234 > .git/lfs/objects/4d/7a/{oid}
    """
    kept, left = await turn(opened, pointer, after=kept)
    assert kept.lost == ["not kept: the content of old.bin, which is in Git LFS"]
    assert "old.bin" in left


async def test_no_program_that_the_clone_names_runs(opened: Open, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    script = f"""
    touch_it='touch {ran}'
    mkdir -p .git/hooks
    for hook in pre-commit post-commit reference-transaction post-index-change pre-push post-checkout; do
        printf '#!/bin/sh\\n%s\\n' "$touch_it" > .git/hooks/$hook; chmod +x .git/hooks/$hook
    done
    echo '* filter=evil diff=evil merge=evil' > .gitattributes
    for key in filter.evil.clean filter.evil.smudge filter.evil.process diff.evil.command \\
        diff.evil.textconv merge.evil.driver core.fsmonitor core.sshCommand \\
        core.editor gpg.program core.askPass \\
        core.alternateRefsCommand uploadpack.packObjectsHook credential.helper; do
        git config $key "$touch_it; false"
    done
    git config commit.gpgSign true; git config core.hooksPath .git/hooks; git config log.showSignature true
    echo changed > README.md; echo new > new
    """
    async with opened() as first:
        sh(first, script)
        assert not ran.exists()
        kept = await first.save()
    assert kept.lost == []
    assert not ran.exists()


async def test_a_broken_repository_is_named_and_the_earlier_work_stays(
    opened: Open,
) -> None:
    kept, _ = await turn(opened, "echo a > a")
    for script in ("rm -rf .git", "rm -rf .git/objects/*", "rm .git/HEAD"):
        async with opened(after=kept) as second:
            sh(second, script)
            broken = await second.save()
        assert broken.lost[0].startswith("cannot save the work branch: "), script
        async with opened(after=broken) as third:
            assert files(third) == {"README.md", "a"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
async def test_a_file_that_cannot_be_read_is_named(opened: Open) -> None:
    script = "echo a > a; echo b > b; mkdir c in; echo x > c/x; git init -q in; echo i > in/i; echo j > in/j"
    kept, left = await turn(opened, f"{script}; chmod 000 b c in/i")
    assert left == {"README.md", "a", "in/j"}
    for name in ('"b"', "'c/'", "in/i"):
        assert any(name in text for text in kept.lost), name


async def test_work_that_is_too_large_is_named_and_the_earlier_work_stays(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = await turn(opened, "echo a > a")
    monkeypatch.setattr(module, "BUNDLE_LIMIT", 100_000)
    async with opened(after=kept) as second:
        sh(second, "head -c 200000 /dev/urandom > big")
        large = await second.save()
    assert large.lost == ["the turn's commits are over 0 MiB: they must be pushed"]
    async with opened(after=large) as third:
        assert files(third) == {"README.md", "a"}


async def test_a_repository_of_sha256_under_any_users_configuration(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "odd"
    home.mkdir()
    (home / ".gitconfig").write_text(
        "[safe]\n\tbareRepository = explicit\n[core]\n\tfsmonitor = true\n\thooksPath = /nonexistent\n"
        '[url "file:///nowhere/"]\n\tinsteadOf = file:///\n[init]\n\tdefaultObjectFormat = sha1\n'
    )
    monkeypatch.setenv("HOME", str(home))
    theirs = Repository(tmp_path / "sha256", tmp_path)
    theirs("init", "--quiet", "--object-format=sha256", "--initial-branch=main", "../new")
    theirs("-C", "../new", "commit", "--quiet", "--allow-empty", "-m", "Begin")
    url = f"file://{tmp_path}/new"
    async with opened(url=url) as first:
        sh(first, "echo a > a")
        kept = await first.save()
    assert kept.lost == []
    assert kept.head is not None
    assert len(kept.head) == 64
    async with opened(url=url, after=kept) as second:
        assert files(second) == {"a"}


async def test_of_too_many_repositories_the_rest_is_named(opened: Open) -> None:
    """Not one of them keeps the work from being saved."""
    script = """
    mkdir many; cd many; i=0
    while test $i -lt 203; do
        mkdir -p $i/.git/objects $i/.git/refs; echo 'ref: refs/heads/main' > $i/.git/HEAD; echo x > $i/f
        i=$((i + 1))
    done
    echo more > file
    """
    async with opened() as first:
        sh(first, script)
        kept = await first.save()
    assert kept.lost == [
        f"not kept: many/{n}, which is one of too many Git repositories" for n in (97, 98, 99)
    ]
    async with opened(after=kept) as second:
        assert len(files(second)) == 202
        assert "many/file" in files(second)


async def test_of_too_many_branches_the_rest_is_named(opened: Open) -> None:
    script = """
    i=0
    while test $i -lt 250; do
        git update-ref refs/heads/b$i $(git commit-tree -m $i -p HEAD HEAD^{tree}); i=$((i + 1))
    done
    for n in 1 2 3; do git update-ref refs/heads/same$n HEAD; done
    """
    async with opened() as first:
        sh(first, script)
        kept = await first.save()
    assert kept.lost == ["not kept: commits on more than 200 branches"]
    assert kept.notes[-1] == "and 180 more"
