"""A user's own connector: refused without a tensor twin, exported with a right one only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

pytestmark = [
    pytest.mark.slow,
    # Ray's and torch's own, while they are imported.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture
def halved(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint whose pipeline halves observations by a connector of the user's own."""
    from tests.export.checkpoints import Case, write_checkpoint
    from tests.export.custom_connectors import Halve

    case = Case(
        observation_space=Box(-2, 2, (4,), np.float32),
        action_space=Discrete(3),
        connectors=(lambda multi_agent: Halve(),),  # noqa: ARG005 - the factory's
    )
    return write_checkpoint(tmp_path / "checkpoint", case)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Register a twin of Halve that scales by a factor, for one test."""
    from export import twins
    from tests.export.custom_connectors import Halve

    monkeypatch.setattr(twins, "_factories", {})

    class Scale(twins.ConnectorTwin):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, observation: Any, state: Any, reward: Any) -> Any:  # noqa: ARG002
            return observation * self.factor, state

    return lambda factor: twins.register_twin(Halve, lambda *_: Scale(factor))


def test_a_connector_without_a_twin_is_refused_by_name(halved: Path, tmp_path: Path) -> None:
    from export.convert import export_policy
    from export.errors import UnsupportedPolicyError

    with pytest.raises(UnsupportedPolicyError, match="Halve"):
        export_policy(halved, tmp_path / "bundle", trust_checkpoint=True)


def test_a_right_twin_is_exported_and_a_wrong_one_refused(
    halved: Path, tmp_path: Path, register: Any
) -> None:
    from export.convert import export_policy
    from export.errors import ParityError

    register(0.25)
    with pytest.raises(ParityError, match="action_dist_inputs differs"):
        export_policy(halved, tmp_path / "bundle", trust_checkpoint=True)
    assert not (tmp_path / "bundle").exists()
    register(0.5)
    manifest = export_policy(halved, tmp_path / "bundle", trust_checkpoint=True)
    assert "Halve" in manifest.raw["connectors"]["env_to_module"]
