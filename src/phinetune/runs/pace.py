"""Follow a training's events: forecast again once its pace is known, and keep freed memory from piling up.

Knows nothing of tensors, files or terminals.
"""

from __future__ import annotations

from collections.abc import Iterator

from phinetune.base.events import Evaluated, Event, Reforecast, Stepped
from phinetune.models.memory import release_unused
from phinetune.training.forecast import Forecast, num_evaluations
from phinetune.training.plan import Plan
from phinetune.training.settings import TrainingSettings

# The first steps pay for set-up: they are left out of the pace.
NUM_STEPS, NUM_SET_UP = 20, 5
# What glibc keeps grows from step to step. To give it back costs 70 ms with a small model, as the next step
# asks for all of it again.
RELEASE_EVERY = 32


class Pace:
    """Seconds per token of the steps and seconds of an evaluation, as they really are."""

    def __init__(self, settings: TrainingSettings, plan: Plan, expected: Forecast) -> None:
        self._plan, self._expected = plan, expected
        self._num_evaluations = num_evaluations(settings, plan)
        self._steps: list[Stepped] = []
        self._evaluations: list[Evaluated] = []

    def after(self, event: Event) -> Iterator[Reforecast]:
        """Take in an event; once, after `NUM_STEPS` steps, the new forecast."""
        if isinstance(event, Evaluated):
            self._evaluations.append(event)
            release_unused()
        if not isinstance(event, Stepped):
            return
        if event.step % RELEASE_EVERY == 0:
            release_unused()
        if len(self._steps) >= NUM_STEPS:
            return
        self._steps.append(event)
        if len(self._steps) == NUM_STEPS and event.step < event.num_steps:
            yield self._forecast(event)

    def _forecast(self, event: Stepped) -> Reforecast:
        plan = self._plan
        counted = self._steps[NUM_SET_UP:]
        per_token = sum(step.seconds for step in counted) / sum(step.num_tokens for step in counted)
        left = (event.num_steps - event.step) * plan.train.num_tokens / plan.steps_per_epoch * per_token
        spent = sum(step.seconds for step in self._steps) + sum(e.seconds for e in self._evaluations)
        if self._evaluations:
            num_left = sum(step > event.step for step in plan.evaluation_steps)
            left += num_left * min(e.seconds for e in self._evaluations)
        left += self._expected.comparison_seconds
        return Reforecast(step=event.step, seconds=spent + left, seconds_left=left)
