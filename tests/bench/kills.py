"""Faults at any moment, of engines and of the hosts that they run on; looks at what is left 5 s after each.

``python -m tests.bench kills --count 100`` draws them at random, from a seed that it prints: the same seed draws the
same faults. Of five about four are kills of an engine (:mod:`.engine_kills`), and one is a fault of a real cluster,
with its host zygote (:mod:`.host_kills`). Names in shared memory bear no mark of the run: where others run engines
meanwhile, give it a /dev/shm of its own,
``unshare -m sh -c 'mount -t tmpfs tmpfs /dev/shm && python -m tests.bench kills'``.
"""

from __future__ import annotations

import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from xinf_vllm_backend.demo.tiny_model import make_tiny_model

from . import engine_kills, host_kills
from .engine_kills import Kill
from .host_kills import Fault
from .leftovers import NOBODY, Outcome, table

ENGINES, HOSTS = "engines", "hosts"
KINDS = {ENGINES: 4, HOSTS: 1}  # how often each is drawn


def draw(count: int, seed: int, of: str | None = None) -> list[Kill | Fault]:
    """The ``count`` faults of ``seed``, numbered from 1.

    Args:
        of: the key of KINDS that all are of; those that are of it anyway stay the same.
    """
    kinds = random.Random(f"kinds of {seed}").choices(list(KINDS), list(KINDS.values()), k=count)
    both = zip(kinds, engine_kills.draw(count, seed), host_kills.draw(count, seed), strict=True)
    return [kill if (of or kind) == ENGINES else fault for kind, kill, fault in both]


def line(drawn: Kill | Fault, outcome: Outcome) -> str:
    """How ``drawn`` went, in a line and one for each thing that was wrong."""
    how = "UNCLEAN" if outcome.faults else f"clean after {outcome.seconds:4.2f} s"
    what = f"{drawn.number:4} {drawn.setting:11} {drawn.label:20} {outcome.victim:13} {how:18}"
    said = ": ".join(filter(None, [outcome.phase, outcome.said]))
    return "\n".join([f"{what} {said[:300]}", *(f"       {wrong}" for wrong in outcome.faults)])


@click.command()
@click.option("--count", type=click.IntRange(1), default=100, show_default=True, help="How many faults.")
@click.option("--seed", type=int, help="What to draw them from; by default a new one, which is printed.")
@click.option("--only", help="The numbers of those to carry out, separated by commas; by default all.")
@click.option("--of", type=click.Choice(list(KINDS)), help="What all faults are of; by default mostly engines.")
def main(count: int, seed: int | None, only: str | None, of: str | None) -> None:
    """Kill processes at random moments; the exit status is 1 if anything was left after 5 s, or went wrong."""
    seed = secrets.randbits(32) if seed is None else seed
    begun = time.monotonic()
    click.echo(f"{count} faults, seed {seed}")
    drawn = [each for each in draw(count, seed, of) if not only or str(each.number) in only.split(",")]
    if not drawn:
        raise click.BadParameter("no fault has such a number", param_hint="--only")
    # Not in the default directory, whose name may be too long for the sockets of an engine to be in it.
    directory = Path(tempfile.mkdtemp(prefix="kills-", dir="/tmp"))
    outcomes = []
    for each, outcome, log in _carry_out_all(drawn, directory):
        click.echo(line(each, outcome) + (f"\n       log: {log}" if outcome.faults else ""))
        outcomes.append((each, outcome))
    unclean = [each.number for each, outcome in outcomes if outcome.faults]
    what, slowest = _summary(outcomes), _slowest(outcomes)
    click.echo(f"{what}; seed {seed}, {time.monotonic() - begun:.0f} s; {len(unclean)} unclean; {slowest}")
    if unclean:
        click.echo(f"unclean: {', '.join(map(str, unclean))}; everything that was said is in {directory}")
        sys.exit(1)
    shutil.rmtree(directory)


def _carry_out_all(drawn: Sequence[Kill | Fault], directory: Path) -> Iterator[tuple[Kill | Fault, Outcome, Path]]:
    """Those of engines first, so that they share the machine with no cluster, and the others share one."""
    model = make_tiny_model(directory / "model")
    kills = [each for each in drawn if isinstance(each, Kill)]
    yield from engine_kills.carry_out_all(kills, directory / ENGINES, model)
    faults = [each for each in drawn if isinstance(each, Fault)]
    yield from host_kills.carry_out_all(faults, directory / HOSTS, model)


def _summary(outcomes: Sequence[tuple[Kill | Fault, Outcome]]) -> str:
    """A table of each kind that occurred, and how many there were of each."""
    done = [(each, outcome.victim) for each, outcome in outcomes if outcome.victim != NOBODY]
    kills = [(victim, each.label) for each, victim in done if isinstance(each, Kill)]
    faults = [(victim, each.label) for each, victim in done if isinstance(each, Fault)]
    parts = [
        table(engine_kills.VICTIMS, engine_kills.LABELS, kills) if kills else "",
        table(host_kills.FAULTS, host_kills.PHASES, faults) if faults else "",
        f"engine kills: {len(kills)}, host faults: {len(faults)}",
    ]
    return "\n" + "\n\n".join(filter(None, parts))


def _slowest(outcomes: Sequence[tuple[Kill | Fault, Outcome]]) -> str:
    each, outcome = max(outcomes, key=lambda one: one[1].seconds)
    return f"slowest clean-up {outcome.seconds:.2f} s, number {each.number}"


if __name__ == "__main__":
    main()
