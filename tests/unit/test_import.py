"""Importing the package must stay cheap: Xinference's CLI, supervisor and workers all do it."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"torch", "transformers", "vllm", "xinference", "xoscar"}


def test_importing_the_package_imports_no_host() -> None:
    # A fresh interpreter: this one's sys.modules holds whatever other tests brought in.
    script = "import sys, xinf_vllm_backend; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    modules = set(child.stdout.split())
    assert "xinf_vllm_backend" in modules
    assert not HEAVY & modules
