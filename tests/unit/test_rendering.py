"""Texts that are tokenized together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xinf_vllm_backend.engine.rendering import TOGETHER, Rendering
from xinf_vllm_backend.engine.seams import rendering

BOUND = 10.0  # seconds; reached only by what hangs


class Renderer:
    """Renders when it is let, and notes what, on which thread."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any]] = []
        self.may = threading.Semaphore(0)

    def render(self, engine: Any, prompt: Any) -> Any:
        self.seen.append((threading.get_ident(), prompt))
        if threading.current_thread() is not threading.main_thread():
            assert self.may.acquire(timeout=BOUND)
        if prompt == "bad":
            raise ValueError("bad")
        return {"type": "token", "of": prompt}

    def threads(self) -> int:
        return len({thread for thread, _ in self.seen})


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> Renderer:
    renderer = Renderer()
    monkeypatch.setattr(rendering, "render", renderer.render)
    return renderer


def made(threads: int = 1) -> Rendering:
    return Rendering(SimpleNamespace(model_config=SimpleNamespace(renderer_num_workers=threads)))


def asked(rendering: Rendering, *prompts: Any) -> list[asyncio.Task[Any]]:
    return [asyncio.create_task(rendering.rendered(prompt)) for prompt in prompts]


def token(prompt: Any) -> dict[str, Any]:
    return {"type": "token", "of": prompt}


async def until(condition: Callable[[], bool]) -> None:
    async def met() -> None:
        while not condition():
            await asyncio.sleep(0)

    await asyncio.wait_for(met(), BOUND)


async def test_what_comes_together_goes_together(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[Any]] = []
    render_all = Rendering._render_all

    def noted(self: Rendering, prompts: list[Any]) -> list[Any]:
        batches.append(prompts)
        return render_all(self, prompts)

    monkeypatch.setattr(Rendering, "_render_all", noted)
    one_thread = made()
    first = asked(one_thread, "a", "b")
    await until(lambda: bool(renderer.seen))
    second = asked(one_thread, "c", {"prompt": "d"})
    renderer.may.release(4)
    answers = await asyncio.wait_for(asyncio.gather(*first, *second), BOUND)
    assert answers == [token("a"), token("b"), token("c"), token({"prompt": "d"})]
    assert [prompt for _, prompt in renderer.seen] == ["a", "b", "c", {"prompt": "d"}]
    assert batches == [["a", "b"], ["c", {"prompt": "d"}]]
    assert renderer.threads() == 1


async def test_each_thread_gets_a_part(renderer: Renderer) -> None:
    tasks = asked(made(2), *"abcde")
    await until(lambda: renderer.threads() == 2)
    assert {prompt for _, prompt in renderer.seen} == {"a", "d"}
    renderer.may.release(5)
    assert await asyncio.wait_for(asyncio.gather(*tasks), BOUND) == [token(each) for each in "abcde"]


async def test_the_first_of_a_long_list_do_not_wait_for_the_last(renderer: Renderer) -> None:
    tasks = asked(made(), *map(str, range(TOGETHER + 1)))
    renderer.may.release(TOGETHER)
    assert await asyncio.wait_for(tasks[0], BOUND) == token("0")
    assert not tasks[-1].done()
    renderer.may.release(1)
    assert await asyncio.wait_for(tasks[-1], BOUND) == token(str(TOGETHER))


async def test_a_bad_one_goes_as_it_came_and_the_others_do_not_notice(renderer: Renderer) -> None:
    renderer.may.release(3)
    tasks = asked(made(), "a", "bad", "b")
    assert await asyncio.wait_for(asyncio.gather(*tasks), BOUND) == [token("a"), "bad", token("b")]


async def test_one_whose_client_has_left_holds_up_none(renderer: Renderer) -> None:
    one_thread = made()
    tasks = asked(one_thread, "a", "b")
    await asyncio.sleep(0)
    tasks[0].cancel()
    renderer.may.release(2)
    assert await asyncio.wait_for(tasks[1], BOUND) == token("b")


async def test_tokens_take_no_thread(renderer: Renderer) -> None:
    prompt = {"prompt_token_ids": [1, 2]}
    assert await asyncio.wait_for(made().rendered(prompt), BOUND) == token(prompt)
    assert [thread for thread, _ in renderer.seen] == [threading.get_ident()]


@pytest.mark.parametrize(
    "prompt",
    [{"type": "token", "prompt_token_ids": [1]}, {"prompt": "a", "multi_modal_data": {}}, [1, 2], ("a", "b")],
)
async def test_all_else_goes_as_it_came(renderer: Renderer, prompt: Any) -> None:
    assert await asyncio.wait_for(made().rendered(prompt), BOUND) is prompt
    assert renderer.seen == []
