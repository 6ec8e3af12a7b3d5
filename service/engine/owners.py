"""Whose each sequence on the model's thread is, and who ends when something goes wrong."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

from adapters.factors import AdapterFactors
from service.engine.failure import failure
from service.engine.fatal import is_fatal
from service.engine.job import Choice, Job
from service.engine.seam import BatchShare
from service.engine.sequence import Sequence

log = logging.getLogger(__name__)


def shares_of(sequences: Seq[Sequence]) -> tuple[BatchShare, ...]:
    """What these sequences run, and for whom. Of their requests alone, which nobody changes: for any thread."""
    rows = Counter((each.request.tenant, each.selection) for each in sequences)
    return tuple(BatchShare(tenant, selection, count) for (tenant, selection), count in rows.items())


class Owners:
    """The job, and its choice, that each sequence computes for."""

    def __init__(self) -> None:
        self._of: dict[Sequence, tuple[Job, Choice]] = {}

    def add(self, job: Job) -> None:
        self._of.update((choice.sequence, (job, choice)) for choice in job.choices)

    def of(self, sequence: Sequence) -> tuple[Job, Choice]:
        return self._of[sequence]

    def job(self, sequence: Sequence) -> Job:
        return self._of[sequence][0]

    def factors(self, sequence: Sequence) -> Seq[AdapterFactors]:
        """The factors of a sequence's adapters, in its selection's order."""
        return self._of[sequence][0].factors

    def keep(self, alive: Collection[Sequence]) -> None:
        """Forgets all other sequences."""
        for sequence in [each for each in self._of if each not in alive]:
            del self._of[sequence]

    def fail(self, sequences: Seq[Sequence], error: Exception) -> None:
        """Ends the requests of these sequences; raises again what no request can be blamed for."""
        if is_fatal(error):
            raise error
        log.error("requests failed: %s", ", ".join(s.request.request_id for s in sequences), exc_info=error)
        for sequence in sequences:
            self.job(sequence).fail(*failure(error))

    @contextmanager
    def blaming(self, sequence: Sequence) -> Iterator[None]:
        """What fails inside is this sequence's fault."""
        try:
            yield
        except Exception as error:
            self.fail([sequence], error)
