"""The whole run config: the files under configs/, the rules that span parts, and the saved form."""

from pathlib import Path

import pytest
import torch

from mmpretrain.config import RunConfig, configs_folder, load_run_config
from mmpretrain.core.config import config_hash, dump_yaml, parse_config
from mmpretrain.core.errors import ConfigError
from mmpretrain.models.multimodal import MultimodalTransformer

COMPLETE = (
    "demo",
    "gate",
    "chaos",
    "flickr1k",
    "flickr1k-trimodal",
    "clip-vit-b32",
    "clip-vit-b16",
    "clip-vit-l14",
    "siglip-vit-b16",
    "flava-base",
    "coca-base",
    "clap-base",
    "video-text-base",
    "trimodal-base",
    "fourmodal-base",
    "finetune-classify",
    "finetune-lora",
    "finetune-retrieval",
)
DEMO = configs_folder() / "demo.yaml"
NO_ANSWER = (
    "objectives.answer=null",
    "data.codecs.answer=null",
    "evaluation.tasks.answers=null",
    "evaluation.tasks.heldout_answers=null",
)


def fault(*overrides: str, run: str = "demo") -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(configs_folder() / f"{run}.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", COMPLETE)
def test_a_complete_run_loads_and_its_saved_form_reads_back_equal(name: str, tmp_path: Path) -> None:
    run = load_run_config(configs_folder() / f"{name}.yaml")
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(run))
    assert parse_config(RunConfig, saved.read_text(), "config.yaml") == run
    assert load_run_config(saved) == run
    assert config_hash(load_run_config(saved)) == config_hash(run)


def test_every_run_file_is_in_the_list() -> None:
    assert {path.stem for path in configs_folder().glob("*.yaml")} == set(COMPLETE)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("clip-vit-b32", 151_277_313),
        ("clip-vit-b16", 149_620_737),
        ("clip-vit-l14", 427_616_513),
        ("siglip-vit-b16", 203_155_970),
    ],
)
def test_a_published_model_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    run = load_run_config(configs_folder() / f"{name}.yaml")
    with torch.device("meta"):
        model = MultimodalTransformer.create(run.model, run.objectives)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("size", ["tiny", "base", "large", "huge"])
