"""What a model process tells the cluster, in an xoscar and an Xinference that are stubs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from stubs import put_modules

from xinf_vllm_backend.plugin.cluster_link import DEATHS, ClusterLink

CAUSE = "The vLLM engine of tiny-rep0 died: OSError: token=hf_secret"


class Actors:
    """All of a cluster's actors: each call of a method is kept, by the method's name."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Any]] = {}
        self.address = "supervisor"

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.setdefault(method, []).append((args, kwargs))
            return self if method == "get_supervisor_ref" else {"address": "worker"}

        return call


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Actors:
    actors = Actors()

    async def actor_ref(*args: Any, **kwargs: Any) -> Actors:
        return actors

    actor = SimpleNamespace(default_uid=lambda: "uid")
    kinds = SimpleNamespace(ERROR="error", INFO="info")
    modules: dict[str, dict[str, Any]] = {
        "xoscar": {"actor_ref": actor_ref},
        "xinference": {},
        "xinference.core": {},
        "xinference.core.utils": {"parse_replica_model_uid": lambda uid: ("tiny", 0)},
        "xinference.core.worker": {"WorkerActor": actor},
        "xinference.core.event": {"Event": dict, "EventCollectorActor": actor, "EventType": kinds},
    }
    put_modules(monkeypatch, modules)
    return actors


@pytest.mark.parametrize("count", [False, True])
async def test_the_cause_of_a_death_is_in_an_event_and_not_in_what_clients_read(actors: Actors, count: bool) -> None:
    await ClusterLink("model", "tiny-rep0").announce_death(CAUSE, count=count)
    (((uid, event), _),) = actors.calls["report_event"]
    assert uid == "tiny" and event["event_content"] == CAUSE
    # Xinference gives it to the clients whose requests broke off when the process ended.
    ((_, told),) = actors.calls["update_model_status"]
    assert "secret" not in told["last_error"] and "send the request again later" in told["last_error"]
    assert [args[0] for args, _ in actors.calls.get("record_metrics", [])] == [DEATHS] * count


async def test_the_worker_is_found_with_xinference_4_0_too(actors: Actors) -> None:
    async def worker() -> Actors:
        return actors

    vars(actors).update(get_worker_binding=None, _get_worker_ref=worker)
    await ClusterLink("model", "tiny-rep0").count(DEATHS)
    assert [args[0] for args, _ in actors.calls["record_metrics"]] == [DEATHS]
