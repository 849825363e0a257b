"""How fast engines start, and what that costs: stock Xinference beside this package, spawn beside the zygote.

``tox -e bench -- startup`` measures on an otherwise idle machine, and writes docs/startup.md and docs/startup.png.
"""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import click

from xinf_vllm_backend.demo.tiny_model import make_tiny_model

from . import launches, model_processes, report
from .engines import BATCHES, KV_CACHE, REQUESTS, TOKENS, Engines
from .launches import COMPLETE, OUR_PHASES, PHASES, POLL, TO_ANSWER, say, turn
from .report import Samples, Table

COUNTS = (1, 2, 4)
SIZES = (1 << 10, 16 << 10, 64 << 10, 200 << 10, 1 << 20)
SPAWN_ROUNDS = 2  # at most: four spawned engines take a minute on two cores
# Through a cluster: launch, first, killed, model-memory, model-throughput.
PARTS = (
    *("launch", "first", "killed", "model-memory", "model-throughput"),
    *("engines", "payload", "memory", "throughput"),
)

LAUNCH, FIRST = "launch to first answer", "the first launch ever of an architecture"
RESTART, FOUR_TO_ONE = "restart to first answer", "4 engines / 1 engine"
MEMORY, WITHOUT_CACHE = "private memory, each further engine", "the same without its KV cache"
ZYGOTE, ZYGOTE_RESIDENT = "private memory, zygote", "resident memory, zygote"
THROUGHPUT = f"{REQUESTS} requests x {TOKENS} tokens, greedy"

NOTES = f"""\
Each figure is the median of the rounds with its spread, each ratio the median of the rounds' own ratios; so the phases,
which are the whole in every round, may not add up to the last digit here. The sides take turns. All run with
`enforce_eager` and {KV_CACHE >> 20} MiB of KV cache; stock is given the sizes without which it does not start on a CPU.

- A launch is timed from the start of the `xinference launch` command line until a completion is answered; one is asked
  for every {POLL:g} s.
- The completions are greedy. The first sampled request (`temperature` above 0) on a CPU compiles vLLM's sampler, about
  1.5 s on both sides, which is in none of these figures.
- The first launch of an architecture has vLLM inspect its class, once; its answer on disk was removed before each.
- Private memory is what an engine's processes have to themselves (USS) after a request, an engine of the same model
  process running beside it. Its KV cache is the same on both sides.
- Throughput without a cluster: one engine that is up on each side; a round is {BATCHES} such batches after one that is
  not counted.
{model_processes.NOTES}"""

# -- the parts


def measure_launches(samples: Samples, model: Path, rounds: int, first_rounds: int) -> None:
    with launches.sides(model) as sides:
        for side in sides:
            say(f"{side.name}: a launch that is not counted")
            side.launch(None, LAUNCH)
        for what, times in ((FIRST, first_rounds), (LAUNCH, rounds)):
            for number in range(times):
                for side in turn(sides, number):
                    say(f"{side.name}: {what}, round {number + 1}")
                    if what == FIRST:
                        side.forget_architectures()
                    side.launch(samples, what)


def measure_engines(samples: Samples, both: list[Engines], rounds: int) -> None:
    for number in range(rounds):
        for engines in turn(both, number):
            if engines.method == "spawn" and number >= SPAWN_ROUNDS:
                continue
            for count in COUNTS:
                say(f"{engines.method}: {count} engines, round {number + 1}")
                samples.add(report.engines_name(count), engines.method, engines.tell("start", count))
            samples.add(RESTART, engines.method, engines.tell("restart"))
            one, four = (samples.of(report.engines_name(count), engines.method)[-1] for count in (1, 4))
            samples.add(FOUR_TO_ONE, engines.method, four / one)


def measure_payload(samples: Samples, both: list[Engines], rounds: int) -> None:
    (engines,) = (each for each in both if each.method == "zygote")
    for number in range(rounds):
        say(f"Process.start(), round {number + 1}")
        for size in SIZES:
            for how in turn(["stock", "spawn", "zygote"], number):
                samples.add(report.payload_name(size), how, engines.tell("process_start", how, size))


def measure_memory(samples: Samples, both: list[Engines], rounds: int) -> None:
    for engines in both:
        say(f"{engines.method}: memory")
        engines.tell("keep", 1)
        for _ in range(rounds):
            taken = engines.tell("memory")
            samples.add(MEMORY, engines.method, taken)
            samples.add(WITHOUT_CACHE, engines.method, taken - KV_CACHE)
        if engines.method == "zygote":
            for what, taken in zip((ZYGOTE, ZYGOTE_RESIDENT), engines.tell("zygote_memory"), strict=True):
                samples.add(what, "zygote", taken)
        engines.tell("stop")


def measure_throughput(samples: Samples, both: list[Engines], rounds: int) -> None:
    for engines in both:
        engines.tell("keep", 1)
    for number in range(rounds):
        for engines in turn(both, number):
            say(f"{engines.method}: throughput, round {number + 1}")
            samples.add(THROUGHPUT, engines.method, engines.tell("throughput"))
    for engines in both:
        engines.tell("stop")


# -- the report


