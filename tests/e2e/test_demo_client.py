"""The demo's OpenAI client, against a server that closes a kept connection just as a request goes out on it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from xinf_vllm_backend.demo.cluster import Cluster

COMPLETION = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": []}


class OneAnswerPerConnection(BaseHTTPRequestHandler):
    """Answers the first request of a connection, says that it keeps it, and closes it when the second one comes.

    uvicorn does so when its keep-alive timer fires between the client's look at the connection and its request.
    """

    protocol_version = "HTTP/1.1"
    answered = False

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.answered:
            self.close_connection = True
            return
        self.answered = True
        body = json.dumps(COMPLETION).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that is not started: only the server above answers at its endpoint."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    with ThreadingHTTPServer(("127.0.0.1", 0), OneAnswerPerConnection) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        unstarted = Cluster(directory=tmp_path)
        unstarted.endpoint = f"http://127.0.0.1:{server.server_port}"
        yield unstarted
        server.shutdown()


def test_the_demo_client_loses_no_request_to_a_connection_that_the_server_closes(cluster: Cluster) -> None:
    with cluster.openai(timeout=10.0) as client:
        for _ in range(3):
            assert client.completions.create(model="m", prompt="a").model == "m"
