"""The hub: its ids and its failures."""

from __future__ import annotations

import errno

import pytest

from agent_infra_core.node.hub import describe_hub_failure, is_hub_id


class OfflineModeIsEnabled(ConnectionError):  # noqa: N818 (huggingface_hub's own name)
    """As huggingface_hub calls it: told by name, since it may not be installed."""


def test_failures_of_the_hub_are_told_by_the_name_of_their_class_and_a_full_disk_by_its_number() -> None:
    assert describe_hub_failure(OfflineModeIsEnabled("x")) == "HF_HUB_OFFLINE is set; unset it for `pull` (x)"
    assert "the hub cannot be reached" in describe_hub_failure(ValueError("some\npages"))
    full = RuntimeError("writing failed")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert describe_hub_failure(full).startswith("the disk is full")


@pytest.mark.parametrize(
    ("path", "is_id"), [("org/model", True), ("model", False), ("/a/b", False), ("./a", False), ("a/b/c", False)]
)
def test_an_id_of_the_hub_is_told_from_a_path(path: str, is_id: bool) -> None:
    assert is_hub_id(path) is is_id
