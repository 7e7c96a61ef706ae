"""A file system of its own, small and in memory, for drills that fill a disk."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes: mounted on `folder` by root; for others in a user namespace, where it is reached
    through /proc. Raises OSError when the system allows neither."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    inside = f"{shlex.join(mount)} && echo mounted && exec cat"  # cat ends when its input does
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        said = holder.stdout.readline().strip()
        if said != "mounted":
            raise OSError(f"no small disk could be mounted ({said}): run as root, or allow user namespaces")
        yield Path(f"/proc/{holder.pid}/root{folder.resolve()}")
    finally:
        holder.stdin.close()
        holder.wait()


def fill(ballast: Path) -> None:
    """Write `ballast` until the disk takes no byte more."""
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
