"""The console command ``xinf-vllm``."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click

from .__version__ import __version__
from .errors import ControlError

SLACK = 60.0  # seconds beyond its own time-out that an order has to be answered


@click.group()
@click.version_option(__version__)
def main() -> None:
    """The vLLM backend for Xinference."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Say whether the backend can work here, and what to do where it cannot; exit status 1 if anything is wrong."""
    from . import doctor as doctor_module

    findings = doctor_module.examine()
    if as_json:
        click.echo(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        click.echo(doctor_module.table(findings))
    sys.exit(0 if all(finding.ok for finding in findings) else 1)


@main.command()
@click.option(
    "--model-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Directory of a model of your own, instead of a tiny one that is made on the spot.",
)
@click.option("--stock", is_flag=True, help="Use Xinference's own vLLM classes, to compare.")
def demo(model_path: Path | None, stock: bool) -> None:
    """Launch a model on a real Xinference, kill its engine, and show how it comes back."""
    from .demo.account import run_demo

    sys.exit(run_demo(model_path, stock=stock))


def _of_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """A command that asks a cluster about one model."""

    @main.command(command.__name__.replace("_", "-"))
    @click.argument("model")
    @click.option(
        "--endpoint", "-e", help="URL of Xinference. [default: XINFERENCE_ENDPOINT, or http://127.0.0.1:9997]"
    )
    @click.option("--api-key", "-ak", help="By default the stored login of xinference login.")
    @functools.wraps(command)
    def wrapped(model: str, endpoint: str | None, api_key: str | None, **options: Any) -> None:
        from .plugin import rest_client

        def ask(method: str, action: str, timeout: float, fields: dict[str, Any] | None = None) -> dict[str, Any]:
            path = f"/v1/models/{quote(model, safe='')}/{action}"
            return rest_client.call(method, path, endpoint, api_key, timeout, fields)

        try:
            command(ask, **options)
        except ControlError as error:
            raise click.ClickException(str(error)) from None

    return wrapped


def _of_a_pause(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option(
            "--mode",
            type=click.Choice(("abort", "wait", "keep")),
            default="abort",
            show_default=True,
            help="Requests in flight end with what they have, are waited for, or go on when the model is resumed.",
        ),
        click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds for all replicas."),
        click.option(
            "--on-timeout",
            type=click.Choice(("roll_back", "abort")),
            default="roll_back",
            show_default=True,
            help="With --mode wait, when requests have not ended in time.",
        ),
        click.option("--hold", type=float, help="Seconds for which a new request waits; 0: status 503 at once."),
    )
    for option in reversed(options):
        command = option(command)
    return command


Ask = Callable[..., dict[str, Any]]


def _order(ask: Ask, action: str, timeout: float, **fields: Any) -> None:
    given = {name: value for name, value in fields.items() if value is not None}
    click.echo(ask("POST", action, timeout + SLACK, {"timeout": timeout, **given})["reason"])


@_of_a_model
@_of_a_pause
def pause(ask: Ask, timeout: float, **fields: Any) -> None:
    """Pause all replicas of MODEL, or none."""
    _order(ask, "pause", timeout, **fields)


@_of_a_model
@click.option("--level", type=int, help="Of vLLM's sleep, where the model was launched with enable_sleep_mode.")
@_of_a_pause
def sleep(ask: Ask, timeout: float, **fields: Any) -> None:
    """Put all replicas of MODEL to sleep, or none: their engines give back their memory."""
    _order(ask, "sleep", timeout, **fields)


_WAKING = click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds for all replicas.")


@_of_a_model
@_WAKING
def resume(ask: Ask, timeout: float) -> None:
    """Have all replicas of MODEL serve again."""
    _order(ask, "resume", timeout)


@_of_a_model
@_WAKING
def wake_up(ask: Ask, timeout: float) -> None:
    """Have all replicas of MODEL serve again; the same as resume."""
    _order(ask, "wake_up", timeout)


@_of_a_model
def engine(ask: Ask) -> None:
    """Show the engines behind MODEL."""
    from tabulate import tabulate

    columns = ("replica", "state", "control", "epoch", "requests", "waiting", "restarts", "deaths", "pid", "reason")
    replicas = ask("GET", "engine", SLACK)["replicas"]
    rows = [[each.get(name, each.get("error") if name == "reason" else None) for name in columns] for each in replicas]
    click.echo(tabulate(rows, headers=columns))
