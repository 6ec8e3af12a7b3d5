"""Any sequence of changes, by either of two servers of a shared store, is what one server's own store makes of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters.errors import AdapterError
from adapters.store import AdapterRecord, AdapterStore, Store, digest_of
from adapters.store.shared import open_objects
from adapters.store.shared.garbage import examine, repair
from tests.unit.adapters.shared_support import shared

KEEP = 2
TENANTS = st.sampled_from(["", "a", "A"])
NAMES = st.sampled_from(["sql", "style"])
CONTENTS = st.integers(0, 3)
REPLICAS = st.integers(0, 1)


def plain(value: Any) -> Any:
    """An answer without its times."""
    if isinstance(value, AdapterRecord):
        versions = [(version.digest, version.file_bytes, version.info) for version in value.versions]
        return value.tenant, value.name, value.digest, value.info, versions
    return value


def outcome(attempt: Callable[[], Any]) -> Any:
    """What came of it: an answer, or which error in which words."""
    try:
        return plain(attempt())
    except AdapterError as error:
        return type(error), error.message, error.subject


class SameAsOne(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.objects = open_objects(f"file://{self.root}/objects")
        self.own = AdapterStore(self.root / "own", keep_versions=KEEP)
        self.replicas = [shared(self.objects, self.root / f"data-{n}", keep_versions=KEEP) for n in range(2)]
        self.before: Any = None

    def teardown(self) -> None:
        if hasattr(self, "root"):
            for store in (self.own, *self.replicas):
                store.close()
            shutil.rmtree(self.root)

    def both(self, replica: int, change: Callable[[Store], Any]) -> Any:
        expected = outcome(lambda: change(self.own))
        assert outcome(lambda: change(self.replicas[replica])) == expected
        return expected

    @rule(replica=REPLICAS, tenant=TENANTS, name=NAMES, content=CONTENTS, replace=st.booleans(), info=st.integers(0, 1))
    def publish(self, replica: int, tenant: str, name: str, content: int, replace: bool, info: int) -> None:
        def change(store: Store) -> AdapterRecord:
            with store.staging() as staged:
                (staged / "adapter_config.json").write_text("{}")
                (staged / "weights").write_bytes(b"%d" % content)
                return store.publish(tenant, name, staged, {"info": info}, replace=replace)

        self.both(replica, change)

    @rule(replica=REPLICAS, tenant=TENANTS, name=NAMES)
    def delete(self, replica: int, tenant: str, name: str) -> None:
        self.both(replica, lambda store: store.delete(tenant, name))

    @rule(replica=REPLICAS, tenant=TENANTS, name=NAMES, which=st.integers(0, KEEP))
    def rollback(self, replica: int, tenant: str, name: str, which: int) -> None:
        try:
            digest = self.own.get(tenant, name).versions[which].digest
        except (AdapterError, IndexError):
            digest = "sha256:" + "0" * 64
        self.both(replica, lambda store: store.rollback(tenant, name, digest))

    @rule(replica=REPLICAS, tenant=TENANTS, name=NAMES, mode=st.sampled_from(["switch", "merge", "blend"]))
    def activate(self, replica: int, tenant: str, name: str, mode: str) -> None:
        active = self.own.active(tenant)
        self.before = active or self.before
        self.both(replica, lambda store: store.activate(tenant, name, mode))

    @rule(replica=REPLICAS)
    def reactivate(self, replica: int) -> None:
        if self.before is not None:
            self.both(replica, lambda store: store.reactivate(self.before))

    @rule(replica=REPLICAS, tenant=TENANTS, name=NAMES)
    def deactivate(self, replica: int, tenant: str, name: str) -> None:
        self.both(replica, lambda store: store.deactivate(tenant, name))

    @rule(grace=st.sampled_from([-5.0, 3600.0]))
    def collect(self, grace: float) -> None:
        assert not repair(self.objects, grace_s=grace).remaining

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "root"):
            return
        for store in self.replicas:
            store.refresh()
            for tenant in ("", "a", "A", "nobody"):
                assert store.active(tenant) == self.own.active(tenant)
                assert store.count(tenant) == self.own.count(tenant)
                assert [name for name, _ in store.names(tenant)] == [name for name, _ in self.own.names(tenant)]
                ours, theirs = store.list(tenant, limit=1), self.own.list(tenant, limit=1)
                assert (list(map(plain, ours[0])), ours[1]) == (list(map(plain, theirs[0])), theirs[1])
                for name in ("sql", "style"):
                    assert outcome(lambda s=store, t=tenant, n=name: s.visible(t, n)) == outcome(
                        lambda t=tenant, n=name: self.own.visible(t, n)
                    )
            digests = {version.digest for _, _, version in self.own.all_versions()}
            assert {version.digest for _, _, version in store.all_versions()} == digests
            for digest in digests:
                assert digest_of(store.fetch(digest)) == digest
                assert sorted(info["info"] for info in store.infos(digest)) == sorted(
                    info["info"] for info in self.own.infos(digest)
                )
        assert not examine(self.objects).found


TestSameAsOne = SameAsOne.TestCase
TestSameAsOne.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
