"""Law of trackers: a resumed run goes on in the tracker's run that it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain_kit import recipe

from pretrain.accelerator import start_trackers


class FakeAccelerator:
    """Notes what trackers are opened with; MLflow gives its run an id."""

    is_main_process = True

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def init_trackers(self, name: str, config: dict[str, Any], init_kwargs: dict[str, Any]) -> None:
        self.options = init_kwargs

    def get_tracker(self, name: str) -> Any:
        assert name == "mlflow"
        run = type("Run", (), {"info": type("Info", (), {"run_id": "given"})})
        return type("Tracker", (), {"tracker": run})


def opened(trackers: list[str], extra: dict[str, Any]) -> dict[str, Any]:
    accelerator: Any = FakeAccelerator()
    start_trackers(accelerator, recipe("mae", Path("nowhere"), {"watch.trackers": trackers}), extra)
    options: dict[str, Any] = accelerator.options
    return options


def test_a_resumed_run_goes_on_in_the_tracker_s_run() -> None:
    extra: dict[str, Any] = {}
    first = opened(["wandb", "mlflow", "tensorboard"], extra)
    assert first["wandb"]["resume"] == "allow"
    assert "mlflow" not in first
    again = opened(["wandb", "mlflow", "tensorboard"], extra)
    assert again == {"wandb": first["wandb"], "mlflow": {"run_id": "given"}}
    other = opened(["wandb"], {})
    assert other["wandb"]["id"] != first["wandb"]["id"]
    assert opened([], {}) == {}
