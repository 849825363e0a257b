"""Has a host zygote and a child of it, prints their pids, and waits to be killed."""

from __future__ import annotations

import os
import signal
import sys
import threading

from xinf_vllm_backend.process.zygote.host import CommandPopen, HostZygote

if __name__ == "__main__":
    zygote = HostZygote(sys.executable, dict(os.environ), {}, "host_command:preload", "host_command:hazard")
    zygote.start()
    child = CommandPopen(
        zygote, [sys.executable, "-m", "host_command", "wait", sys.argv[1]], os.environ, [], threading.Event()
    )
    print(zygote.pid, child.pid, flush=True)
    signal.pause()
