"""Engine arguments get the types they are declared with."""

from __future__ import annotations

import dataclasses

import pytest

from xinf_vllm_backend.engine import arguments
from xinf_vllm_backend.errors import BadLaunchArgumentError

NOT_GIVEN = object()


@dataclasses.dataclass
class Arguments:
    seqs: int | None = 8
    marked: int | None = dataclasses.field(default_factory=lambda: NOT_GIVEN)  # type: ignore[assignment]
    names: list[str] = dataclasses.field(default_factory=list)


def test_a_number_that_is_given_as_text_is_a_number() -> None:
    given = Arguments(seqs="4", marked="5")  # type: ignore[arg-type]
    arguments.check(given)
    assert (given.seqs, given.marked) == (4, 5)


def test_what_is_no_number_is_refused_by_its_name() -> None:
    with pytest.raises(BadLaunchArgumentError, match=r"^marked='many' cannot be used: "):
        arguments.check(Arguments(marked="many"))  # type: ignore[arg-type]


def test_a_default_may_be_a_mark_of_another_type() -> None:
    given = Arguments()
    arguments.check(given)
    assert given.marked is NOT_GIVEN
