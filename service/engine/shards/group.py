"""The group of processes that add up and gather what their parts of the model answer."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from service.engine.shards.plan import Shard


@dataclass(frozen=True, slots=True)
class Group:
    """`folder` is theirs alone: there they find each other. A step that waits `timeout_s` for one of them fails."""

    folder: str
    timeout_s: float

    def join(self, shard: Shard, device: torch.device) -> None:
        """Returns once all have joined."""
        store = dist.FileStore(os.path.join(self.folder, "group"), shard.size)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=self.timeout_s)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl", store=store, rank=shard.rank, world_size=shard.size, timeout=timeout, device_id=device
            )
            return
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are all on this machine
        dist.init_process_group("gloo", store=store, rank=shard.rank, world_size=shard.size, timeout=timeout)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
