"""The console command ``xinf-vllm``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .__version__ import __version__


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
