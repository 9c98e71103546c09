"""The planner against what is measured: PyTorch's own count of FLOPs, real allocations, published figures."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planning_cases import CASES, alone, case, rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mmpretrain.cli import app
from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.config_engine import AverageConfig
from mmpretrain.core.errors import ConfigError
from mmpretrain.core.ranks import BatchPlan, World
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.models.stand_ins import make_batch, make_fake
from mmpretrain.planning.communication import Bandwidth, Network, messages
from mmpretrain.planning.machines import MACHINES, machine_named
from mmpretrain.planning.memory import GIB, setting_of, step_memory
from mmpretrain.planning.plan import plan_of, share_batch
from mmpretrain.planning.recorder import Collective, Operation, Recorder, Work
from mmpretrain.planning.stand_ins import resolve_model
from mmpretrain.planning.step_time import model_flops, work_seconds
from mmpretrain.planning.workload import measure, measure_encoding
from mmpretrain.training.parts import batch_fields, model_on_meta

H100 = MACHINES["h100"]


def config(name, *overrides):
    return load_run_config(configs_folder() / f"{name}.yaml", overrides)


@pytest.fixture(scope="module")
def demo():
    """Four modalities; contrast, masked words in sight of pictures, masked patches, answers from all."""
    run = config("demo", "micro_batch_size=4", "global_batch_size=24")
    return run, measure(run, BatchPlan(24, 4, World(0, 2)))


def counted(run):
    """FLOPs of encoding a micro-batch, forward and backward, that PyTorch counts while it really computes; attention as
    plain products, so that they are counted alike."""
    model = MultimodalTransformer.create(resolve_model(run).config, run.objectives).train()
    model.set_activation_checkpointing(run.engine.activation_checkpointing)
    batch = rows(run, model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        parts = [part for part in model.encode(batch).values() if part.requires_grad]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_flops_of_four_modalities_and_their_objectives_are_those_pytorch_counts(demo, recompute):
    run, workload = demo
    encoding = workload.encodings[recompute]
    engine = run.engine.model_copy(update={"activation_checkpointing": recompute})
    assert (encoding.forward.flops, encoding.backward.flops) == counted(run.model_copy(update={"engine": engine}))


NARROW = [f"model.towers.{tower}.{size}" for tower in ("image", "text") for size in ("width=64", "depth=2", "heads=4")]
SMALL_COCA = (
    *("micro_batch_size=2", "global_batch_size=4", "engine.activation_checkpointing=none", "precision=fp32"),
    *("model.towers.image.stem.image_size=32", "model.towers.text.stem.context_length=12", "model.embed_dim=64"),
    *("objectives.caption.depth=2", "objectives.caption.heads=4", "data.tokenizer.path=null"),
)


def test_flops_of_a_decoder_that_looks_at_pictures_are_those_pytorch_counts():
    run = config("coca-base", *NARROW, *SMALL_COCA)
    encoding = measure(run, BatchPlan(4, 2, World(0, 2))).encoding
    assert (encoding.forward.flops, encoding.backward.flops) == counted(run)


def test_the_loss_computes_its_logits_twice_and_two_gradients(demo):
    """InfoNCE at b rows of a rank, B of all, width D: 2 b B D each; three pairs here. Beside it the head of answers."""
    run, workload = demo
    logits = 3 * 2 * 12 * 24 * run.model.embed_dim
    assert workload.joining.forward.flops == logits
    assert workload.joining.backward.flops == 3 * logits


def test_a_step_in_chunks_is_its_chunks_and_one_loss():
    """The whole step at once, in three chunks of which two are computed again, against its pieces."""
    run = case("stage 2, bf16, three chunks before one loss")
    pieces = measure(run, alone(run), "cpu")
    resolved = resolve_model(run).config
    model = model_on_meta(run, resolved)
    with FakeTensorMode():
        make_fake(model)
        batches = [make_batch(batch_fields(run, resolved), run.micro_batch_size) for _ in range(3)]
        recorder = Recorder([*model.parameters(), *model.buffers()], [t for b in batches for t in b.values()])
        with recorder:
            loss = model(batches, {name: torch.ones(()) for name in model.objectives})["loss"]
            loss.backward()
    once, joined = pieces.encoding, pieces.joining
    expected = 5 * once.forward.flops + 3 * once.backward.flops + joined.forward.flops + joined.backward.flops
    assert recorder.work.flops == expected


def test_a_published_architecture_takes_its_known_flops():
    """Forward and backward of a pair at 77 words: open_clip's model_profile.csv, its backward twice its forward."""
    run = config("clip-vit-l14")
    model = model_on_meta(run, run.model)
    with FakeTensorMode():
        make_fake(model)
        encoding, _ = measure_encoding(model, make_batch(batch_fields(run, run.model), 2), "none")
    assert (encoding.forward.flops + encoding.backward.flops) / 2e9 == pytest.approx(526, rel=0.005)


