import os
import re
import socket
import stat
import subprocess
import sys

import pytest

from gradalign._files import atomic_path, expect_file_or_nothing, write_text


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old.txt", "new.txt"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "old.txt").write_text("old")
    for name in ("old.txt", "new.txt"):
        expect_file_or_nothing(tmp_path / name)
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert not (tmp_path / "there" / name).is_symlink()
        assert (tmp_path / "there" / name).read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new.txt", "old.txt"]
    (tmp_path / "lost.txt").symlink_to(tmp_path / "absent" / "lost.txt")
    with pytest.raises(FileNotFoundError, match=r"absent/lost\.txt: expected a folder to write it into; found none"):
        expect_file_or_nothing(tmp_path / "lost.txt")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "lost.txt"))):
        write_text(tmp_path / "lost.txt", "")


@pytest.mark.parametrize("mode", ["a", "w"])
def test_the_file_that_stdout_goes_to_is_gone_on_with(tmp_path, mode):
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    log = tmp_path / "log"
    code = "import sys\nfrom gradalign._files import expect_file_or_nothing, write_text\n"
    code += "expect_file_or_nothing(sys.argv[1])\nprint('before')\nwrite_text(sys.argv[1], 'text\\n')\nprint('after')"
    with log.open(mode) as file:
        for name in ("stdout", "log"):
            command = [sys.executable, "-c", code, str(tmp_path / name)]
            # As usual, Python holds back what is printed to a file.
            subprocess.run(command, stdout=file, check=True, env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert log.read_text() == "before\ntext\nafter\n" * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "stdout"]


def test_what_is_no_file_is_refused_and_stays(tmp_path, monkeypatch):
    # The name of a socket must be short.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        for name, error, found in (
            ("folder", IsADirectoryError, "a folder"),
            ("socket", FileExistsError, "a block device or a socket"),
        ):
            message = f"^{name}: expected a file to write; found {found}$"
            with pytest.raises(error, match=message):
                expect_file_or_nothing(name)
            with pytest.raises(error, match=message), atomic_path(name):
                pytest.fail("it was begun")
    assert stat.S_ISSOCK(os.stat("socket").st_mode)
    assert sorted(os.listdir()) == ["folder", "socket"]


def test_a_character_device_is_written_to_and_stays(tmp_path):
    device = tmp_path / "full"
    try:
        os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
        device.open("wb").close()
    except PermissionError:
        pytest.skip("needs the right to make device nodes in a temporary folder and to open them")
    expect_file_or_nothing(device)
    with pytest.raises(OSError, match=f"No space left on device: '{device}'"):
        write_text(device, "text")
    assert device.is_char_device()
    assert os.listdir(tmp_path) == ["full"]
