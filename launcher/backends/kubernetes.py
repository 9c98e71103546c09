"""Kubernetes, by export alone: the TrainJob that Kubeflow Trainer v2 runs, for `kubectl apply -f -`.

Enter: one job. Leave: its manifest. Refused: submitting, which kubectl does.
"""

from collections.abc import Sequence
from pathlib import Path

from launcher import render
from launcher.backends.base import Standing
from launcher.spec import JobSpec, JobState
from mmpretrain.core.errors import ClusterError


class KubernetesBackend:
    """Renders and nothing else."""

    name = "kubernetes"

    def check(self, spec: JobSpec) -> None:
        """Nothing here can ask the cluster."""

    def render(self, specs: Sequence[JobSpec]) -> str:
        return "---\n".join(render.train_job(spec) for spec in specs)

    def submit(self, specs: Sequence[JobSpec]) -> str:
        raise ClusterError(
            "--to kubernetes only exports; add --dry-run and hand the output on: "
            "mmpretrain submit ... --to kubernetes --dry-run | kubectl apply -f -"
        )

    def poll(self, job: str, run: Path) -> Standing:
        return Standing(JobState.GONE, "kubectl get trainjobs knows")

    def cancel(self, job: str, run: Path) -> None:
        raise ClusterError(f"cancel it with kubectl: kubectl delete trainjob {job}")


BACKEND = KubernetesBackend()
