"""Following the crown: the engine answers with whatever model the promotion table names."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from feedback.engine import Engine, EngineError
from feedback.store import Promotion, Store

log = logging.getLogger("thumbwheel")
POLL_SECONDS, RETRY_SECONDS = 0.5, 5.0


@dataclass(frozen=True)
class Defaults:
    """Sampling where the request says nothing, from the model's generation_config.json."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 48


def read_defaults(folder: Path) -> Defaults:
    """The defaults of a model folder. Raises ValueError for a damaged generation_config.json."""
    path = folder / "generation_config.json"
    if not path.exists():
        return Defaults()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        greedy = values.get("do_sample") is False
        temperature = 0.0 if greedy else float(values.get("temperature") or Defaults.temperature)
        max_tokens = int(values.get("max_new_tokens") or Defaults.max_tokens)
        return Defaults(temperature, float(values.get("top_p") or Defaults.top_p), max_tokens)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): make the model folder again") from error


class Crown:
    """Loads the champion when it changes. While the new one loads, or if it cannot be read, the old one answers.

    names: what else the champion may be asked for by.
    """

    names: tuple[str, ...] = ()

    def __init__(self, store: Store, engine: Engine, models: Path) -> None:
        """models: the folder with one folder a model, named by its hash."""
        self.store, self.engine, self.models = store, engine, models
        self.known: dict[str, tuple[Promotion, Defaults]] = {}
        self.problem = "no model has been promoted yet"

    def folder(self, promotion: Promotion) -> Path:
        """Where a promoted model stands: models/<hash>, else the path of its row (relative to the current folder).

        Raises FileNotFoundError when neither is there.
        """
        for folder in (self.models / promotion.model_hash, Path(promotion.model_path)):
            if (folder / "config.json").exists():
                return folder
        raise FileNotFoundError(
            f"champion {promotion.model_hash[:12]} is neither in {self.models} nor at {promotion.model_path}"
        )

    async def follow(self) -> None:
        """Run until cancelled. A failure is logged and tried again; the table is never given up."""
        while True:
            pause = POLL_SECONDS
            try:
                await self.look()
            except Exception as error:
                if str(error) != self.problem:
                    log.error("cannot load the champion: %s", error)
                self.problem = str(error)
                pause = RETRY_SECONDS if not isinstance(error, EngineError) else POLL_SECONDS
            await asyncio.sleep(pause)

    async def look(self) -> None:
        """Load the reigning model unless it answers already. Raises what went wrong."""
        promotion = await asyncio.to_thread(self.store.champion)
        if promotion is None or promotion.model_hash == self.engine.model_hash:
            return
        folder = self.folder(promotion)
        self.known[promotion.model_hash] = (promotion, read_defaults(folder))
        await self.engine.load(promotion.model_hash, folder)
        self.problem = ""
        log.warning("answering with model %s from %s", promotion.model_hash[:12], folder)
