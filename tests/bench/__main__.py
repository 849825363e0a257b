"""``python -m tests.bench NAME``: run a benchmark."""

from __future__ import annotations

import click

from . import control, events, journal, kills, partition, pooling, profile, recovery, serving, stalls, startup

benchmarks = click.Group(
    "bench",
    commands={
        "control": control.main,
        "events": events.main,
        "journal": journal.main,
        "kills": kills.main,
        "partition": partition.main,
        "pooling": pooling.main,
        "profile": profile.main,
        "recovery": recovery.main,
        "serving": serving.main,
        "stalls": stalls.main,
        "startup": startup.main,
    },
)

if __name__ == "__main__":
    benchmarks()
