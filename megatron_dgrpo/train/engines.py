"""Rank 0's engines: each a pool of replicas, started by the supervisor or found at addresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_dgrpo.config.schema import Config
from megatron_dgrpo.errors import RolloutError
from megatron_dgrpo.launch.engines import expected_engine, host_names
from megatron_dgrpo.rollout.compatibility import this_side
from megatron_dgrpo.rollout.control import Control
from megatron_dgrpo.rollout.keys import read_key
from megatron_dgrpo.rollout.pool import Pool, Replica
from megatron_dgrpo.rollout.transports import Side


class Engines:
    """Connections are made when they are first needed: hosts start while models load."""

    def __init__(self, config: Config, addresses: Mapping[str, Sequence[str]], key: str, control: str) -> None:
        self._config, self._addresses, self._control = config, addresses, Control(control, key)
        self._key = key
        self._pools: dict[str, Pool] = {}
        self.restore: Callable[[str], None] = _nobody_restores
        """Gives those replicas of an engine that were started again the current weights."""
        self.note: Callable[[str], None] = print
        self.trainer: Callable[[], Side] = this_side
        """What the student's ranks are to their engines."""

    def client(self, name: str) -> Pool:
        if name not in self._pools:
            settings = self._config.engines[name]
            self._pools[name] = Pool(
                name,
                self._replicas(name),
                expected_engine(self._config, name, self.trainer()),
                start_timeout_s=settings.start_timeout_s,
                hang_timeout_s=settings.hang_timeout_s,
                restore=lambda: self.restore(name),
                note=lambda words: self.note(words),
                whole_again=self._config.rollout.deterministic,
            )
        return self._pools[name]

    def _replicas(self, name: str) -> list[Replica]:
        settings = self._config.engines[name]
        if settings.key_file is not None:
            key = read_key(settings.key_file)
            return [Replica(f"engine {name} at {address}", address, key) for address in settings.addresses]
        names = host_names(name, settings.replicas)
        addresses = self._addresses[name]
        return [Replica(n, a, self._key, self._control) for n, a in zip(names, addresses, strict=True)]


def _nobody_restores(name: str) -> None:
    raise RolloutError(f"engine {name} has no weights of this run: sync it first")
