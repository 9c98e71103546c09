"""The whole model: one loss from several objectives, the same in chunks, checkpointed, saved and loaded again."""

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError
from tiny_model import LENGTH, MODEL, build_model, rows_of
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from mmpretrain.core.errors import ConfigError
from mmpretrain.models.config import ModelConfig
from mmpretrain.models.multimodal import MultimodalConfig, MultimodalTransformer
from mmpretrain.objectives.infonce import InfoNCEConfig
from mmpretrain.objectives.mae import MAEConfig
from mmpretrain.objectives.mlm import MLMConfig

ITC = {"itc": InfoNCEConfig()}
EVERYTHING = ITC | {
    "mlm": MLMConfig(weight=0.5),
    "seen": MLMConfig(condition_on=("image",)),
    "mim": MAEConfig(weight=2.0, decoder_width=16, decoder_depth=1, decoder_heads=2),
}
LENGTHS = [14, 9, 7, 12, 14, 5, 8, 10]


def chunks_of(batch, number):
    pieces = {name: tensor.chunk(number) for name, tensor in batch.items()}
    return [{name: parts[index] for name, parts in pieces.items()} for index in range(number)]


def step(model, micro_batches):
    """Loss and gradients of one step of one process."""
    model.zero_grad()
    scales = {name: 1 / count for name, count in model.counts(micro_batches).items()}
    output = model(micro_batches, scales)
    output["loss"].backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def config_of(**changes):
    return ModelConfig.model_validate(MODEL | changes)


def test_the_loss_is_the_weighted_sum_of_every_objectives_mean():
    model, batch = build_model(EVERYTHING), rows_of(LENGTHS)
    counts, (output, _) = model.counts([batch]), step(model, [batch])
    weights = {"itc": 1.0, "mlm": 0.5, "seen": 1.0, "mim": 2.0}
    expected = sum(weights[name] * output[f"sum.{name}"] / counts[name] for name in weights)
    torch.testing.assert_close(output["loss"], expected)
    assert all(value.shape == () and value.dtype == torch.float32 for value in output.values())
    assert {"metric.logit_scale", "metric.mlm_acc", "metric.image_mlm_acc"} <= set(output)


def test_the_contrastive_loss_is_that_of_the_embeddings():
    model, batch = build_model(ITC), rows_of(LENGTHS)
    image, text = model.embed("image", batch["image"]), model.embed("text", batch["text"], batch["text.mask"])
    torch.testing.assert_close(image.norm(dim=1), torch.ones(8))
    logits, pairs = image @ text.T / 0.07, torch.arange(8)
    expected = (functional.cross_entropy(logits, pairs) + functional.cross_entropy(logits.T, pairs)) / 2
    torch.testing.assert_close(step(model, [batch])[0]["loss"], expected)


@pytest.mark.parametrize("number", [2, 4])
def test_a_batch_in_chunks_has_the_gradients_of_the_whole(number):
    model, batch = build_model(EVERYTHING).double(), rows_of(LENGTHS)
    whole, gradients = step(model, [batch])
    parts, chunked = step(model, chunks_of(batch, number))
    torch.testing.assert_close(parts["loss"], whole["loss"], atol=1e-10, rtol=1e-10)
    assert gradients.keys() == chunked.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked[name], gradient, atol=1e-10, rtol=1e-10, msg=name)


def test_only_the_last_chunk_keeps_what_its_layers_need():
    model, batch = build_model(ITC), rows_of(LENGTHS)

    def kept(micro_batches):
        sizes, seen = [], set()

        def count(tensor):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(micro_batches, {"itc": torch.tensor(1 / 8)})
        return sum(sizes)

    weights = sum(p.numel() for p in model.parameters())
    assert kept(chunks_of(batch, 4)) - weights < (kept([batch]) - weights) / 2


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("policy", ["block", "selective"])
def test_activation_checkpointing_changes_no_gradient(policy, chunks):
    model, batch = build_model(EVERYTHING), rows_of(LENGTHS)
    _, plain = step(model, chunks_of(batch, chunks))
    model.set_activation_checkpointing(policy)
    _, checkpointed = step(model, chunks_of(batch, chunks))
    assert all(torch.equal(checkpointed[name], gradient) for name, gradient in plain.items())
    model.set_activation_checkpointing("none")
    assert not any(block.gradient_checkpointing for block in model.towers["image"].transformer.blocks)


