"""What a resume needs and how it is written: random state, atomic files, finite check, listing."""

from lightning_stability.checkpointing.listing import CheckpointInfo, last_good_checkpoint, list_checkpoints

__all__ = ["CheckpointInfo", "last_good_checkpoint", "list_checkpoints"]
