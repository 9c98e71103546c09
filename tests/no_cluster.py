"""How tests say that they were skipped for want of a cluster; the last lines of a session name them."""

NO_CLUSTER = "the Slurm cluster for tests cannot run: "
