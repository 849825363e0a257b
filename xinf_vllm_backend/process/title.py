"""How this process looks in ``ps``."""

from __future__ import annotations

import contextlib


def set_title(title: str, name: str | None = None) -> None:
    """Show ``title`` as this process's command line, and ``name`` as its short name; a no-op without setproctitle.

    Call it before the environment changes: setproctitle has to find where the title goes, also for the children.
    """
    with contextlib.suppress(ImportError):
        import setproctitle

        setproctitle.setproctitle(title)
        if name is not None:
            setproctitle.setthreadtitle(name)