@pytest.mark.parametrize("engine", ["zero3", "offload"])
def test_fragments_serve_a_run_file_anywhere(size: str, engine: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"defaults: [model/{size}, data/image-text, engine/{engine}]\n"
        "output: out\nsteps: 200\nglobal_batch_size: 8\nmicro_batch_size: 8\n"
        "objectives: {mmm: {kind: mlm, condition_on: [image]}}\n"
        "data: {train: {sources: {main: {shards: [shards]}}}}\n"
    )
    run = load_run_config(path)
    assert run.engine.activation_checkpointing == "block"
    assert run.data.workers == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["global_batch_size=100", "micro_batch_size=64"],
            "micro_batch_size=64: global_batch_size 100 is not a multiple of micro_batch_size 64; use",
        ),
        (["micro_batch_size=48"], "micro_batch_size=48: global_batch_size 64 is not a multiple of micro_batch_size 48"),
        (["steps=20"], "schedule.warmup: the warmup of 50 steps is longer than the run of 20; lower schedule.warmup"),
        (
            ["steps=20", "schedule.unit=samples", "schedule.warmup=1281"],
            "the warmup of 21 steps is longer than",
        ),
        (["checkpoint.every=0"], "checkpoint.every=0: saw 0 (number), expected greater than 0"),
        (
            ["checkpoint.every=200", "checkpoint.keep_every=300"],
            "300 is not a multiple of checkpoint.every 200, so some would never be",
        ),
        (
            ["checkpoint.keep_best={metric: val/x, mode: max}", "evaluation.every=0"],
            "of evaluation.every 0 and checkpoint.every 300 follows that what is measured is not what is saved; set",
        ),
        (
            [
                "checkpoint={every: 4, keep_best: {metric: val/x, mode: max}}",
                "evaluation={every: 6, tasks: {retrieval: {kind: retrieval}}}",
            ],
            "of evaluation.every 6 and checkpoint.every 4 follows that what is measured is not what is saved; set",
        ),
        (["checkpoint.keep_best={metric: train/loss, mode: least}"], "saw 'least' (text), expected 'max' or 'min'"),
        (["checkpoint.upload=runs/copies"], "'runs/copies' is no folder of an object store (s3://, gs://, gcs://); wr"),
        (["checkpoint.upload=https://host/x"], "'https://host/x' is no folder of an object store"),
        (["checkpoint.upload=s3://key:word@bucket/x"], "names credentials, which every copy of the config shows"),
        (["optimizer.betas=[0.9, 1.0]"], "saw [0.9, 1.0], expected two numbers from 0 to below 1"),
        (["schedule={kind: constant, final_fraction: 0.5}"], "a constant schedule does not decay; remove it or use"),
        (
            ["objectives.itc.pairs=[[image, sound]]"],
            "objectives.itc: needs the tower sound, the model has image, video",
        ),
        (["model.fusion={kind: late}"], "objectives.mlm: reads fused tokens, but model.fusion.kind is late; set it to"),
        (
            ["objectives.mlm.condition_on=[]", *NO_ANSWER],
            "model.fusion: no objective reads what is fused, so it would never learn",
        ),
        (["objectives.max_rank={kind: infonce}"], "the name becomes a metric; use lower-case letters, digits and _"),
        (["objectives.I-T={kind: infonce}"], "the name becomes a metric; use lower-case letters, digits and _"),
        (["objectives.itc.kind=infonc"], "objectives.itc: saw kind 'infonc', expected "),
        (["data.codecs.image.kind=text"], "data.codecs.image: decodes text; set its kind to image"),
        (
            ["evaluation.every=350", "evaluation.tasks=null"],
            "evaluation.every=350: saw 350, but there are no evaluation.tasks to run; add one or",
        ),
        (["evaluation.tasks.sound={kind: retrieval, pair: [sound, text]}"], ": needs the tower sound, the model has"),
        (
            ["evaluation.tasks={retrieval: null, a: {kind: retrieval}, b: {kind: retrieval}}"],
            ": evaluation.tasks.b: its figures have the names of those of a; give it another prefix",
        ),
        (
            ["evaluation.tasks={retrieval: null, a: {kind: retrieval, pairs: all}, b: {kind: retrieval}}"],
            ": evaluation.tasks.b: its figures have the names of those of a; give it another prefix",
        ),
        (
            ["evaluation.tasks.held={kind: losses, objectives: [mim2]}"],
            ": names the objective mim2, the run has",
        ),
        (["tracking.trackers=[{kind: jsonl}, {kind: jsonl}]"], "tracking.trackers.1: a second tracker of kind jsonl"),
        (["zero_stage=0", "precision=fp16"], "fp16 scales its loss in a partitioned optimizer; set zero_stage to 1"),
        (["zero_stage=0", "engine.offload=optimizer"], "moves a partitioned optimizer; set zero_stage to 1 or more"),
        (["zero_stage=true"], "zero_stage=true: saw True (boolean), expected an integer"),
        (["zero_stage=4"], "zero_stage=4: saw 4 (number), expected less than or equal to 3"),
        (
            ["precision=bf61"],
            "precision=bf61: saw 'bf61' (text), expected 'fp32', 'bf16' or 'fp16'; did you mean bf16",
        ),
        (["tokenizer=x"], "tokenizer=x: unknown key; did you mean data.tokenizer?"),
    ],
)
def test_a_rule_that_spans_parts_names_its_key_and_its_fix(overrides: list[str], message: str) -> None:
    assert message in fault(*overrides)


def test_a_codec_and_a_tower_belong_together(tmp_path: Path) -> None:
    surplus = fault("data.codecs.sound.kind=text")
    assert "no tower sound and no objective reads it; remove the codec or add model.towers.sound" in surplus
    path = tmp_path / "run.yaml"
    path.write_text(
        "defaults: [model/tiny]\noutput: out\nsteps: 200\nglobal_batch_size: 8\nmicro_batch_size: 8\n"
        "objectives: {mmm: {kind: mlm, condition_on: [image]}}\n"
        "data: {train: {sources: {main: {shards: [shards]}}}, codecs: {image: {kind: image}}}\n"
    )
    with pytest.raises(ConfigError, match="run.yaml:7: data.codecs: has no codec for the tower text; add text: {kind"):
        load_run_config(path)


