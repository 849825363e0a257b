"""Runs tests with every supported pair of versions, and writes docs/versions.md: ``tox -e matrix``.

``tox -e matrix -- vllm032 xinference40`` runs the environments that are named and keeps the rows of the others.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
ENVIRONMENTS = (
    "py311",
    "vllm027-py310",
    "vllm029",
    "vllm030",
    "vllm031",
    "vllm032",
    "vllm032-py312",
    "xinference40",
)
COLUMNS = ("environment", "Python", "Xinference", "vLLM", "torch", "seams and engines", "a cluster", "degraded")
BOUND = 1800  # seconds for the tests of one environment
ENGINES = ("tests/engine/test_seams.py", "tests/engine/test_supervisor.py")
# Launch, serve in float32, lose engines and model processes, go on, and leave nothing.
CLUSTER = ("tests/e2e/test_lora.py", "tests/e2e/test_shared_cache.py", "tests/e2e/test_image_models.py")


def tox(*arguments: str, bound: float = BOUND) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tox", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=bound, check=False)


def passed(environment: str, tests: tuple[str, ...]) -> str:
    """How the tests went, in words."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        run = tox("run", "-e", environment, "--", *tests, f"--junitxml={report}")
        if not report.exists():
            print(run.stdout)
            return "did not run"
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    count, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    bad = [
        case.get("name", "") for case in suite.iter("testcase") if {part.tag for part in case} & {"failure", "error"}
    ]
    print(run.stdout if bad else "", end="")
    said = f"{count - skipped - len(bad)} passed"
    return said + (f", failed: {', '.join(f'`{name}`' for name in bad)}" if bad else "")


def row(environment: str) -> str:
    engines, cluster = passed(environment, ENGINES), passed(environment, CLUSTER)
    # With another status than 0 too: doctor finds fault with a shell where the extension is not switched on.
    doctor = tox("exec", "-qq", "-e", environment, "--", "xinf-vllm", "doctor", "--json", bound=300).stdout
    findings = json.loads(doctor[doctor.index("[") : doctor.rindex("]") + 1])
    found = {finding["subject"]: finding["found"].split(" ")[0] for finding in findings}
    gone = (finding for finding in findings if finding["degraded"])
    lost = "; ".join(f"{each['subject']}: {each['advice'].removeprefix('without it: ')}" for each in gone)
    versions = (found[name] for name in ("Python", "xinference", "vLLM", "torch"))
    return f"| {' | '.join((f'`{environment}`', *versions, engines, cluster, lost or 'nothing'))} |"


def write(rows: list[str]) -> None:
    """Put ``rows`` into the page, each in the place of the row of its environment."""
    text = PAGE.read_text()
    head = "\n".join((f"| {' | '.join(COLUMNS)} |", "|--" * len(COLUMNS) + "|"))
    kept = {line.split("`")[1]: line for line in re.findall(r"^\| `(?:py|vllm|xinf).*$", text, re.MULTILINE)}
    kept |= {line.split("`")[1]: line for line in rows}
    table = "\n".join((head, *(kept[name] for name in ENVIRONMENTS if name in kept)))
    begin, end = "<!-- tox -e matrix -->\n", "<!-- end -->"
    before, _, rest = text.partition(begin)
    PAGE.write_text(f"{before}{begin}{table}\n{end}{rest.partition(end)[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; all, if none is given")
    environments = parser.parse_args().environment or ENVIRONMENTS
    if unknown := set(environments).difference(ENVIRONMENTS):
        parser.error(f"there is no environment {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}.")
    rows = []
    for environment in environments:
        rows.append(row(environment))
        print(rows[-1], flush=True)
        write(rows)  # at once: it takes long, and the next may fail
    return int(any("failed" in each or "did not run" in each for each in rows))


if __name__ == "__main__":
    sys.exit(main())
