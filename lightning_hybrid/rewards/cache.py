"""Scores that are kept, so that the same prompt and response are judged once."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards.base import UNVERIFIED, Fields, Reward, taken

HITS = "cache_hits"
IN_MEMORY = 200_000  # scores, about 40 MB
WAIT_SECONDS = 60.0  # while other ranks write
AT_ONCE = 500  # keys of one query


class Store(Protocol):
    """Where scores are kept by their keys."""

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Those that there are."""

    def put(self, scores: Mapping[str, float]) -> None:
        """Keeps them."""


class MemoryStore:
    """The newest scores of this rank.

    Args:
        most: how many; the ones that were not asked for the longest are forgotten.
    """

    def __init__(self, most: int = IN_MEMORY) -> None:
        self.most = most
        self._scores: OrderedDict[str, float] = OrderedDict()

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Those that there are."""
        found = {key: self._scores[key] for key in keys if key in self._scores}
        for key in found:
            self._scores.move_to_end(key)
        return found

    def put(self, scores: Mapping[str, float]) -> None:
        """Keeps them."""
        self._scores.update(scores)
        while len(self._scores) > self.most:
            self._scores.popitem(last=False)


class FileStore:
    """An SQLite file of keys and numbers, nothing else; several ranks and runs may use it at the same time.

    Args:
        path: of the file; it and its folder are made where they are missing.

    Raises:
        ConfigError: The file cannot be written, or is something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._do("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID")
            self._do("SELECT key, score FROM scores LIMIT 1")
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"reward.cache = {str(path)!r} cannot be used as a cache ({error}): give the path of a new file in a "
                "folder that can be written to"
            ) from error

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Those that there are; raises a RewardError where the file cannot be read."""
        wanted = list(keys)
        found: dict[str, float] = {}
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            places = ",".join("?" * len(some))
            found |= dict(self._tried(f"SELECT key, score FROM scores WHERE key IN ({places})", some))
        return found

    def put(self, scores: Mapping[str, float]) -> None:
        """Keeps them, all or none; raises a RewardError where the file cannot be written."""
        self._tried("INSERT OR REPLACE INTO scores VALUES (?, ?)", list(scores.items()), many=True)

    def _tried(self, command: str, values: list[Any], many: bool = False) -> list[Any]:
        try:
            return self._do(command, values, many)
        except sqlite3.Error as error:
            raise RewardError(
                f"the reward cache {self.path} failed ({error}): check the disk, or run without reward.cache"
            ) from error

    def _do(self, command: str, values: Sequence[Any] = (), many: bool = False) -> list[Any]:
        # A connection for each command: none is shared between threads, or kept over a fork.
        with closing(sqlite3.connect(self.path, timeout=WAIT_SECONDS)) as connection, connection:
            run = connection.executemany if many else connection.execute
            return run(command, values).fetchall()


class CachedReward(Reward):
    """Asks another reward for what it has not been asked before.

    The scores are those of the other reward, as long as it judges each response by itself and gives the same text the
    same score. Responses that could not be verified are not kept. The figure ``cache_hits`` has 1 for each response
    whose score was there, or had just been asked for in the same batch.

    Args:
        reward: one without reward models in engines, in which all ranks must take part in each forward pass.
        store: where the scores are kept.

    Raises:
        ConfigError: The reward has models in engines; or the store is a file, and the reward is a function that cannot
            be known again in it.
    """

    def __init__(self, reward: Reward, store: Store) -> None:
        super().__init__()
        if reward.models:
            raise ConfigError(f"reward {reward.name!r} asks reward models in engines, which cannot be cached")
        if isinstance(store, FileStore) and not reward.lasting:
            raise ConfigError(
                f"reward.cache = {str(store.path)!r} cannot know reward {reward.name!r} again in another run: it is no "
                "function that a module holds under its own name, but a closure, a lambda, an object or the like; "
                "write it as def at the top level of a module, or set reward.cache=true"
            )
        self.reward = reward
        self.store = store
        self.name = reward.name
        self.needed_fields = reward.needed_fields
        self.replicas = reward.replicas
        self.served = reward.served
        self.figures = {name: torch.zeros(0) for name in (*reward.figures, HITS)}
        self._identity = reward.identity()

    def columns_read(self, fields: Fields | None) -> frozenset[str]:
        """As the other reward."""
        return self.reward.columns_read(fields)

    def identity(self) -> str:
        """As the other reward."""
        return self._identity

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Tensor:
        """The scores, ``[batch]`` float32 on the CPU."""
        keys = self._keys(prompts, responses, fields)
        known = self.store.get(dict.fromkeys(keys))
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
        rows = sorted(first.values())
        known |= self._ask(keys, rows, prompts, responses, fields)
        self._note(keys, rows)
        return torch.tensor([known[key] for key in keys], dtype=torch.float32)

    def _ask(
        self, keys: list[str], rows: list[int], prompts: list[str], responses: list[str], fields: Fields | None
    ) -> dict[str, float]:
        """Scores of some rows by their keys, kept but where they could not be verified."""
        if not rows:
            return {}
        some = {name: [values[row] for row in rows] for name, values in (fields or {}).items()}
        scores = self.reward([prompts[row] for row in rows], [responses[row] for row in rows], some).tolist()
        doubtful = self.reward.figures.get(UNVERIFIED, torch.zeros(len(rows))).tolist()
        asked = dict(zip((keys[row] for row in rows), scores, strict=True))
        self.store.put({key: asked[key] for key, doubt in zip(asked, doubtful, strict=True) if not doubt})
        return asked

    def _note(self, keys: list[str], rows: list[int]) -> None:
        """Figures of the whole batch, from those of the rows that were asked for."""
        place = {keys[row]: number for number, row in enumerate(rows)}
        self.figures = {
            name: torch.tensor([float(values[place[key]]) if key in place else 0.0 for key in keys])
            for name, values in self.reward.figures.items()
        }
        self.figures[HITS] = torch.ones(len(keys)).index_fill(0, torch.tensor(rows, dtype=torch.long), 0.0)

    def _keys(self, prompts: list[str], responses: list[str], fields: Fields | None) -> list[str]:
        columns = taken(self.name, self.reward.columns_read(fields), fields, len(responses))
        return [
            self._key([prompt, response, {name: values[row] for name, values in columns.items()}])
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]

    def _key(self, sample: list[Any]) -> str:
        try:
            text = json.dumps([self._identity, *sample], sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise RewardError(
                f"reward {self.name!r}: a column holds what cannot be told apart by a cache ({error}): make it text or "
                "numbers, or run without reward.cache"
            ) from error
        return hashlib.sha256(text.encode()).hexdigest()