@pytest.fixture(scope="module")
def allocated():
    """Bytes that real steps of all cases took, each case alone, in a fresh process."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("planning_cases.py")
    done = subprocess.run(
        [sys.executable, script, *CASES], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_real_steps_allocate(name, allocated):
    """Everything the allocator gave out: weights, masters, moments, gradients, buffers, inputs, activations, loss."""
    run = case(name)
    forecast = step_memory(measure(run, alone(run), "cpu"), setting_of(run, 1))
    assert forecast.total == pytest.approx(allocated[name], rel=0.1)


def test_matching_draws_negatives_from_all_ranks_in_a_plan():
    """Rows are chosen by values that a plan does not have."""
    run = config("demo", "objectives={itm: {kind: itm}}", "micro_batch_size=4", "global_batch_size=16")
    codecs = {name: codec for name, codec in run.data.codecs.items() if name != "answer"}
    data = run.data.model_copy(update={"codecs": codecs})
    run = run.model_copy(update={"objectives": {"itm": run.objectives["itm"]}, "data": data})
    workload = measure(run, BatchPlan(16, 4, World(0, 4)))
    sent = Counter(message.kind for message in Counter(workload.joining.collectives).elements())
    assert sent["broadcast"] == 2 * 3 * 4, "tokens, pooled vectors and masks of two sides, from each of 4 ranks"
    assert sent["reduce"] == 2 * 4, "and the gradients of tokens, which are what a joint fusion reads, back to each"


def test_bandwidth_runs_straight_between_measured_sizes_in_logarithms():
    bandwidth = Bandwidth((1e3, 1e5), (1e6, 1e8))
    assert bandwidth.at(1e3) == 1e6
    assert bandwidth.at(1e4) == pytest.approx(1e7)
    assert bandwidth.at(1e9) == 1e8
    assert 100 / bandwidth.at(100) == pytest.approx(1e3 / 1e6), "a smaller message takes as long as the smallest"


def test_an_all_reduce_crosses_each_link_twice_and_a_gather_once():
    network = Network(*(Bandwidth((1.0, 1e12), (1e9, 1e9)) for _ in range(3)))
    assert network.seconds(Collective("all_reduce", 1_000_000), 4) == pytest.approx(1.5e-3)
    assert network.seconds(Collective("all_gather", 1_000_000), 4) == pytest.approx(0.75e-3)
    assert network.seconds(Collective("all_reduce", 1_000_000), 1) == 0


def test_gradients_and_weights_travel_as_the_stage_says(demo):
    """Stage 1 and 2 sum gradients and gather weights; stage 3 scatters gradients and gathers weights once: they stay,
    as the model is smaller than what is reused soon."""
    run, workload = demo
    size = 4 * workload.parameters.trained
    expected = {
        0: {("gradients", "all_reduce"): size},
        1: {("gradients", "all_reduce"): size, ("weights", "all_gather"): size},
        2: {("gradients", "all_reduce"): size, ("weights", "all_gather"): size},
        3: {("gradients", "reduce_scatter"): size, ("weights", "all_gather"): size},
    }
    for stage, volumes in expected.items():
        sent = messages(workload, setting_of(run, 2, stage))
        found = {
            (each.purpose, each.collective.kind): each.count * each.collective.bytes
            for each in sent
            if each.purpose != "features"
        }
        assert found == volumes


def test_a_kernel_takes_the_longer_of_arithmetic_and_memory():
    rates = H100.rates
    product, copy = Operation("gemm", 10**12, 10**6, True), Operation("memory", 0, 29 * 10**8, False)
    expected = 2 * 1e12 / rates.gemm + 29e8 / rates.memory
    assert work_seconds(Work({product: 2, copy: 1}), rates) == pytest.approx(expected)


def test_samples_in_a_second_times_their_flops_are_the_mfu(demo):
    run, workload = demo
    plan = plan_of(run, workload, 2, H100)
    assert plan.mfu == pytest.approx(model_flops(workload) * plan.samples_per_s / 2 / H100.rates.peak)
    assert plan.gpu_hours == pytest.approx(run.steps * plan.time.total * 2 / 3600)
    assert plan.checkpoint_bytes == 12 * plan.parameters.trained, "a master and two moments of each parameter"
    averaged = plan_of(run.model_copy(update={"ema": AverageConfig()}), workload, 2, H100)
    assert averaged.checkpoint_bytes == 16 * plan.parameters.trained, "and its average"


def test_a_run_that_does_not_fit_is_told_what_each_change_would_take(demo):
    run, workload = demo
    full = step_memory(workload, setting_of(run, 2)).total
    small = replace(H100, memory=full - 1, reserved=0.0)
    plan = plan_of(run, workload, 2, small)
    assert not plan.chosen.fits
    told = {each.change.split("=")[0]: each for each in plan.advice}
    assert {"micro_batch_size", "engine.activation_checkpointing", "zero_stage", "engine.offload"} <= told.keys()
    bucket = told["engine.deepspeed.zero_optimization.reduce_bucket_size"]
    assert bucket.fits and bucket.bytes == pytest.approx(full - 4 * (500_000_000 - 50_000_000))
    assert all(each.fits == (each.bytes <= small.capacity) for each in plan.advice)
    smaller = told["micro_batch_size"]
    assert smaller.fits and smaller.seconds >= plan.time.total, "more chunks are computed again"


def test_the_largest_micro_batch_fits_and_the_next_does_not(demo):
    run, workload = demo
    two, three = (step_memory(workload, replace(setting_of(run, 2), micro=size)).total for size in (2, 3))
    between = replace(H100, memory=(two + three) / 2, reserved=0.0)
    assert plan_of(run, workload, 2, between).chosen.largest_micro_batch == 2


def test_gpus_that_cannot_share_a_batch_are_refused_with_what_to_change():
    run = config("clip-vit-l14")
    with pytest.raises(ConfigError, match=r"32768 cannot be shared by 24 GPUs.* --gpus 16 or 32, or .*=33792"):
        share_batch(run, 24)
    with pytest.raises(ConfigError, match=r"1024 GPUs holds 32 samples .* micro_batch_size 128 .*=32"):
        share_batch(run, 1024)


def test_an_unknown_gpu_is_refused_by_name():
    with pytest.raises(ConfigError, match="--gpu is 'b9000'; choose one of h100, h200, a100"):
        machine_named("b9000")


@pytest.mark.parametrize("name", ["finetune-lora", "finetune-retrieval"])
def test_a_plan_is_printed_for_a_model_of_which_a_part_learns(name):
    answer = CliRunner().invoke(app, ["plan", str(configs_folder() / f"{name}.yaml"), "--gpus", "2"])
    assert answer.exit_code == 0, answer.output
    for heading in ("Parameters", "that learn", "ZeRO 2 *", "GFLOP", "MFU", "GPU-hours", "cores that decode them"):
        assert heading in answer.output


def test_a_plan_for_programs_is_json(tmp_path):
    answer = CliRunner().invoke(
        app, ["plan", str(configs_folder() / "finetune-classify.yaml"), "--gpus", "2", "--gpu", "a100", "--json"]
    )
    plan = json.loads(answer.output)
    assert [fit["stage"] for fit in plan["stages"]] == [0, 1, 2, 3]
    assert plan["capacity"] / GIB == pytest.approx(76.6)
    assert plan["time"]["communication"].keys() == {"features", "gradients", "weights"}


def test_words_of_a_tokenizer_that_is_not_here_are_guessed_and_said():
    run = config("trimodal-base", "data.tokenizer.path=nobody/nothing")
    resolved = resolve_model(run)
    assert resolved.guessed == "nobody/nothing"
    assert resolve_model(config("clip-vit-b32", "data.tokenizer.path=nobody/nothing")).guessed is None
