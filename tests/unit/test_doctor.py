"""What ``xinf-vllm doctor`` says, as far as it does not need the hosts themselves."""

from __future__ import annotations

import json
import os
import sys
from types import ModuleType

import pytest
from click.testing import CliRunner
from packaging.specifiers import SpecifierSet

from xinf_vllm_backend import cli, doctor
from xinf_vllm_backend.doctor import Finding
from xinf_vllm_backend.engine.seams import SEAMS, version

ENTRY = "xinf_vllm_backend:extension"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of ours set, and what examine() sets is taken back."""
    for name in ("XINFERENCE_EXTENSIONS", "XINFERENCE_ENABLE_VIRTUAL_ENV", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


class TestFinding:
    def test_a_finding_is_plain_data_for_json(self) -> None:
        assert Finding("uv", "not found", False, "install uv").as_dict() == {
            "subject": "uv",
            "found": "not found",
            "ok": False,
            "advice": "install uv",
            "degraded": False,
        }

    def test_a_finding_is_a_row_that_says_what_is_wrong_and_what_to_do(self) -> None:
        table = doctor.table([Finding("Python", "3.11"), Finding("uv", "not found", False, "install uv")])
        *_, good, bad = table.splitlines()
        assert good.split() == ["ok", "Python", "3.11"]
        assert bad.startswith("WRONG")
        assert bad.endswith("install uv")

    def test_a_finding_that_is_degraded_is_a_row_that_says_so(self) -> None:
        table = doctor.table([Finding("seam", "gone", True, "without it: less", degraded=True)])
        assert table.splitlines()[-1].startswith("degraded")

    def test_that_is_long_is_folded(self) -> None:
        table = doctor.table([Finding("subject " * 20, "word " * 40, False, "advice " * 40)])
        assert max(map(len, table.splitlines())) < 190


class TestVersion:
    def test_a_version_in_the_range_is_right(self) -> None:
        finding = doctor._version("vLLM", "0.27.1", version.SUPPORTED)
        assert finding.ok
        assert "0.27.1" in finding.found
        assert finding.advice == ""

    @pytest.mark.parametrize("found", ["0.28.1rc1", "0.33.0+cu130", "0.27.1+cpu", "0.30.0.dev5+gabc"])
    def test_a_version_of_a_build_or_a_candidate_in_the_range_is_right(self, found: str) -> None:
        assert doctor._version("vLLM", found, version.SUPPORTED).ok

    @pytest.mark.parametrize("found", ["0.27.0", "0.34.0", "0.11.2", "1.0"])
    def test_a_version_outside_is_wrong_and_the_range_is_named(self, found: str) -> None:
        finding = doctor._version("vLLM", found, version.SUPPORTED)
        assert not finding.ok
        assert finding.found == found
        assert str(version.SUPPORTED) in finding.advice

    def test_any_version_of_what_only_has_to_be_there_is_right(self) -> None:
        assert "any" in doctor._version("torch", "2.13.0+cpu", SpecifierSet()).found

    def test_a_version_that_is_not_found_says_how_to_install(self) -> None:
        finding = doctor._version("xinference", None, doctor.XINFERENCE)
        assert not finding.ok
        assert "pip install" in finding.advice

    def test_a_version_that_is_no_version_is_wrong_and_no_exception(self) -> None:
        finding = doctor._version("vLLM", "dev", version.SUPPORTED)
        assert not finding.ok
        assert "dev" in finding.found

    def test_a_version_of_a_distribution_is_looked_up_without_importing_it(self) -> None:
        assert doctor._installed("pytest") == pytest.__version__
        assert doctor._installed("no-such-distribution-as-this") is None

    def test_a_version_of_this_python_is_right(self) -> None:
        python, *_ = doctor._versions()
        assert python.subject == "Python"
        assert python.ok


class TestExtension:
    @pytest.fixture
    def classes(self, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        """The classes that Xinference has behind the engine name."""
        classes = {"xinf_vllm_backend.plugin.vllm.models.HostedVLLMModel"}
        monkeypatch.setattr(doctor, "_classes_behind_vllm", lambda: classes)
        return classes

    @pytest.mark.parametrize("configured", ["", "another:extension", "xinf_vllm_backend", f"{ENTRY}s"])
    def test_an_extension_that_is_not_configured_is_the_only_finding(
        self, configured: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XINFERENCE_EXTENSIONS", configured)
        (finding,) = doctor._extension()
        assert not finding.ok
        assert f"XINFERENCE_EXTENSIONS={ENTRY}" in finding.advice
        assert finding.found == (configured or "not set")

    @pytest.mark.parametrize("configured", [ENTRY, f"another:extension, {ENTRY}", f" {ENTRY} ,x:y"])
    def test_the_extension_may_stand_among_others(
        self, configured: str, classes: set[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XINFERENCE_EXTENSIONS", configured)
        assert all(finding.ok for finding in doctor._extension())

    def test_the_extension_of_somebody_else_behind_the_name_is_wrong(
        self, classes: set[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XINFERENCE_EXTENSIONS", ENTRY)
        classes.add("xinference.model.llm.vllm.core.VLLMModel")
        configured, behind = doctor._extension()
        assert configured.ok
        assert not behind.ok
        assert "xinference.model.llm.vllm.core.VLLMModel" in behind.found

    def test_the_extension_with_nothing_behind_the_name_is_wrong(
        self, classes: set[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XINFERENCE_EXTENSIONS", ENTRY)
        classes.clear()
        *_, behind = doctor._extension()
        assert (behind.ok, behind.found) == (False, "none")

    def test_the_extension_that_cannot_be_imported_shows_the_error_that_xinference_meets(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XINFERENCE_EXTENSIONS", ENTRY)
        *_, behind = doctor._extension()
        assert not behind.ok
        assert behind.found.startswith("ModuleNotFoundError: ")


class TestEngine:
    def test_every_seam_that_is_gone_says_what_is_lost(self) -> None:
        findings = list(doctor._seams())
        assert len(findings) == len(SEAMS)
        for finding, seam in zip(findings, SEAMS, strict=True):
            assert finding.found == "gone"
            assert seam.name in finding.subject
            assert seam.without in finding.advice

    def test_only_a_vital_seam_that_is_gone_is_wrong_and_the_others_degrade(self) -> None:
        for finding, seam in zip(doctor._seams(), SEAMS, strict=True):
            assert finding.ok is not seam.vital
            assert finding.degraded is not seam.vital

    def test_a_degraded_seam_of_a_supported_vllm_advises_no_other_version(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor.version, "version", lambda: "0.32.0")
        for finding, seam in zip(doctor._seams(), SEAMS, strict=True):
            assert (str(version.SUPPORTED) in finding.advice) is seam.vital

    def test_a_seam_that_moved_is_right_and_named_where_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = ModuleType("vllm.multimodal.cache.factories")
        module.__dict__["_get_cache_type"] = lambda config: "lru"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        (finding,) = (finding for finding in doctor._seams() if finding.subject.endswith("._get_cache_type"))
        assert (finding.ok, finding.degraded) == (True, False)
        assert finding.subject == "seam vllm.multimodal.cache.factories._get_cache_type"

    def test_a_start_method_that_nobody_knows_is_wrong(self) -> None:
        finding = doctor._start_method()
        assert not finding.ok
        assert finding.found.startswith("unknown")

    @pytest.mark.parametrize(("method", "ok"), [("spawn", True), ("fork", False)])
    def test_of_the_start_methods_only_fork_is_wrong(
        self, method: str, ok: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor.preload, "resolve", lambda method: "zygote")
        monkeypatch.setattr(doctor.start, "start_method", lambda: method)
        finding = doctor._start_method()
        assert (finding.ok, finding.found) == (ok, "zygote" if ok else "fork")
        assert bool(finding.advice) is not ok


class TestVirtualenvs:
    def test_virtualenvs_need_uv(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
        finding = doctor._virtualenv()
        assert not finding.ok
        assert "install uv" in finding.advice

    @pytest.mark.parametrize("off", ["0", "false"])
    def test_virtualenvs_need_nothing_when_they_are_off(self, off: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
        monkeypatch.setenv("XINFERENCE_ENABLE_VIRTUAL_ENV", off)
        assert doctor._virtualenv().ok

    def test_virtualenvs_are_served_by_a_uv_on_the_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
        finding = doctor._virtualenv()
        assert (finding.ok, finding.found) == (True, "/bin/uv")


class TestExamination:
    def test_the_examination_goes_through_where_nothing_is_installed(self) -> None:
        findings = doctor.examine()
        assert {finding.ok for finding in findings} == {True, False}
        assert all(finding.advice for finding in findings if not finding.ok)
        assert doctor.table(findings)

    def test_the_examination_keeps_vllms_log_out_unless_the_user_asks_for_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        doctor.examine()
        assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
        doctor.examine()
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


class TestExitStatus:
    @pytest.mark.parametrize(
        ("finding", "status"),
        [
            (Finding("seam", "there"), 0),
            (Finding("seam", "gone", True, "without it: less", degraded=True), 0),
            (Finding("seam", "gone", False, "without it: nothing"), 1),
        ],
        ids=["ok", "degraded", "wrong"],
    )
    def test_doctor_exits_with_status_1_only_if_something_is_wrong(
        self, finding: Finding, status: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "examine", lambda: [Finding("Python", "3.11"), finding])
        result = CliRunner().invoke(cli.main, ["doctor", "--json"])
        assert result.exit_code == status
        assert json.loads(result.output)[1] == finding.as_dict()
