"""The links of an API process, one for each model process."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import time
from typing import Any

from ...process import link
from ...process.link import Inlet, LinkLostError, Offer, Receiver
from . import AGAIN

logger = logging.getLogger("xinference.vllm_backend")

ASK = 10.0  # seconds for a model to offer a link, and to end a stream
RETRY = 30.0  # seconds after which a link that could not be made is tried again
OTHERS = 600.0  # seconds for which a model that is none of ours is not asked for a link


class Peer:
    """What this process knows of a model process.

    Attributes:
        name: by which the model process knows the link.
        failover: what it said of how its requests outlive it; None if they do not.
    """

    def __init__(self) -> None:
        self.making: asyncio.Task[None] | None = None  # all that wait for a link wait for the same one
        self.name = ""
        self.link: Receiver | None = None
        self.failover: dict[str, Any] | None = None
        self.not_before = 0.0

    def current(self) -> Receiver | None:
        return self.link if self.link is not None and self.link.lost is None else None

    def is_of_use(self) -> bool:
        return self.current() is not None or self.making is not None or time.monotonic() < self.not_before


class Links:
    """All of them."""

    def __init__(self) -> None:
        self._peers: dict[tuple[str, bytes], Peer] = {}

    def has(self, ref: Any) -> bool:
        """Whether there is a link to the model ``ref``."""
        peer = self._peers.get((ref.address, ref.uid))
        return peer is not None and peer.current() is not None

    def supersede(self, ref: Any, name: str) -> None:
        """The process of the link ``name`` serves no new requests of the model ``ref``: another does, or none."""
        peer = self._peers.get((ref.address, ref.uid))
        if peer is not None and peer.name == name:
            peer.link = None  # streams that have begun go on by it

    async def is_vllm(self, ref: Any) -> bool:
        if self.has(ref):  # else another process may have the address
            return True
        if not await ref.is_vllm_backend():
            return False
        self._peers.setdefault((ref.address, ref.uid), Peer())
        return True

    def expect(self, ref: Any) -> None:
        """The model ``ref`` may be one of ours, although Xinference does not say so."""
        self._peers.setdefault((ref.address, ref.uid), Peer())

    async def linked(self, ref: Any) -> Peer | None:
        """What is known of the model ``ref``, with a link if one can be made; None if it is none of vLLM's."""
        peer = self._peers.get((ref.address, ref.uid))
        if peer is not None and peer.current() is None and time.monotonic() >= peer.not_before:
            try:
                await self.make(ref)
            except Exception as error:  # whatever it is, the streams are pulled
                if isinstance(error, AttributeError) and "offer_push_link" in str(error):
                    peer.not_before = time.monotonic() + OTHERS
                    return peer
                peer.not_before = time.monotonic() + RETRY
                logger.warning("Streams of %s are pulled item by item, there is no link: %s", ref.uid, error)
        return peer

    async def make(self, ref: Any) -> Peer:
        """The model ``ref``, with a link.

        Raises:
            TimeoutError: it does not answer.
            Exception: there is no link.
        """
        peer = self._peers.setdefault((ref.address, ref.uid), Peer())
        if peer.current() is None:
            if peer.making is None:
                peer.making = asyncio.ensure_future(self._make(peer, ref))
                peer.making.add_done_callback(functools.partial(_made, peer))
            await asyncio.shield(peer.making)
        return peer

    async def _make(self, peer: Peer, ref: Any) -> None:
        offered = dict(await asyncio.wait_for(ref.offer_push_link(), ASK))
        name, failover = str(offered.pop("id")), offered.pop("failover", None)
        peer.link, peer.name, peer.failover = await link.accept(Offer(**offered)), name, failover
        gc.freeze()  # as at the start; the first requests import more
        self._peers = {known: other for known, other in self._peers.items() if other.is_of_use()}
        self._peers[ref.address, ref.uid] = peer

    async def again(self, ref: Any, first: tuple[str, int], received: int) -> Inlet:
        """The stream that began as ``first``, behind the ``received`` items, by another link.

        Raises:
            LinkLostError: there is no other.
            TimeoutError: the model process does not answer.
            Exception: what the actor call raised.
        """
        peer = await self.make(ref)
        if (current := peer.current()) is None:
            raise LinkLostError(f"There is no link to {ref.uid!r}.")
        inlet = current.open()
        try:
            await asyncio.wait_for(getattr(ref, AGAIN)(first, peer.name, inlet.key, received), ASK)
        except BaseException:
            inlet.close()
            raise
        return inlet


def _made(peer: Peer, making: asyncio.Task[None]) -> None:
    peer.making = None
    if not making.cancelled():
        making.exception()  # those who wait have it; there may be none
