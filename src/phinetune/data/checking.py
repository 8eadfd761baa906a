"""Check a whole data file: what it holds and everything that is wrong with it.

Knows nothing of tokens or terminals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from phinetune.data.conversation import Conversation
from phinetune.data.findings import Finding as Finding
from phinetune.data.reading import MAX_FINDINGS_KEPT, read_examples


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a file holds. `num_examples` counts sound rows; `findings` are in file order, 10,000 at most."""

    file: str
    size_bytes: int
    num_examples: int
    num_conversations: int
    num_texts: int
    num_trained_turns: int
    num_characters: int
    roles: Mapping[str, int]
    num_errors: int
    num_warnings: int
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        return self.num_errors == 0


def check_file(path: Path) -> CheckReport:
    """Read all of `path` and report; never raises for what the file holds, nor when it is missing."""
    roles: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    findings: list[Finding] = []
    for item in read_examples(path):
        if isinstance(item, Finding):
            counts[item.severity] += 1
            if len(findings) < MAX_FINDINGS_KEPT:
                findings.append(item)
        elif isinstance(item, Conversation):
            counts["conversations"] += 1
            for message in item.messages:
                roles[message.role] += 1
                counts["characters"] += len(message.content)
                counts["trained_turns"] += message.role == "assistant" and message.weight == 1
        else:
            counts["texts"] += 1
            counts["characters"] += len(item.text)
    return CheckReport(
        file=str(path),
        size_bytes=path.stat().st_size if path.is_file() else 0,
        num_examples=counts["conversations"] + counts["texts"],
        num_conversations=counts["conversations"],
        num_texts=counts["texts"],
        num_trained_turns=counts["trained_turns"],
        num_characters=counts["characters"],
        roles=dict(roles),
        num_errors=counts["error"],
        num_warnings=counts["warning"],
        findings=tuple(findings),
    )
