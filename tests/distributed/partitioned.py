"""ZeRO-3 as tests run it: the smallest weight is partitioned too, and let go after each use.

By default weights of fewer than 100,000 numbers stay whole on every rank, which is all of a small model, and all others
while they will be used again within 1,000,000,000 numbers.
"""


def engine_options(stage: int, **options: object) -> dict[str, object]:
    """`engine` of a run config for this ZeRO stage."""
    if stage < 3:
        return options
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    return options | {"deepspeed": {"zero_optimization": zero}}
