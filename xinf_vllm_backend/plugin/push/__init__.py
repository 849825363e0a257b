"""Streams of tokens that are pushed to the API instead of pulled item by item; see docs/push.md."""

from __future__ import annotations

from collections.abc import Iterable

from ...engine.seams.seam import Seam
from ...errors import BadLaunchArgumentError
from ...process.link import LinkLostError
from ...settings import HostSettings, variable

# Methods of the model actor, which this package adds: a call that lasts as long as a stream, and one by which such a
# stream goes on by another link.
PUSH = "push_stream"
AGAIN = "push_stream_again"
PROGRESS = b"+"  # note of an item without a chunk: the engine works on the request
RELINK = 60.0  # seconds that a stream whose link is lost waits for another


class NotBegunError(LinkLostError):
    """The link was lost before the request was looked at; takes one sentence."""


class OtherProcessError(NotBegunError):
    """The link is to another process than the one that serves; takes one sentence."""


def why_pulled(seams: Iterable[Seam]) -> str | None:
    """Why no stream is pushed in this process, which needs ``seams``; None if they may be."""
    if gone := [seam.name for seam in seams if not seam.present()]:
        return f"there is no {', '.join(gone)}"
    return _why_off("push")


def why_not_failed_over(seams: Iterable[Seam] = ()) -> str | None:
    """Why no request outlives a model process, to this process, which needs ``seams``; None if they do."""
    if gone := [seam.name for seam in seams if not seam.present()]:
        return f"there is no {', '.join(gone)}"
    return _why_off("failover")


def _why_off(option: str) -> str | None:
    try:
        return None if getattr(HostSettings.resolve(), option) == "on" else f"{variable(option)} is off"
    except BadLaunchArgumentError as error:
        return str(error)
