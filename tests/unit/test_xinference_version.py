"""An Xinference that the package was not made for is told when the extension is loaded, and refused at a launch."""

from __future__ import annotations

import importlib.metadata

import pytest

from xinf_vllm_backend.errors import UnsupportedVersionError
from xinf_vllm_backend.plugin.xinference_version import SUPPORTED, check, warn_if_unsupported


@pytest.fixture
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if request.param is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return str(request.param)

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("installed", ["4.0.0", "4.0.1", "4.1.0", "4.1.7", None], indirect=True)
def test_a_supported_one_is_met_with_silence(installed: None, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_unsupported()
    check()
    assert not caplog.records


@pytest.mark.parametrize("installed", ["3.5.0", "4.2.0", "5.1.0"], indirect=True)
def test_another_one_is_met_with_one_sentence(installed: None, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_unsupported()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    with pytest.raises(UnsupportedVersionError) as caught:
        check()
    (sentence,) = caught.value.args
    assert sentence in record.getMessage()
    assert all(part in sentence for part in ("outside", str(SUPPORTED), "install", "XINFERENCE_EXTENSIONS"))