class Products(TorchDispatchMode):
    """Counts matrix products and norms."""

    def __init__(self):
        super().__init__()
        self.products = self.norms = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.products += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.norms += function is torch.ops.aten.native_layer_norm.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_selective_checkpointing_computes_norms_again_and_no_product(autocast):
    """Of each block's four products and two norms; "block" computes all again, and keeps less."""
    counted, kept = {}, {}
    for policy in ("none", "block", "selective"):
        model, sizes = build_model({}), []
        model.autocast_dtype = autocast
        model.set_activation_checkpointing(policy)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            embedded = model.embed("image", rows_of(LENGTHS)["image"])
        with Products() as backward:
            embedded.square().sum().backward()
        counted[policy], kept[policy] = (backward.products, backward.norms), sum(sizes)
    products, norms = counted["none"]
    assert norms == 0
    assert counted["block"][0] > products and counted["block"][1] == 4
    assert counted["selective"] == (products, 4)
    assert kept["block"] < kept["none"]


def test_bf16_keeps_parameters_losses_and_embeddings_in_fp32():
    model, batch = build_model(EVERYTHING), rows_of(LENGTHS)
    exact, _ = step(model, [batch])
    model.autocast_dtype = torch.bfloat16
    rounded, gradients = step(model, chunks_of(batch, 2))
    torch.testing.assert_close(rounded["loss"], exact["loss"], atol=0, rtol=2e-2)
    assert rounded["loss"] != exact["loss"]
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    embedding = model.embed("text", batch["text"], batch["text.mask"])
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(8))


def test_an_encoding_that_two_objectives_need_is_computed_once():
    model, batch, calls = build_model(EVERYTHING), rows_of(LENGTHS), []
    model.towers["image"].register_forward_hook(lambda *_: calls.append("image"))
    model.towers["text"].register_forward_hook(lambda *_: calls.append("text"))
    step(model, [batch])
    # The clean image serves itc and the conditioned mlm, mim sees a part of it; the two mlm mask texts differently.
    assert sorted(calls) == ["image"] * 2 + ["text"] * 3


def test_a_row_without_its_image_is_told_nothing_by_the_dummy():
    model, batch = build_model({}), rows_of(LENGTHS)
    batch["image.present"][0] = False

    def fused():
        encoder = model.encoder(batch)
        return encoder.fuse({"image": encoder.tower("image"), "text": encoder.tower("text")})["text"]

    before = fused()
    batch["image"] = batch["image"].flip(0)
    torch.testing.assert_close(fused()[0], before[0], atol=1e-6, rtol=0)
    assert (fused()[1] - before[1]).abs().max() > 1e-4


def test_a_saved_model_is_loaded_bit_by_bit(tmp_path):
    model, batch = build_model(EVERYTHING), rows_of(LENGTHS)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert list(model.state_dict()) == list(again.state_dict())
    for (name, ours), loaded in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, loaded), name
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in again.named_parameters()]
    assert torch.equal(step(model, [batch])[0]["loss"], step(again.train(), [batch])[0]["loss"])


def test_a_fresh_process_loads_the_model_without_training_code(tmp_path):
    model, batch = build_model(EVERYTHING), rows_of([LENGTH])
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch, mmpretrain.models.multimodal; from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path)!r})\n"
        f"batch = torch.load({str(tmp_path / 'batch.pt')!r})\n"
        f"torch.save(model.embed('image', batch['image']), {str(tmp_path / 'embedding.pt')!r})\n"
        "assert not {'deepspeed', 'mmpretrain.training', 'mmpretrain.config'} & set(sys.modules)\n"
    )
    torch.save(batch, tmp_path / "batch.pt")
    subprocess.run([sys.executable, "-c", script], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "embedding.pt"), model.embed("image", batch["image"]))


