from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.tiers.block_directory import BlockDamaged, BlockDirectory
from engine.tiers.block_key import BlockKey
from engine.tiers.disk_tier import DiskTier
from kvstore.block_hash import BlockHash
from tests.fakes.fake_model import fake_kv_layout

LAYOUT = fake_kv_layout()
ROOT = BlockHash(bytes(16))
FILE_BYTES = LAYOUT.block_bytes + 8


def key(i: int, parent: BlockHash = ROOT, depth: int = 0) -> BlockKey:
    return BlockKey(BlockHash(i.to_bytes(16, "big")), parent, depth)


def content(i: int) -> memoryview:
    return memoryview(bytes([i % 256]) * LAYOUT.block_bytes)


def opened(path: Path, num_files: int = 4) -> DiskTier:
    return DiskTier(BlockDirectory(path, LAYOUT), num_files * FILE_BYTES)


def write(tier: DiskTier, block: BlockKey) -> bool:
    """As the thread that writes does it."""
    is_reserved = tier.reserve(block)
    tier.check_integrity()
    for path in tier.take_removals():
        path.unlink()
    if is_reserved:
        tier.directory.write(block, content(block.block_hash[-1]))
        tier.commit(block)
        tier.check_integrity()
    return is_reserved


def files(path: Path) -> set[str]:
    return {file.name for file in path.iterdir() if file.name != "lock"}


def test_what_is_written_is_read_and_the_directory_stays_in_bounds(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    for i in range(1, 8):
        assert write(tier, key(i))
        assert sum(file.stat().st_size for file in tmp_path.glob("*.kv")) <= 4 * FILE_BYTES
    assert [key(i).block_hash in tier for i in range(1, 8)] == [False] * 3 + [True] * 4
    assert tier.directory.read(key(7)) == content(7)
    with pytest.raises(FileNotFoundError):
        tier.directory.read(key(1))


def test_restart_finds_what_was_there(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    parent = key(1)
    child = key(2, parent.block_hash, 1)
    assert write(tier, parent) and write(tier, child) and write(tier, key(3))
    tier.close()
    again = opened(tmp_path)
    assert set(again.hashes()) == {key(i).block_hash for i in (1, 2, 3)}
    assert (again.num_free, again.num_cached, again.num_used) == (1, 3, 0)
    assert again.directory.read(child) == content(2)
    # The parent is worth more than its child, after the restart too.
    for i in (4, 5):
        write(again, key(i))
    assert parent.block_hash in again
    again.close()


def test_smaller_bound_after_a_restart_removes_what_is_too_much(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    for i in range(1, 5):
        write(tier, key(i))
    tier.close()
    again = opened(tmp_path, num_files=2)
    assert len(again.hashes()) == 2 and len(again.take_removals()) == 2
    again.check_integrity()


@pytest.mark.parametrize("fails_at", ["write", "rename"])
def test_death_in_the_middle_of_a_write_leaves_nothing_that_counts(tmp_path: Path, fails_at: str) -> None:
    code = f"""
import os, sys
from pathlib import Path
from tests.engine.tiers.test_disk_tier import BlockDirectory, LAYOUT, content, key
directory = BlockDirectory(Path(sys.argv[1]), LAYOUT)
directory.write(key(1), content(1))
if {fails_at!r} == "rename":
    os.rename = lambda *_: os._exit(9)
else:
    import engine.tiers.block_directory as module
    module._checksum = lambda *_: os._exit(9)
directory.write(key(2), content(2))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=False)
    assert died.returncode == 9
    assert len(files(tmp_path)) == (2 if fails_at == "rename" else 1) or fails_at == "write"
    tier = opened(tmp_path)  # the lock went with the process
    assert tier.hashes() == [key(1).block_hash]
    assert files(tmp_path) == {tier.directory.path_of(key(1)).name}
    assert tier.directory.read(key(1)) == content(1)


@pytest.mark.parametrize("change", ["flip", "truncate", "grow", "empty", "swap"])
def test_damaged_file_is_not_what_was_written(tmp_path: Path, change: str) -> None:
    tier = opened(tmp_path)
    write(tier, key(1))
    write(tier, key(2))
    path = tier.directory.path_of(key(1))
    raw = bytearray(path.read_bytes())
    if change == "flip":
        raw[17] ^= 4
    elif change == "truncate":
        del raw[-1]
    elif change == "grow":
        raw += b"x"
    elif change == "empty":
        raw.clear()
    else:
        raw = bytearray(tier.directory.path_of(key(2)).read_bytes())
    path.write_bytes(raw)
    with pytest.raises(BlockDamaged):
        tier.directory.read(key(1))
    tier.close()
    again = opened(tmp_path)
    has_right_size = change in ("flip", "swap")
    assert (key(1).block_hash in again) == has_right_size == path.exists()


def test_damaged_block_is_gone_at_once_and_its_file_with_the_last_pin(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    write(tier, key(1))
    tier.pin(key(1).block_hash)
    tier.discard(key(1).block_hash)
    tier.discard(key(1).block_hash)
    assert key(1).block_hash not in tier and tier.hashes() == []
    assert tier.take_removals() == []
    assert not tier.reserve(key(1))
    tier.unpin(key(1).block_hash)
    assert tier.take_removals() == [tier.directory.path_of(key(1))]
    assert tier.num_free == 4
    assert tier.reserve(key(1))


def test_second_process_gets_a_clear_error(tmp_path: Path) -> None:
    tier = opened(tmp_path)
    with pytest.raises(ValueError, match=r"another process keeps its KV blocks in .*give each its own"):
        opened(tmp_path)
    tier.close()
    opened(tmp_path).close()


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot keep KV blocks"):
        opened(tmp_path / "file" / "kv")


def test_bound_without_room_for_a_block(tmp_path: Path) -> None:
    directory = BlockDirectory(tmp_path, LAYOUT)
    with pytest.raises(ValueError, match="are allowed"):
        DiskTier(directory, FILE_BYTES - 1)


def test_blocks_of_another_model_are_not_used_and_go_first(tmp_path: Path) -> None:
    other_layout = fake_kv_layout(model_fingerprint="other")
    other = BlockDirectory(tmp_path, other_layout)
    other.write(key(1), content(1))
    other.write(key(2), content(2))
    other.close()
    (tmp_path / "notes.txt").write_text("of the owner")
    tier = opened(tmp_path, num_files=3)
    assert tier.hashes() == [] and tier.num_cached == 2
    assert write(tier, key(3)) and write(tier, key(4))
    assert files(tmp_path) == {
        "notes.txt",
        other.path_of(key(2)).name,
        *(tier.directory.path_of(key(i)).name for i in (3, 4)),
    }
    # The other model finds what is left.
    tier.close()
    again = DiskTier(BlockDirectory(tmp_path, other_layout), 3 * FILE_BYTES)
    assert again.hashes() == [key(2).block_hash]


def test_full_of_what_is_in_use_takes_nothing(tmp_path: Path) -> None:
    tier = opened(tmp_path, num_files=2)
    for i in (1, 2):
        write(tier, key(i))
        tier.pin(key(i).block_hash)
    assert not write(tier, key(3))
    tier.unpin(key(2).block_hash)
    assert tier.reserve(key(3)) and not tier.reserve(key(4))
    tier.cancel(key(3))
    assert tier.num_free == 1
    tier.check_integrity()


def test_no_room_on_the_device_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = BlockDirectory(tmp_path, LAYOUT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError):
        directory.write(key(1), content(1))
    assert files(tmp_path) == set()
