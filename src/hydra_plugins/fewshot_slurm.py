"""The launcher of conf/hydra/launcher/slurm.yaml; Hydra looks for launchers in the namespace hydra_plugins only."""

from collections.abc import Sequence
from contextlib import suppress

from hydra.core.utils import JobReturn

with suppress(ImportError):  # the extra `cluster` is not installed
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

    class SlurmLauncher(BaseSubmititLauncher):
        """Theirs, which composes and runs each job on its node; how jobs are submitted and waited for is our own."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
            from fewshot.sweep.slurm import launch

            return launch(self, job_overrides, initial_job_idx)
