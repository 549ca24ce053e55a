import pytest

from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.repo.git import explain, reason_of
from outwake.worker.sandboxes.base import StepError

PERMANENT = [
    "fatal: '/srv/none.git' does not appear to be a git repository",
    "fatal: repository 'https://github.com/octo/none.git/' not found",
    "remote: Repository not found.\nfatal: repository 'https://host/x/' not found",
    "ERROR: Repository not found.\nfatal: Could not read from remote repository.",
    "fatal: could not read Username for 'https://github.com': terminal prompts disabled",
    "fatal: Authentication failed for 'https://host/x/'",
    "git@host: Permission denied (publickey).\nfatal: Could not read from remote repository.",
    "fatal: unable to access 'https://host/x/': The requested URL returned error: 403",
    "Host key verification failed.\nfatal: Could not read from remote repository.",
    "fatal: detected dubious ownership in repository at '/srv/x'",
    "fatal: transport 'file' not allowed",
]
TRANSIENT = [
    "fatal: unable to access 'https://host/x/': Could not resolve host: host",
    "fatal: unable to access 'https://host/x/': The requested URL returned error: 503",
    "ssh: connect to host h port 22: Connection refused\nfatal: Could not read from remote "
    "repository.\n\nPlease make sure you have the correct access rights",
    "error: RPC failed; curl 56 GnuTLS recv error\nfatal: early EOF",
    "fatal: write error: No space left on device",
    "",
]


@pytest.mark.parametrize("stderr", PERMANENT)
def test_errors_that_trying_again_cannot_mend(stderr: str) -> None:
    assert isinstance(explain(StepError("clone", 128, stderr), "x"), PermanentError)


@pytest.mark.parametrize("stderr", TRANSIENT)
def test_errors_that_may_pass(stderr: str) -> None:
    assert isinstance(explain(StepError("clone", 128, stderr), "x"), TransientError)


def test_the_reason_is_what_git_complained_of() -> None:
    stderr = "Receiving objects: 10%\rReceiving objects: 20%\rerror: a\nhint: no\nfatal: b\n"
    assert reason_of(stderr) == "error: a; fatal: b"
    assert reason_of("just this\n") == "just this"


def test_what_a_server_says_is_not_read_back() -> None:
    stderr = (
        "remote: vault token s.INTERNAL\n"
        "fatal: unable to access 'https://host/x/': The requested URL returned error: 403\n"
        "fatal: remote error: also INTERNAL"
    )
    reason = reason_of(stderr)
    assert "INTERNAL" not in reason
    assert "403" in reason
    assert reason_of("remote: INTERNAL\n") == ""
