"""Towers around transformers' encoders of images, videos and sound, against the library's models and extractors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny_encoders import EXTRACTORS, save_encoders
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ASTFeatureExtractor, AutoModel, ClapFeatureExtractor, PreTrainedModel, Wav2Vec2FeatureExtractor

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.types import FieldSpec, TokenizerFacts
from mmpretrain.models.config import ModelConfig, resolve
from mmpretrain.models.flops import training_flops
from mmpretrain.models.hf_sound import LogMelConfig, build_sound, read_sound, sound_field
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.infonce import InfoNCEConfig

TOKENIZER = TokenizerFacts(vocab_size=60, pad_id=1, eos_id=2, mask_id=3, special_ids=(0, 1, 2, 3))
VIDEOS = ("videomae", "vivit", "timesformer")
SOUNDS = tuple(EXTRACTORS)
POOLING = {"dino": "class", "vivit": "class", "timesformer": "class", "ast": "pooler", "clap": "pooler"}
MODALITY = {"dino": "image"} | dict.fromkeys(VIDEOS, "video") | dict.fromkeys(SOUNDS, "audio")
Models = dict[str, MultimodalTransformer]
EVERY = pytest.mark.parametrize("name", MODALITY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    save_encoders(root)
    return root


@pytest.fixture(scope="module")
def built(folders: Path) -> Models:
    """Each encoder as the one tower of a model, for tests that leave it as it is."""
    return {name: build(name, folders) for name in MODALITY}


def tower_of(name: str, folders: Path, **options: object) -> dict[str, object]:
    seconds = {"seconds": 0.1} if name in ("wav2vec2", "wav2vec2_layer", "hubert") else {}
    pooling = POOLING.get(name, "mean")
    return {"kind": "hf_auto", "name": str(folders / name), "pooling": pooling} | seconds | options


def build(name: str, folders: Path, **options: object) -> MultimodalTransformer:
    config = ModelConfig.model_validate(
        {"embed_dim": 8, "towers": {MODALITY[name]: tower_of(name, folders, **options)}}
    )
    return MultimodalTransformer.create(resolve(config, None), {})


def theirs(name: str, folders: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_pretrained(folders / name).eval()
    return model.audio_model if name.startswith("clap") else model


def rows_for(model: MultimodalTransformer) -> Tensor:
    """Two rows as the batch holds them."""
    (field,) = model.config.parsed_model().inputs.values()
    draw = np.random.default_rng(0)
    low, high = (-20_000, 20_000) if field.dtype == "int16" else (0, 256)
    return torch.from_numpy(draw.integers(low, high, (2, *field.shape)).astype(field.dtype))


def padded(samples: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The second row ends after so many blocks of 10 ms."""
    mask = torch.ones(2, -(-samples.shape[1] // 160), dtype=torch.bool)
    mask[1, blocks:] = False
    short = samples.clone()
    short[1, blocks * 160 :] = 0
    return short, mask


def waves(samples: Tensor) -> list[np.ndarray]:
    return [row.numpy().astype(np.float32) / 32768 for row in samples]


@pytest.mark.parametrize("name", ["dino", *VIDEOS])
def test_a_tower_of_pixels_computes_what_its_library_computes(name: str, folders: Path, built: Models) -> None:
    model = built[name]
    pixels = rows_for(model)
    expected = theirs(name, folders)(pixel_values=(pixels / 255 - 0.5) / 0.5).last_hidden_state
    tower = model.towers[MODALITY[name]]
    found = tower(pixels)
    torch.testing.assert_close(found["tokens"], expected, atol=1e-4, rtol=1e-4)
    facts = tower.facts()
    assert found["tokens"].shape[1:] == (facts.num_prefix + facts.num_tokens, facts.width)
    pooled = expected[:, 0] if POOLING.get(name) else expected.mean(dim=1)
    torch.testing.assert_close(found["pooled"], pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "prefix", "content"),
    [("dino", 3, 4), ("videomae", 0, 8), ("vivit", 1, 8), ("timesformer", 1, 16), ("ast", 2, 10), ("clap", 0, 64)],
)
def test_class_and_register_tokens_are_told_from_content(name: str, prefix: int, content: int, built: Models) -> None:
    facts = built[name].towers[MODALITY[name]].facts()
    assert (facts.num_prefix, facts.num_tokens) == (prefix, content)


@pytest.mark.parametrize("name", SOUNDS)
def test_a_tower_of_sound_computes_what_its_library_computes(name: str, folders: Path, built: Models) -> None:
    model, extractor = built[name], EXTRACTORS[name]
    samples = rows_for(model)
    options = {"padding": "max_length", "max_length": samples.shape[1]} if "seconds" in tower_of(name, folders) else {}
    prepared = dict(extractor(waves(samples), sampling_rate=16_000, return_tensors="pt", **options))
    if "is_longer" in prepared:
        prepared["is_longer"] = torch.zeros(2, 1, dtype=torch.bool)
    expected = theirs(name, folders)(**prepared)
    mask = torch.ones(2, -(-samples.shape[1] // 160), dtype=torch.bool)
    found = model.towers["audio"](samples, mask)
    hidden = expected.last_hidden_state
    hidden = hidden if hidden.dim() == 3 else hidden.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found["tokens"], hidden, atol=1e-4, rtol=1e-4)
    pooled = hidden.mean(dim=1) if POOLING.get(name) is None else expected.pooler_output
    torch.testing.assert_close(found["pooled"], pooled, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["wav2vec2_layer", "hubert"])
def test_padding_of_a_waveform_changes_nothing(name: str, folders: Path, built: Models) -> None:
    model = built[name]
    samples, mask = padded(rows_for(model), 6)
    whole = samples.clone()
    whole[1, 960:] = 9000
    found = model.towers["audio"](samples, mask)
    torch.testing.assert_close(model.embed("audio", whole, mask), model.embed("audio", samples, mask))
    batch = [samples[0].numpy() / 32768, samples[1, :960].numpy() / 32768]
    prepared = EXTRACTORS[name](batch, sampling_rate=16_000, padding=True, return_tensors="pt")
    assert prepared["input_values"].shape == samples.shape
    expected = theirs(name, folders)(**prepared.to(torch.float32)).last_hidden_state
    counts = found["mask"]
    assert counts.sum(dim=1).tolist() == [expected.shape[1], ((960 - 10) // 8 + 1 - 4) // 4 + 1]
    torch.testing.assert_close(found["tokens"][counts], expected[counts], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["pooled"][1], expected[1][counts[1]].mean(dim=0), atol=1e-4, rtol=1e-4)


def test_a_recording_without_a_sound_stays_finite(built: Models) -> None:
    for name in SOUNDS:
        model = built[name]
        samples, mask = torch.zeros_like(rows_for(model)), torch.zeros(2, 200, dtype=torch.bool)
        output = model.towers["audio"](samples, mask[:, : -(-samples.shape[1] // 160)])
        assert torch.isfinite(output["tokens"]).all() and torch.isfinite(output["pooled"]).all()


@pytest.mark.parametrize(
    "extractor",
    [
        ASTFeatureExtractor(),
        ASTFeatureExtractor(do_normalize=False, num_mel_bins=64, max_length=100),
        ClapFeatureExtractor(truncation="fusion"),
        ClapFeatureExtractor(truncation="rand_trunc", padding="pad"),
        Wav2Vec2FeatureExtractor(return_attention_mask=True),
        Wav2Vec2FeatureExtractor(),
    ],
    ids=["ast", "ast-raw", "clap-fused", "clap", "waves-masked", "waves"],
)
def test_features_are_those_of_the_extractor(extractor: object, folders: Path, tmp_path: Path) -> None:
    """At the sizes published models use; the second recording is shorter."""
    extractor.save_pretrained(tmp_path)
    encoder = theirs("wav2vec2", folders).config
    sound = read_sound(str(tmp_path), encoder, required=True)
    field = sound_field(sound, 1.0 if sound.kind == "waveform" else None)
    inputs = build_sound(sound, "features", encoder, field.shape[0])
    block, blocks = field.rate // 100, 60
    draw, times = np.random.default_rng(0), np.arange(field.shape[0]) / field.rate
    tones = 0.3 * np.sin(2 * np.pi * (200 + 300 * times) * times) + draw.normal(0, 0.02, (2, field.shape[0]))
    samples = (tones * 32768).astype(np.int16)
    counts = np.arange(-(-field.shape[0] // block)) < np.array([[10**6], [blocks]])
    whole, short = (samples[row] / np.float32(32768) for row in range(2))
    short = short[: blocks * block]
    if isinstance(extractor, ClapFeatureExtractor) and extractor.padding == "repeatpad":
        repeated = np.tile(samples[1, : len(short)], field.shape[0] // len(short))
        samples[1] = np.pad(repeated, (0, field.shape[0] - len(repeated)))
    else:
        samples[1, len(short) :] = 0
    fixed = {"padding": "max_length", "max_length": field.shape[0]} if sound.kind == "waveform" else {}
    expected = extractor([whole, short], sampling_rate=field.rate, return_tensors="pt", **fixed)
    (name,) = {"input_values", "input_features"} & set(expected)
    found = inputs(torch.from_numpy(samples), torch.from_numpy(counts))
    ours = found.get("features", found.get("input_values"))
    theirs_ = expected[name] if expected[name].dim() == ours.dim() else expected[name][:, None]
    np.testing.assert_allclose(ours.numpy(), theirs_[:, :1].numpy() if ours.dim() == 4 else theirs_.numpy(), atol=1e-4)
    if "attention_mask" in expected:
        assert torch.equal(found["attention_mask"], expected["attention_mask"].long())


@EVERY
def test_nothing_is_left_to_chance_and_rows_do_not_depend_on_each_other(name: str, built: Models) -> None:
    model = built[name].train()
    rows = rows_for(model)
    tower = model.towers[MODALITY[name]]
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in tower.modules())
    before, again = tower(rows)["tokens"], tower(rows)["tokens"]
    assert torch.equal(before, again)
    torch.testing.assert_close(tower(rows[:1])["tokens"], before[:1], atol=1e-4, rtol=1e-4)


def test_flops_counted_without_storage_are_those_of_real_rows(folders: Path) -> None:
    """Of VideoMAE, whose positions are neither a parameter nor a buffer."""
    stem = {"kind": "embeddings", "context_length": 8, "vocab_size": 60}
    text = {"kind": "native", "stem": stem, "width": 8, "depth": 1, "heads": 2, "pooling": "mean"}
    towers = {"video": tower_of("videomae", folders), "text": text}
    config = resolve(ModelConfig.model_validate({"embed_dim": 8, "towers": towers}), None)
    objectives = {"itc": InfoNCEConfig(pairs=(("video", "text"),))}
    present = FieldSpec((), "bool")
    fields = config.inputs | dict.fromkeys((f"{modality}.present" for modality in towers), present)
    fields |= {"text.mask": FieldSpec((8,), "bool")}
    rows = {field: torch.ones((2, *spec.shape), dtype=getattr(torch, spec.dtype)) for field, spec in fields.items()}
    model = MultimodalTransformer.create(config, objectives)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        parts = [part for part in model.encode(rows).values() if part.requires_grad]
        torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])
    with torch.device("meta"):
        stored_nowhere = MultimodalTransformer.create(config, objectives)
    assert 2 * training_flops(stored_nowhere, fields) == counter.get_total_flops()


@EVERY
def test_every_used_weight_learns_and_checkpointing_changes_no_gradient(name: str, built: Models) -> None:
    model = built[name].train()
    rows, gradients, kept = rows_for(model), [], []
    for policy in ("none", "block"):
        model.set_activation_checkpointing(policy)
        model.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            output = model.towers[MODALITY[name]](rows)
        (output["tokens"].square().mean() + output["pooled"].square().mean()).backward()
        gradients.append({n: p.grad for n, p in model.towers.named_parameters() if p.grad is not None})
        kept.append(sum(sizes))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[1][n], g, atol=1e-6, rtol=1e-5) for n, g in gradients[0].items())
    assert kept[1] < kept[0] * 0.8
    idle = {n for n, _ in model.towers.named_parameters()} - gradients[0].keys()
    assert all("pooler" in n or "mask_token" in n for n in idle), idle


@EVERY
def test_a_tower_lives_on_without_the_folder_it_came_from(
    name: str, folders: Path, built: Models, tmp_path: Path
) -> None:
    model = built[name]
    away = tmp_path / "away"
    model.save_pretrained(tmp_path / "saved")
    (folders / name).rename(away)
    try:
        again = MultimodalTransformer.from_pretrained(tmp_path / "saved")
    finally:
        away.rename(folders / name)
    modality, rows = MODALITY[name], rows_for(model)
    assert torch.equal(model.embed(modality, rows), again.embed(modality, rows))


def test_the_text_half_of_clap_reads_as_its_library_does(folders: Path) -> None:
    text = {"kind": "hf_auto", "name": str(folders / "clap"), "context_length": 14, "pooling": "pooler"}
    config = resolve(ModelConfig.model_validate({"embed_dim": 8, "towers": {"text": text}}), TOKENIZER)
    model = MultimodalTransformer.create(config, {})
    ids = torch.randint(4, 60, (3, 14), generator=torch.Generator().manual_seed(0))
    ids[1, 6:] = 1
    mask = ids != 1
    expected = AutoModel.from_pretrained(folders / "clap").eval().text_model(input_ids=ids, attention_mask=mask.long())
    found = model.towers["text"](ids, mask)
    torch.testing.assert_close(found["tokens"][mask], expected.last_hidden_state[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["pooled"], expected.pooler_output, atol=1e-4, rtol=1e-4)
    assert model.towers["text"].facts().causal is False


def test_audio_towers_declare_rate_and_length(built: Models) -> None:
    for name, samples in (("ast", 63 * 160 + 400), ("clap", 16_000), ("wav2vec2", 1600)):
        assert built[name].config.parsed_model().inputs == {"audio": FieldSpec((samples,), "int16", 16_000)}


def test_an_architecture_alone_needs_no_preprocessor_file(folders: Path, tmp_path: Path) -> None:
    for name in SOUNDS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((folders / name / "config.json").read_bytes())
        options = tower_of(name, tmp_path, pretrained=False)
        sound = ModelConfig.model_validate({"towers": {"audio": options}}).towers["audio"].resolve("audio", None).sound
        assert isinstance(sound, LogMelConfig) is (name in ("ast", "clap", "clap_fused"))
        with pytest.raises(ConfigError, match="does not say how its sound is prepared"):
            build(name, tmp_path)


def test_towers_that_do_not_fit_are_refused(folders: Path) -> None:
    with pytest.raises(ConfigError, match="puts no class token before its 8 tokens; set the tower's pooling to mean"):
        build("videomae", folders, pooling="class")
    with pytest.raises(ConfigError, match="has no pooled output of its own"):
        build("videomae", folders, pooling="pooler")
    with pytest.raises(ConfigError, match="reads 64 frames of 0.01 s, which fixes the length .* remove seconds"):
        build("ast", folders, seconds=2.0)
    with pytest.raises(ConfigError, match="dino reads images and no videos .* put it into a tower of kind frames"):
        ModelConfig.model_validate({"towers": {"video": tower_of("dino", folders)}}).towers["video"].build("video")
    text = {"kind": "hf_auto", "name": str(folders / "clap"), "context_length": 15}
    with pytest.raises(ConfigError, match="context_length 15 is longer than the 14 positions"):
        MultimodalTransformer.create(ModelConfig.model_validate({"towers": {"text": text}}), {})
    with pytest.raises(ValidationError, match="a tower of kind hf_auto reads image, text, video, audio, not 'smell'"):
        ModelConfig.model_validate({"towers": {"smell": tower_of("dino", folders)}})
