"""Streams of tokens that are pushed to the API instead of pulled item by item; see docs/push.md."""

from __future__ import annotations

from ...errors import BadLaunchArgumentError
from ...settings import HostSettings, variable

# In a request's generate_config: the id of the link, and the key of the stream.
KEY = "_xinf_vllm_push"
# The only key, or the first, of an item that is not for clients.
MARK = "_xinf_vllm"
# All items are on the link, and "usage" is that of the last.
PUSHED = "pushed"
# The link is lost; the items that follow begin with the one of this number (from 1; 0 is the first item).
PULLED_FROM = "from"


def why_off() -> str | None:
    """Why no stream is pushed in this process; None if they may be."""
    try:
        return None if HostSettings.resolve().push == "on" else f"{variable('push')} is off"
    except BadLaunchArgumentError as error:
        return str(error)
