"""trackio: its local database. To look: `trackio show`. A Space only when `TRACKIO_SPACE_ID` names one."""

from __future__ import annotations

import os
from collections.abc import Mapping

from phinetune.runs.sinks.sink import Told


class Trackio:
    """One trackio run, in a project named like the project's folder."""

    def __init__(self, run: Told) -> None:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        import trackio

        self._run = trackio.init(
            project=run.project.name,
            name=run.run_id,
            resume="allow",
            config=dict(run.settings),
            space_id=os.environ.get("TRACKIO_SPACE_ID") or None,
        )
        self._finish = trackio.finish

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._finish()
