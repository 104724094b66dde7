"""Which checkpoints are kept: ModelCheckpoint's bookkeeping, in which a save can be entered and undone again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_stability._compat import MisconfigurationException, ModelCheckpoint
from lightning_stability.checkpointing.saving import best_first
from lightning_stability.checkpointing.writing import WriteJob

_OTHER_TRIGGERS = ("every_n_train_steps", "train_time_interval", "save_on_train_epoch_end", "save_on_exception")
_BOOKKEEPING = (
    *("current_score", "best_k_models", "kth_best_model_path", "kth_value", "best_model_score", "best_model_path"),
    *("last_model_path", "_scores", "_last_global_step_saved", "_last_checkpoint_saved", "_ranked", "_saved_at"),
)


class RankedCheckpoint(ModelCheckpoint):
    """Keeps the `save_top_k` best and always the newest. A metric ranks one checkpoint; one that is not finite none."""

    _ranked: Any = None
    """The metric that has ranked a checkpoint already."""
    _saved_at: tuple[int, int] | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # every checkpoint that is kept, oldest first, with its score
        self._scores: dict[str, Tensor | None] = {}

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's, and every checkpoint that is kept."""
        return {**super().state_dict(), "scores": dict(self._scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to rank and rotate from a checkpoint."""
        super().load_state_dict(state_dict)
        if self.dirpath == state_dict.get("dirpath", self.dirpath):
            self._scores = dict(state_dict.get("scores", {}))

    def _enter(self, trainer: Any, candidates: dict[str, Any]) -> WriteJob:
        """Enter the new checkpoint into the books and say what is to be done."""
        path = self._free_name(trainer, candidates, None, "")
        self._scores[path] = self.current_score = self._score(trainer)
        best = best_first(self._scores, self.mode)
        kept = len(best) if self.save_top_k == -1 else self.save_top_k
        scores: dict[str, Any] = self._scores
        self.best_k_models = {p: scores[p] for p in best[:kept]}
        if self.monitor is None:
            self.best_model_path = path
        elif self.best_k_models:
            self.best_model_path, self.best_model_score = best[0], scores[best[0]]
            self.kth_best_model_path = best[: kept or 1][-1]
            self.kth_value = scores[self.kth_best_model_path]
        outdated = [] if self.save_top_k == -1 else [p for p in self._scores if p != path and p not in best[:kept]]
        outdated = [p for p in outdated if self._should_remove_checkpoint(trainer, p, path)]
        last = None
        if self.save_last:
            last = self.last_model_path = self._free_name(
                trainer, candidates, self.CHECKPOINT_NAME_LAST, self.last_model_path
            )
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, path
        return WriteJob(path, None, last, self.save_last == "link", outdated)

    def _score(self, trainer: Any) -> Tensor | None:
        """The monitored metric, unless there is none, it is not finite, or it ranked an earlier checkpoint."""
        value = trainer.callback_metrics.get(self.monitor) if self.monitor is not None else None
        if value is None or value is self._ranked:
            return None
        self._ranked = value
        score = torch.as_tensor(value).detach().clone()
        return score if bool(torch.isfinite(score).all()) else None

    def _free_name(self, trainer: Any, candidates: dict[str, Any], filename: str | None, own: str) -> str:
        path = self.format_checkpoint_name(candidates, filename)
        version = self.STARTING_VERSION
        while self._enable_version_counter and path != own and self.file_exists(path, trainer):
            path = self.format_checkpoint_name(candidates, filename, ver=version)
            version += 1
        return path

    def _books(self) -> dict[str, Any]:
        """The bookkeeping of now, for `_restore_books`."""
        return {name: _copied(getattr(self, name)) for name in _BOOKKEEPING}

    def _restore_books(self, before: dict[str, Any]) -> None:
        for name, value in before.items():
            setattr(self, name, value)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def refuse_other_triggers(given: dict[str, Any]) -> None:
    """Refuse what ModelCheckpoint saves by."""
    for name, value in given.items():
        if name not in _OTHER_TRIGGERS:
            raise TypeError(f"FractionalCheckpoint has no option {name!r}")
        if value:
            raise MisconfigurationException(
                f"FractionalCheckpoint({name}={value!r}): it saves by every_n_epochs alone. Add a ModelCheckpoint with"
                f" {name} beside it, or leave it out."
            )
