"""The processes of a stage, as Lightning sees them: flowmap or a launcher has started them, Lightning starts none."""

from __future__ import annotations

from lightning.fabric.plugins.environments import ClusterEnvironment

from flowmap.base.launch import Launch


class Started(ClusterEnvironment):
    """The first `size` processes of a launch.

    Lightning's own environment of SLURM would requeue the job by itself and handle its signals.
    """

    def __init__(self, launch: Launch, size: int):
        super().__init__()
        self.launch, self.size = launch, size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self.launch.address

    @property
    def main_port(self) -> int:
        return self.launch.port

    @staticmethod
    def detect() -> bool:
        return False  # it is always given

    def world_size(self) -> int:
        return self.size

    def global_rank(self) -> int:
        return self.launch.rank

    def local_rank(self) -> int:
        return self.launch.local_rank

    def node_rank(self) -> int:
        return self.launch.node

    def set_world_size(self, size: int) -> None: ...

    def set_global_rank(self, rank: int) -> None: ...
