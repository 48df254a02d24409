"""Which rows a step decodes and which groups it trains on: one batch, or DAPO's dynamic sampling.

Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) decodes further prompts until the step has as many
groups with a spread of rewards as it wants:

- round 1 draws as many rows as groups are wanted; a later round twice as many as should fill the step, by the
  share of groups with a spread so far, and never more than the first;
- groups are looked at in the dataset's order, whatever order they were complete in: the first ones with a
  spread are trained on. What a round brings beyond that is decoded in vain;
- the position moves past every row that was drawn. No row is decoded in two rounds of a step: with the same
  weights and seeds it would say the same again;
- when the rounds are used up the step trains on the groups it has, and on none where there is none. That is
  a metric (`groups_missing`) and, once a run, a warning.

All of it depends on weights, seeds and position alone, so a run that is resumed draws what it would have
drawn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from elastic_decode.errors import BudgetError, CapacityError, ConfigError
from elastic_decode.rl.batch import Group, Row

# (position, count) -> the rows from there on, and the position after them
NextRows = Callable[[int, int], tuple[Sequence[Row], int]]
# rows -> their groups, in the rows' order; those of rows that do not fit are left out
Roll = Callable[[Sequence[Row]], list[Group]]

_log = logging.getLogger(__name__)
_MARGIN = 2  # a round too many costs more than a few prompts too many


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What a step has decoded. kept: for each group, whether it is trained on. position: in the data, after
    it. metrics: of the gathering.
    """

    groups: list[Group]
    kept: list[bool]
    position: int
    metrics: dict[str, float] = field(default_factory=dict)


class Gather(Protocol):
    """Decodes a step's groups: `wanted` of them to train on."""

    def __call__(self, next_rows: NextRows, roll: Roll, *, position: int, wanted: int) -> Gathered: ...


def one_batch(next_rows: NextRows, roll: Roll, *, position: int, wanted: int) -> Gathered:
    """The next `wanted` rows, whatever comes of them."""
    rows, position = next_rows(position, wanted)
    groups = roll(rows)
    return Gathered(groups=groups, kept=[True] * len(groups), position=position)


class DynamicSampling:
    """`Gather` as above, in at most `rounds` rounds; make one a run.

    too_long_skips: in a later round, rows of which none fits are no error (in the first they are: the budgets
    are wrong then, not the prompts). warns: of several processes that do the same, one does.
    """

    def __init__(self, rounds: int, *, too_long_skips: bool, warns: bool = True) -> None:
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
            raise ConfigError(f"dynamic sampling needs rounds >= 1, got {rounds!r}")
        self._rounds, self._too_long_skips = rounds, too_long_skips
        self._warns, self._warned = warns, False

    def __call__(self, next_rows: NextRows, roll: Roll, *, position: int, wanted: int) -> Gathered:
        groups: list[Group] = []
        seen: set[int] = set()
        found = used = 0
        while found < wanted and used < self._rounds:
            rows, position = next_rows(position, self._count(wanted, found, len(groups)))
            used += 1
            fresh = [row for row in rows if row.index not in seen]
            seen.update(row.index for row in rows)
            groups += self._rolled(roll, fresh, first=used == 1) if fresh else []
            found = sum(group.has_spread for group in groups)
        kept, left = [], wanted
        for group in groups:
            kept.append(left > 0 and group.has_spread)
            left -= kept[-1]
        if left and self._warns and not self._warned:
            self._warned = True
            _log.warning(
                "dynamic sampling: %d of %d groups decoded in %d rounds have samples with different rewards, "
                "%d are wanted: the step trains on those it has. Change the budgets, the prompts or the "
                "rewards, or raise objective.max_sampling_rounds (said once; see groups_missing)",
                found,
                len(groups),
                used,
                wanted,
            )
        metrics = {
            "sampling_rounds": used,
            "prompts_decoded": len(groups),
            "groups_kept": sum(kept) / max(1, len(groups)),
            "groups_missing": left,
        }
        return Gathered(groups=groups, kept=kept, position=position, metrics=metrics)

    @staticmethod
    def _count(wanted: int, found: int, decoded: int) -> int:
        """Rows to draw in the next round."""
        return wanted if not found else min(wanted, _MARGIN * math.ceil((wanted - found) * decoded / found))

    def _rolled(self, roll: Roll, rows: Sequence[Row], *, first: bool) -> list[Group]:
        try:
            return roll(rows)
        except (BudgetError, CapacityError) as error:
            if first or not self._too_long_skips:
                raise
            if self._warns:
                _log.warning("dynamic sampling: none of %d further prompts fits: %s", len(rows), error)
            return []
