"""MLflow: a database in the project's folder. To look: `mlflow ui --backend-store-uri sqlite:///…/mlflow.db`.

A server only when the environment variable `MLFLOW_TRACKING_URI` names one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from phinetune.runs.sinks.sink import Told

_TAG = "phinetune_run"
_STATUS = {"succeeded": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class Mlflow:
    """One MLflow run, in an experiment named like the project's folder."""

    def __init__(self, run: Told) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        asked = os.environ.get("MLFLOW_TRACKING_URI")
        place = run.project.resolve()
        self._metric = Metric
        self._client = MlflowClient(tracking_uri=asked or f"sqlite:///{(place / 'mlflow.db').as_posix()}")
        experiment = self._client.get_experiment_by_name(run.project.name)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(
                run.project.name, artifact_location=None if asked else (place / "mlartifacts").as_uri()
            )
        )
        self._run_id = self._known(run, experiment_id) or self._new(run, experiment_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run_id, status=_STATUS[status])

    def _known(self, run: Told, experiment_id: str) -> str:
        """The identity of the run there, when this one is resumed; it runs again."""
        if run.resumed_after is None:
            return ""
        found = self._client.search_runs([experiment_id], f"tags.{_TAG} = '{run.run_id}'", max_results=1)
        if not found:
            return ""
        self._client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)

    def _new(self, run: Told, experiment_id: str) -> str:
        made: Any = self._client.create_run(experiment_id, tags={_TAG: run.run_id}, run_name=run.run_id)
        for name, value in run.settings.items():
            self._client.log_param(made.info.run_id, name, value)
        return str(made.info.run_id)
