"""Two machines in one: each has its own network, processes, mounts, clock and boot id, and a cable is between them.

A machine is a set of namespaces that one process holds. It ends when this one does, however that ends, and with it go
all processes in there, and the cable: nothing is left behind, and nothing outside is touched.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("ip", "unshare", "nsenter", "mount")
AHEAD_S = 5000
"""What the second machine's monotonic clock is ahead of the first one's."""
_KINDS = {"net": "net", "mount": "mnt", "uts": "uts", "pid": "pid_for_children", "time": "time_for_children"}
_HOLD = """\
set -e
hostname {name}
echo {boot_id} > {folder}/boot-{name}
mount --bind {folder}/boot-{name} /proc/sys/kernel/random/boot_id
{hide}
ip link set lo up
echo ready
exec cat
"""
"""Process 1 of a machine."""


class NoNamespaces(Exception):
    """This machine does not let us make namespaces; the text says why."""


class Host:
    """A machine, as far as its processes can tell. ``beside`` is one whose user namespace it shares.

    What lies in ``hides`` cannot be seen there: it would be on the other machine's disk.
    """

    def __init__(
        self, name: str, address: str, folder: Path, *, beside: "Host | None" = None, hides: Path | None = None
    ) -> None:
        self.name = name
        self.address = address
        self.ahead_s = AHEAD_S if beside is not None and Path("/proc/self/ns/time").exists() else 0
        self._user: list[str] = []
        is_root = os.geteuid() == 0
        flags = ["--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "--kill-child"]
        flags += ["--time", "--monotonic", str(self.ahead_s), "--boottime", str(self.ahead_s)] if self.ahead_s else []
        if beside is not None:
            self._user = beside._user
        elif not is_root:
            flags += ["--user", "--map-root-user"]
        self._holder = subprocess.Popen(
            [*self._user, "unshare", *flags, "sh", "-c", _script(name, folder, hides)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            _, reason = self._holder.communicate()
            raise NoNamespaces(reason.strip() or "unshare said nothing")
        at = f"/proc/{self._holder.pid}/ns"
        if beside is None and not is_root:
            self._user = ["nsenter", f"--user={at}/user", "--preserve-credentials", "--"]
        kinds = {flag: kind for flag, kind in _KINDS.items() if flag != "time" or self.ahead_s}
        self._all = ["nsenter", *(f"--{flag}={at}/{kind}" for flag, kind in kinds.items()), "--"]
        self._net = ["nsenter", f"--net={at}/net", "--"]

    def words(self, *command: str, folder: Path | None = None) -> list[str]:
        """Return the command line that runs a command there."""
        within = [] if folder is None else ["sh", "-c", 'cd "$0" && exec "$@"', str(folder)]
        return [*self._user, *self._all, *within, *command]

    def ip(self, *words: str, tool: str = "ip") -> None:
        """Change its network."""
        done = subprocess.run([*self._user, *self._net, tool, *words], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"{tool} {' '.join(words)}: {done.stderr.strip()}")

    def connect(self, other: "Host") -> None:
        """Lay a cable. Beside it both have what leads nowhere, under one address: where Docker runs there is such."""
        self.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(other._holder.pid))
        for host in (self, other):
            host.ip("address", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("link", "set", "eth0", "up")
            host.ip("link", "add", "docker0", "type", "veth", "peer", "name", "nowhere")
            host.ip("address", "add", "172.17.0.1/16", "dev", "docker0")
            for device in ("docker0", "nowhere"):
                host.ip("link", "set", device, "up")

    def run(self, *command: str) -> str:
        """Run a command there; return what it says. Raises CalledProcessError."""
        return subprocess.run(self.words(*command), capture_output=True, text=True, check=True).stdout

    def num_processes(self) -> int:
        """Return how many processes live there, without process 1 and the shell that looks."""
        # What has ended and is waited for by nobody has no command line any more.
        return len(self.run("sh", "-c", "grep -ls . /proc/[0-9]*/cmdline; true").split()) - 2

    def close(self) -> None:
        """End all that runs there."""
        self._holder.kill()
        self._holder.communicate()


def _script(name: str, folder: Path, hides: Path | None) -> str:
    boot_id = f"{ord(name[0]):08x}-0000-4000-8000-000000000000"
    hide = "" if hides is None else f"mount -t tmpfs none {shlex.quote(str(hides))}"
    return _HOLD.format(name=name, boot_id=boot_id, folder=shlex.quote(str(folder)), hide=hide)


@contextmanager
def two_hosts(folder: Path, *, hides: Path | None = None) -> Iterator[tuple[Host, Host]]:
    """Give machines ``a`` and ``b``; b does not see what of ours lies in ``hides``. Raises NoNamespaces."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise NoNamespaces(f"there is no {missing[0]} here (Debian: apt-get install iproute2 util-linux)")
    a = Host("a", "10.77.0.1", folder)
    try:
        b = Host("b", "10.77.0.2", folder, beside=a, hides=hides)
        try:
            try:
                a.connect(b)
            except OSError as error:
                raise NoNamespaces(str(error)) from None
            yield a, b
        finally:
            b.close()
    finally:
        a.close()