def markdown(samples: Samples) -> str:
    launch = Table("Through a cluster", ("stock", "ours"), "ours/stock")
    launch.row(samples, LAUNCH, "s", "<= 0.15")
    launch.row(samples, FIRST, "s", "<= 0.25")
    launch.row(samples, f"{LAUNCH}: {COMPLETE}", "s", name=COMPLETE)
    launch.row(samples, model_processes.KILLED, "s", "<= 2.5 s for ours")
    tables = [launch]
    for what in (LAUNCH, FIRST):
        phases = Table(f"{what[0].upper()}{what[1:]}, by phase", ("stock", "ours"), "ours/stock", "phase")
        for phase in (*PHASES, TO_ANSWER):
            phases.row(samples, f"{what}: {phase}", "s", name=phase)
        tables.append(phases)
    engines = Table("Engines without a cluster", ("spawn", "zygote"), "zygote/spawn")
    for count in COUNTS:
        aim = "<= 0.15" if count == 1 else ""
        engines.row(samples, report.engines_name(count), "s", aim)
    engines.row(samples, FOUR_TO_ONE, "", "<= 1.5 for zygote")
    engines.row(samples, RESTART, "s")
    engines.row(samples, MEMORY, "MiB", "<= 0.5", scale=1 << 20)
    engines.row(samples, WITHOUT_CACHE, "MiB", scale=1 << 20)
    engines.row(samples, THROUGHPUT, "tokens/s", ">= 0.98")
    payload = Table(
        "`Process.start()` by the size of the arguments, for a target whose module imports torch",
        ("stock", "spawn", "zygote"),
        "zygote/stock",
        "arguments",
    )
    for size in SIZES:
        payload.row(samples, report.payload_name(size), "ms", name=report.payload_name(size), scale=0.001)
    text = [table.markdown() for table in tables[:2]] + [_our_phases(samples)]
    text += [tables[2].markdown(), *model_processes.tables(samples), engines.markdown()]
    if samples.of(ZYGOTE, "zygote"):
        private, resident = (samples.median(what, "zygote") / (1 << 20) for what in (ZYGOTE, ZYGOTE_RESIDENT))
        text.append(
            f"The zygote itself, one for each model process, has {private:.0f} MiB private memory; it shares the rest "
            f"of its {resident:.0f} MiB with its engines.\n"
        )
    return "\n".join(part for part in (*text, payload.markdown()) if part)


def _our_phases(samples: Samples) -> str:
    lines = ["The same launch of ours by the phases that it logs:", "", "| phase | ours |", "|--|--|"]
    for phase in (*OUR_PHASES, TO_ANSWER):
        values = samples.of(f"{LAUNCH}: our own: {phase}", "ours")
        if not values:
            return ""
        lines.append(f"| {phase} | {report.figure(values, 's')} |")
    return "\n".join([*lines, ""])


@click.command()
@click.option("--rounds", default=3, show_default=True, help="How often to measure, the sides taking turns.")
@click.option("--first-rounds", default=2, show_default=True, help="The same for first launches.")
@click.option("--throughput-rounds", default=5, show_default=True, help="The same for throughput.")
@click.option("--only", default=",".join(PARTS), show_default=True, help="Parts; the page gets no others.")
@click.option("--docs", type=click.Path(path_type=Path), default="docs", show_default=True, help="Where to write.")
def main(rounds: int, first_rounds: int, throughput_rounds: int, only: str, docs: Path) -> None:
    """Measure how engines start and what it costs; print it as Markdown, and write startup.md and startup.png."""
    parts = set(only.split(","))
    if unknown := parts - set(PARTS):
        raise click.BadParameter(f"there is no part {', '.join(sorted(unknown))}", param_hint="--only")
    samples = Samples()
    failed = []

    def attempt(part: Callable[..., None], *arguments: object) -> None:
        """What other parts measured is worth having."""
        try:
            part(samples, *arguments)
        except Exception:
            traceback.print_exc()
            failed.append(part.__name__)

    with contextlib.ExitStack() as stack:
        model = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        if parts & {"launch", "first"}:
            attempt(measure_launches, model, rounds * ("launch" in parts), first_rounds * ("first" in parts))
        if "killed" in parts:
            attempt(model_processes.measure_killed, model, rounds)
        if "model-memory" in parts:
            attempt(model_processes.measure_further_models, model, rounds)
        if "model-throughput" in parts:
            attempt(model_processes.measure_model_throughput, model, throughput_rounds)
        if without := parts & {"engines", "payload", "memory", "throughput"}:
            methods = ("zygote",) if without == {"payload"} else ("spawn", "zygote")
            both = [stack.enter_context(Engines(method, model)) for method in methods]
            for engines in both:
                say(f"{engines.method}: an engine that is not counted")
                engines.tell("warm_up")
            if "engines" in parts:
                attempt(measure_engines, both, rounds)
            if "payload" in parts:
                attempt(measure_payload, both, rounds)
            if "memory" in parts:
                attempt(measure_memory, both, rounds)
            if "throughput" in parts:
                attempt(measure_throughput, both, throughput_rounds)
    docs.mkdir(exist_ok=True)
    cluster = [report.launch_panel(LAUNCH, (*PHASES, TO_ANSWER)), *model_processes.panels()]
    alone = [report.engines_panel(COUNTS), report.payload_panel(SIZES)]
    drawn = report.plot(docs / "startup.png", samples, [cluster, alone])
    tables = markdown(samples)
    plot = "![Launch by phase, recovery and memory of model processes, engines, Process.start()](startup.png)\n" * drawn
    arguments = f" --rounds {rounds} --first-rounds {first_rounds} --throughput-rounds {throughput_rounds}"
    if parts != set(PARTS):
        arguments += f" --only {only}"
    page = "\n".join(filter(None, [report.machine("startup", arguments), NOTES, plot, tables]))
    report.write_page(docs / "startup.md", page)
    click.echo(tables)
    if failed:
        raise click.ClickException(f"not measured to the end: {', '.join(failed)}")


if __name__ == "__main__":
    main()
