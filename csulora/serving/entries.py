"""How an adapter becomes an entry of the cache, and a damaged entry a sound one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from csulora.adapter import LoraAdapter, write_folder
from csulora.errors import CsuloraError
from csulora.report import Report
from csulora.serving.cache import Cache
from csulora.serving.config import ServingConfig
from csulora.serving.forms import pick
from csulora.serving.policy import Policy, key_of_copy
from csulora.serving.proof import How, Proofs
from csulora.serving.recent import Recent, Refusals
from csulora.serving.record import FILE_MODE, Record, shortened
from csulora.serving.refused import RefusedError
from csulora.serving.sources import Facts, Sources
from csulora.settings import Method
from csulora.subspace import SafetySubspace


@dataclass(frozen=True)
class Entry:
    """A sound entry. made: how, by this call; empty where it was there. seconds: of its steps."""

    key: str
    record: Record
    made: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


class Entries:
    """What of the cache an adapter may be served from."""

    def __init__(self, config: ServingConfig, subspace: SafetySubspace, cache: Cache) -> None:
        self._config, self._subspace, self._cache = config, subspace, cache
        self._policy = Policy(config, subspace)
        self.sources = Sources(config, subspace)
        self._proofs = Proofs(config, subspace, self._policy, self.sources)
        # Keys of entries that may be served under this configuration.
        self._trusted: Recent[str, bool] = Recent()
        self._refused: Recent[str, RefusedError] = Recent()  # by key: what only a correction shows
        self._untaken: Refusals[str, None] = Refusals()  # by key: what there was no room for

    def unchanged(self, key: str) -> bool:
        """Whether an entry that was given out has the same files: three stats."""
        return self._trusted.get(key) is not None and self._cache.unchanged(key)

    def of(self, facts: Facts, limit: int | None) -> Entry | None:
        """The entry of an adapter that is there already. Raises RefusedError where none can be."""
        for key in self._keys(facts, limit):
            record = self._cache.find(key)
            if record is not None:
                return self._entry(key, record)
            refused = self._refused.get(key)
            if refused is not None:
                raise refused.plain()
        return None

    def make(self, facts: Facts, adapter: LoraAdapter | None, limit: int | None) -> Entry:
        """A new entry, or that which somebody else made meanwhile.

        adapter: what the facts are of, where it is in memory. Raises RefusedError.
        """
        if facts.made:
            signed = self._proofs.signature(facts.source.folder)
            if signed is None:
                return self._copied(facts, "recomputed", self._policy.digest)
            return self._copied(facts, "signed", signed)
        method, rank = pick(facts.ranks, self._config, limit)
        if self._config.mode == "require":
            return self._restored(facts, method)
        return self._corrected(facts, adapter, method, rank)

    def in_memory(
        self, adapter: LoraAdapter, limit: int | None
    ) -> tuple[LoraAdapter, Report, Method, int]:
        """An adapter that came without a folder, corrected; with its report, settings and largest rank.

        Raises RefusedError.
        """
        if self._config.mode == "require":
            raise RefusedError(
                "not corrected", "came as tensors, of which this server cannot know what they are"
            )
        method, rank = pick(self.sources.ranks(adapter), self._config, limit)
        corrected, report = self._result(adapter, method)
        self._check(report)
        return corrected, report, method, rank

    def sound(self, key: str) -> Entry:
        """An entry by its key, made anew where it is damaged and its source is still the same.

        Raises RefusedError, also for one that was made with other settings than those of now.
        """
        record = self._cache.find(key)
        if record is not None and self._proofs.trusts(record):
            return self._entry(key, record)
        before = record or self._cache.remembered(key)
        if before is None:
            raise RefusedError(
                "damaged", "its cache entry is gone, and what it was made of unknown"
            )
        if not self._proofs.trusts(before):
            raise RefusedError("not corrected", "its cache entry was made with other settings")
        folder = Path(before.source)
        facts = self.sources.known(folder) or self.sources.read(folder)[0]
        return self._repaired(key, before, facts)

    def _keys(self, facts: Facts, limit: int | None) -> list[str]:
        """Of the entries that would do for an adapter."""
        if not facts.made:
            method, _ = pick(facts.ranks, self._config, limit)
            return [self._policy.key(facts.source, method)]
        if limit is not None and facts.rank > limit:
            raise RefusedError("rank", f"its rank is {facts.rank}, and the server takes {limit}")
        if self._config.portable and facts.made.get("settings", {}).get("portable") is not True:
            raise RefusedError(
                "unproven", "was corrected, but not into the portable form, which this server needs"
            )
        keys = [key_of_copy(facts.source, "recomputed", self._policy.digest)]
        signed = self._proofs.signature(facts.source.folder)
        return keys if signed is None else [key_of_copy(facts.source, "signed", signed), *keys]

    def _corrected(
        self, facts: Facts, adapter: LoraAdapter | None, method: Method, rank: int
    ) -> Entry:
        key, seconds = self._policy.key(facts.source, method), dict[str, float]()

        def make(target: Path) -> Record:
            given = self._loaded(facts) if adapter is None else adapter
            begin = time.perf_counter()
            corrected, report = self._result(given, method)
            try:
                self._check(report)
            except RefusedError as error:
                if error.reason == "rank error":  # from now on without making it
                    self._refused.set(key, error.plain())
                raise
            seconds["correct"] = time.perf_counter() - begin
            begin = time.perf_counter()
            written = write_folder(
                corrected,
                target,
                overwrite=False,
                report=report.to_dict(),
                durable=False,  # an entry is verified before it is used
                companions=False,  # some servers read any safetensors file of a folder
                mode=FILE_MODE,
            )
            seconds["write"] = time.perf_counter() - begin
            return Record.of(
                facts.source,
                written.in_report()["output"],
                policy=self._policy.digest,
                rank=rank,
                form=method.form,
                how="corrected",
                warnings=shortened(report.warnings),
            )

        return self._placed(key, make, "corrected", seconds)

    def _result(self, adapter: LoraAdapter, method: Method) -> tuple[LoraAdapter, Report]:
        """An adapter, corrected. Raises RefusedError."""
        (result,) = self._policy.recipe(method).correct([adapter], self._subspace)
        if isinstance(result, CsuloraError):
            raise RefusedError("source", str(result))
        return result

    def _copied(self, facts: Facts, how: How, by: str) -> Entry:
        with self._proofs.remembering(facts.source.folder):
            origin = self._proofs.origin(facts) if how == "recomputed" else None
            return self._placed(
                key_of_copy(facts.source, how, by),
                lambda target: self._proofs.copy(facts, how, by, origin, target),
                how,
            )

    def _placed(
        self,
        key: str,
        make: Callable[[Path], Record],
        how: str,
        seconds: dict[str, float] | None = None,
    ) -> Entry:
        with self._cache.making(key):
            record = self._cache.find(key)
            if record is not None:
                return self._entry(key, record)
            with self._untaken.remembering(key, None, ("cache",)):
                record = self._cache.put(key, make)
            return self._entry(key, record, how, seconds)

    def _entry(
        self, key: str, record: Record, made: str = "", seconds: dict[str, float] | None = None
    ) -> Entry:
        self._trusted.set(key, True)
        return Entry(key, record, made, seconds or {})

    def _restored(self, facts: Facts, method: Method) -> Entry:
        """A damaged entry of which the record is there, made as it was. Raises RefusedError."""
        key = self._policy.key(facts.source, method)
        before = self._recorded(key)
        if before is None:
            text = "is not corrected, and this server takes corrected adapters only"
            raise RefusedError("not corrected", f"{text}{self._other_form(facts, method)}")
        return self._repaired(key, before, facts)

    def _recorded(self, key: str) -> Record | None:
        """The record of a correction with the settings of now, whatever has become of the entry."""
        found = self._cache.remembered(key)
        counts = found is not None and found.how == "corrected" and self._proofs.trusts(found)
        return found if counts else None

    def _other_form(self, facts: Facts, method: Method) -> str:
        """What to add to a refusal where the cache has the adapter in a form for another rank."""
        for form in facts.ranks:
            key = self._policy.key(facts.source, replace(method, form=form))
            if self._recorded(key) is not None:
                return (
                    f"; the cache has it in the form {form}, and the max_lora_rank of this server takes "
                    f"the form {method.form}: run csulora prewarm with that --max-lora-rank"
                )
        return ""

    def _repaired(self, key: str, before: Record, facts: Facts) -> Entry:
        """A damaged entry, made anew of the same source, in mode "require" with the same bytes."""
        if facts.source.digests != before.source_digests:
            raise RefusedError(
                "changed", f"its cache entry is damaged, and {before.source} is another now"
            )
        if before.how == "corrected":
            method = replace(self._config.method, form=before.form)  # type: ignore[arg-type]
            made = self._corrected(facts, None, method, before.rank)
        else:
            made = self._copied(facts, before.how, before.policy)  # type: ignore[arg-type]
        if made.key != key:
            raise RefusedError("damaged", "its cache entry is not of the key that it is under")
        if self._config.mode == "require" and made.record.output_digests != before.output_digests:
            self._cache.drop(key)
            raise RefusedError("damaged", "its cache entry is damaged, and comes out otherwise now")
        return replace(made, made="repaired")

    def _loaded(self, facts: Facts) -> LoraAdapter:
        """An adapter whose facts are known. Raises RefusedError where it is another by now."""
        found, adapter = self.sources.read(facts.source.folder)
        if found.source != facts.source:
            raise RefusedError("changed", f"{facts.source.folder}: is being changed")
        return adapter

    def _check(self, report: Report) -> None:
        """Raise RefusedError for a result that is not to be served."""
        if report.passed_through:
            raise RefusedError("not lora", "holds tensors that would pass uncorrected")
        self._policy.check_fit(report)