def test_what_a_checkpoint_lacks_is_initialised_and_nothing_else(tmp_path):
    old = build_model(ITC)
    old.save_pretrained(tmp_path)
    config = MultimodalConfig.from_pretrained(tmp_path)
    config.objectives = {name: each.model_dump(mode="json") for name, each in EVERYTHING.items()}
    torch.manual_seed(3)
    new = MultimodalTransformer.from_pretrained(tmp_path, config=config)
    state = new.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in old.state_dict().items())
    head = new.objectives["mlm"].head
    assert head.dense.weight.std().item() == pytest.approx(32**-0.5, rel=0.2)
    assert not head.dense.bias.any() and torch.equal(head.norm.weight, torch.ones(32))


def test_the_model_builds_on_the_meta_device():
    with torch.device("meta"):
        outline = MultimodalTransformer.create(config_of(), EVERYTHING)
    assert all(parameter.is_meta for parameter in outline.parameters())
    counted = sum(parameter.numel() for parameter in outline.parameters())
    assert counted == sum(parameter.numel() for parameter in build_model(EVERYTHING).parameters())


def test_no_parameter_is_out_of_the_reach_of_zero_3():
    """No scalars, and bare parameters only in modules without children, whose own forward uses them."""
    for name, module in build_model(EVERYTHING).named_modules():
        own = list(module.parameters(recurse=False))
        assert all(parameter.dim() > 0 for parameter in own), name
        assert not own or not list(module.children()), name


def test_the_order_of_a_config_does_not_change_the_model():
    backwards = {"towers": dict(reversed(MODEL["towers"].items()))}
    torch.manual_seed(7)
    other = MultimodalTransformer.create(config_of(**backwards), dict(reversed(EVERYTHING.items())))
    for (name, ours), (theirs, tensor) in zip(
        build_model(EVERYTHING).named_parameters(), other.named_parameters(), strict=True
    ):
        assert name == theirs and torch.equal(ours, tensor)


def test_a_model_knows_whether_its_loss_spans_the_batch():
    assert build_model(EVERYTHING).spans_batch
    assert not build_model({"mlm": MLMConfig()}).spans_batch


def test_an_embedding_without_projection_is_the_pooled_vector():
    image = MODEL["towers"]["image"] | {"projection": False}
    model = MultimodalTransformer.create(config_of(towers={"image": image}, fusion={"kind": "late"}), {})
    inputs = rows_of([1, 2])["image"]
    pooled = model.towers["image"](inputs)["pooled"]
    assert torch.equal(model.embed("image", inputs), functional.normalize(pooled, dim=-1))


def test_models_that_do_not_fit_together_are_refused():
    image = MODEL["towers"]["image"]
    with pytest.raises(ConfigError, match="width 32 must be embed_dim 16; set embed_dim to 32"):
        MultimodalTransformer.create(
            config_of(embed_dim=16, towers=MODEL["towers"] | {"image": image | {"projection": False}}), {}
        )
    with pytest.raises(ConfigError, match="objective itc needs the towers text, the model has image"):
        MultimodalTransformer.create(config_of(towers={"image": image}, fusion={"kind": "late"}), ITC)
    with pytest.raises(ConfigError, match=r"objective seen reads fused tokens, but model\.fusion\.kind is late"):
        MultimodalTransformer.create(config_of(fusion={"kind": "late"}), {"seen": EVERYTHING["seen"]})
    with pytest.raises(ConfigError, match="the model has towers .* and none for 'audio'"):
        build_model({}).embed("audio", torch.zeros(1))
    with pytest.raises(ConfigError, match=r"objectives\.x\.kind is 'other'; this version knows .*infonce, itm, mae"):
        MultimodalConfig(model=MODEL, objectives={"x": {"kind": "other"}}).parsed_objectives()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers": {}}, "at least one tower"),
        ({"towers": {"image": MODEL["towers"]["image"]}}, r"set fusion\.kind to late"),
        ({"towers": {"text": MODEL["towers"]["image"]}}, "tower 'text' has a stem for 'image'"),
    ],
)
def test_a_model_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        config_of(**changes)