def test_a_run_without_objectives_is_refused() -> None:
    gone = ("objectives.itc=null", "objectives.mlm=null", "objectives.mim=null", "evaluation.tasks.words=null")
    message = fault(*gone, *NO_ANSWER, "model.fusion={kind: late}")
    assert "objectives: there is nothing to learn; add one, e.g. itc: {kind: infonce}" in message


def test_offered_fixes_are_accepted() -> None:
    assert load_run_config(DEMO, ["global_batch_size=100", "micro_batch_size=50"]).global_batch_size == 100
    assert "use e.g. micro_batch_size=50" in fault("global_batch_size=100", "micro_batch_size=64")


def labelled(objective: str, codecs: str, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "defaults: [model/tiny]\noutput: out\nsteps: 200\nglobal_batch_size: 8\nmicro_batch_size: 8\n"
        f"objectives: {{colour: {{kind: supervised, outputs: 3, inputs: [image, text], {objective}}}}}\n"
        "data: {train: {sources: {main: {shards: [shards]}}}, "
        f"codecs: {{image: {{kind: image}}, text: {{kind: text}}{codecs}}}}}\n"
    )
    return path


def test_an_objective_may_ask_for_a_label_that_no_tower_reads(tmp_path: Path) -> None:
    run = load_run_config(labelled("label: hue", ", hue: {kind: label, field: hue, key: colour}", tmp_path))
    fields = run.data.codecs["hue"].codec(run.objectives["colour"].input_fields, None).fields
    assert {name: (spec.shape, spec.dtype) for name, spec in fields.items()} == {
        "hue": ((), "int64"),
        "hue.present": ((), "bool"),
    }


@pytest.mark.parametrize(
    ("objective", "codecs", "message"),
    [
        ("label: hue", "", "has no codec for the label hue; add hue: {kind: label, field: hue}"),
        ("label: hue", ", hue: {kind: label}", "data.codecs.hue: is to make the label hue; write hue: {kind: label"),
        ("label: label", ", label: {kind: text}", "data.codecs.label: is to make the label label; write label: {kind"),
        ("label: image", "", "reads image as a label, but that is a tower's input; name the label otherwise"),
        ("label: label", ", label: {kind: label}, hue: {kind: label, field: hue}", "no tower hue and no objective"),
        (
            "label: label}, tags: {kind: supervised, outputs: 4, target: tags, label: label",
            ", label: {kind: label}",
            "objectives.tags: reads label in another form than an objective before it",
        ),
    ],
)
def test_labels_and_their_codecs_belong_together(objective: str, codecs: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(labelled(objective, codecs, tmp_path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("{prescale_gradients: true}", "saw True; the loss is already scaled by the ranks.*remove it"),
        ("{gradient_predivide_factor: 2}", "saw 2; the loss is already scaled by the ranks"),
        ("{managed_gradient_accumulation: false}", "saw False; without it every micro-batch would move the weights"),
        ("{zero_optimization: {round_robin_gradients: true}}", "checkpoints would hold the weights in a wrong order"),
        ("{zero_optimization: {compute_grad_norm: false}}", "a step that is not finite goes unnoticed"),
    ],
)
def test_options_of_deepspeed_that_make_gradients_or_weights_wrong_are_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(configs_folder() / "demo.yaml", [f"engine.deepspeed={option}"])


def test_options_of_deepspeed_at_a_harmless_value_pass() -> None:
    options = "{gradient_predivide_factor: 1.0, zero_optimization: {round_robin_gradients: false, overlap_comm: true}}"
    run = load_run_config(configs_folder() / "demo.yaml", [f"engine.deepspeed={options}"])
    assert run.engine.deepspeed["gradient_predivide_factor"] == 1


def test_an_average_forgets_the_first_weights_soon_and_then_keeps_its_share() -> None:
    average = load_run_config(DEMO, ["ema={decay: 0.9}"]).ema
    assert average is not None
    assert [average.decay_at(step) for step in (1, 10, 1000)] == pytest.approx([2 / 11, 11 / 20, 0.9])
    steady = load_run_config(DEMO, ["ema={decay: 0.9, warmup: false}"]).ema
    assert steady is not None and steady.decay_at(1) == 0.9
    assert "ema.decay" in fault("ema={decay: 1.0}")
