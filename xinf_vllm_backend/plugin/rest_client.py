"""Calls of our REST routes, for the command line: endpoint and login are those of Xinference's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ControlError

CONNECT_TIMEOUT = 10.0  # seconds
OK = 200


def call(
    method: str,
    path: str,
    endpoint: str | None,
    api_key: str | None,
    timeout: float,
    fields: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the API answers.

    Args:
        method: of HTTP.
        path: of the URL.
        endpoint: None: ``XINFERENCE_ENDPOINT``, or the default of Xinference.
        api_key: None: what ``xinference login`` has stored, where the cluster wants one.
        timeout: seconds for the answer.
        fields: of the body.

    Raises:
        ControlError: there is no answer, or it is not of status 200; the sentence in it.
    """
    from xinference.client import RESTfulClient
    from xinference.deploy.cmdline import get_endpoint, get_stored_token

    url = get_endpoint(endpoint)
    try:
        client = RESTfulClient(base_url=url, api_key=api_key)
        if api_key is None:
            client._set_token(get_stored_token(url, client))
        answer = client.session.request(
            method, f"{url}{path}", json=fields, headers=client._headers, timeout=(CONNECT_TIMEOUT, timeout)
        )
    except (RuntimeError, ValueError, OSError) as error:  # requests' own are OSErrors
        why = str(error).rstrip(".!")
        raise ControlError(f"Xinference at {url} cannot be asked: {why}.") from None
    if answer.status_code != OK:
        raise ControlError(_detail(answer))
    found: dict[str, Any] = answer.json()
    return found


def _detail(answer: Any) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"Xinference answered with status {answer.status_code}: {answer.text[:500]}"
