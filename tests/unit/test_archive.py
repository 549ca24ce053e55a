"""An agent's memory, packed and unpacked, whatever the agent has put there."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from outwake.worker.agents import archive
from outwake.worker.agents.archive import pack, plain, unpack
from tests.support.process import ROOT

OLD = "/usr/bin/python3.11"  # Debian 12's own, 3.11.2
ROUND = """
import importlib.util, sys, tarfile
from pathlib import Path
spec = importlib.util.spec_from_file_location("archive", sys.argv[1])
archive = importlib.util.module_from_spec(spec)
spec.loader.exec_module(archive)
archive.unpack(archive.pack(Path(sys.argv[2]), Path("kept"), 10**6), Path(sys.argv[3]))
print(hasattr(tarfile, "data_filter"))
"""


def filled(root: Path) -> Path:
    (root / "kept" / "deep").mkdir(parents=True)
    (root / "kept" / "deep" / "a").write_text("a")
    (root / "other").write_text("not kept")
    (root / "kept" / "link").symlink_to("/etc/passwd")
    os.mkfifo(root / "kept" / "fifo")
    return root


def test_plain_files_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the filters of newer releases of Python, and without."""
    packed = pack(filled(tmp_path / "from"), Path("kept"), 10**6)
    assert packed is not None
    unpack(packed, tmp_path / "new")
    monkeypatch.delattr(tarfile, "data_filter")
    unpack(packed, tmp_path / "old")
    for home in (tmp_path / "new", tmp_path / "old"):
        assert [path for path in home.rglob("*") if not path.is_dir()] == [home / "kept" / "deep" / "a"]


def test_an_archive_can_be_rid_of_all_but_plain_files(tmp_path: Path) -> None:
    """For a sandbox that unpacks by itself what was packed in another."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as made:
        made.add(filled(tmp_path / "from") / "kept", "kept")
        for name in ("/absolute", "../outside"):
            made.addfile(tarfile.TarInfo(name), io.BytesIO())
    with tarfile.open(fileobj=io.BytesIO(plain(buffer.getvalue()))) as left:
        assert [member.name for member in left if not member.isdir()] == ["kept/deep/a"]
        file = left.extractfile("kept/deep/a")
        assert file is not None
        assert file.read() == b"a"


@pytest.mark.skipif(shutil.which(OLD) is None, reason=f"no {OLD}")
def test_an_old_python_does_it_too(tmp_path: Path) -> None:
    code = ROOT / "worker" / "agents" / "archive.py"
    argv = [OLD, "-I", "-c", ROUND, str(code), str(filled(tmp_path / "from")), str(tmp_path / "to")]
    subprocess.run(argv, check=True, capture_output=True)
    assert (tmp_path / "to" / "kept" / "deep" / "a").read_text() == "a"


def made(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("filters", [True, False])
def test_nothing_is_written_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filters: bool) -> None:
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter")
    device = tarfile.TarInfo("device")
    device.type = tarfile.CHRTYPE
    evil = made(
        (tarfile.TarInfo("../up"), b"x"),
        (tarfile.TarInfo(f"{tmp_path}/absolute"), b"x"),
        (tarfile.TarInfo("a/../../up"), b"x"),
        (link("out", str(tmp_path)), b""),
        (tarfile.TarInfo("out/through"), b"x"),
        (link("hard", "../../etc/passwd", tarfile.LNKTYPE), b""),
        (device, b""),
        (tarfile.TarInfo("good"), b"x"),
    )
    home = tmp_path / "home"
    home.mkdir()
    unpack(evil, home)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        *("home", "home/good", "home/out", "home/out/through")
    ]


def test_few_bytes_that_stand_for_many_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "UNPACKED_LIMIT", 100_000)
    bomb = made((tarfile.TarInfo("a"), bytes(60_000)), (tarfile.TarInfo("b"), bytes(60_000)))
    assert len(bomb) < 1000
    with pytest.raises(tarfile.TarError, match="over 0 MiB"):
        unpack(bomb, tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "sparse").write_bytes(bytes(200_000))
    assert pack(tmp_path, Path("kept"), 10**6) is None


def test_what_is_too_large_when_packed_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "random").write_bytes(os.urandom(10_000))
    assert pack(tmp_path, Path("kept"), 5_000) is None
