"""Locks are where all users look for them, unless another user could replace them there."""

from __future__ import annotations

import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from xinf_vllm_backend.errors import EngineStartError
from xinf_vllm_backend.process import lock_directory
from xinf_vllm_backend.process.launch_lock import DeviceLocks

NEVER = threading.Event()
STRANGER = 12345  # uid
IS_ROOT = os.geteuid() == 0
NOT_OURS = pytest.param("another user's", marks=pytest.mark.skipif(not IS_ROOT, reason="only root can give files away"))


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared directory, which is not yet made."""
    monkeypatch.setattr(lock_directory.tempfile, "tempdir", str(tmp_path))
    return tmp_path / "xinf-vllm-locks"


def own(shared: Path) -> Path:
    return shared.with_name(f"{shared.name}-{os.geteuid()}")


class TestTheSharedDirectory:
    def test_is_made_for_all_users(self, shared: Path) -> None:
        assert lock_directory.default() == shared
        assert stat.S_IMODE(shared.stat().st_mode) == 0o1777

    @pytest.mark.parametrize("mode", [0o1777, 0o755, 0o700])
    def test_is_used_where_only_its_owner_can_replace_files(self, shared: Path, mode: int) -> None:
        shared.mkdir()
        shared.chmod(mode)
        assert lock_directory.default() == shared
        assert stat.S_IMODE(shared.stat().st_mode) == mode


class TestADirectoryOfThisUsersOwn:
    @pytest.mark.parametrize("how", [NOT_OURS, "without sticky bit", "a link", "a file"])
    def test_is_used_with_a_warning_where_the_shared_one_is_not_safe(
        self, shared: Path, how: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        victim = shared.with_name("victim")
        victim.mkdir()
        if how == "a link":
            shared.symlink_to(victim)
        elif how == "a file":
            shared.touch()
        else:
            shared.mkdir()
            shared.chmod(0o777 if how == "without sticky bit" else 0o1777)
        if how == "another user's":
            os.chown(shared, STRANGER, -1)
        with DeviceLocks(["0"], "qwen-0") as locks:
            locks.acquire(0, NEVER)
        assert (own(shared) / "device-0.lock").exists()
        assert stat.S_IMODE(own(shared).stat().st_mode) == 0o700
        assert list(victim.iterdir()) == []
        (record,) = caplog.records
        assert str(own(shared)) in record.message
        assert f"have root make {shared}, mode 1777" in record.message

    def test_is_not_used_either_where_that_is_not_safe(self, shared: Path) -> None:
        for directory in (shared, own(shared)):
            directory.mkdir()
            directory.chmod(0o777)
        with pytest.raises(EngineStartError, match=r"qwen-0 cannot lock its devices by files in .* no sticky bit"):
            DeviceLocks(["0"], "qwen-0").acquire(0, NEVER)
        assert list(own(shared).iterdir()) == []


class TestALockFile:
    def test_that_is_a_link_is_refused_and_what_it_leads_to_is_safe(self, shared: Path) -> None:
        lock_directory.default()
        victim = shared.with_name("victim")
        victim.write_text("safe")
        (shared / "device-0.lock").symlink_to(victim)
        with pytest.raises(EngineStartError, match="device-0"):
            DeviceLocks(["0"], "qwen-0").acquire(0, NEVER)
        assert victim.read_text() == "safe"
