"""Masked language modelling: which tokens are hidden, what replaces them, what the loss sees."""

import math

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare
from tiny_model import BOS, EOS, LENGTH, MASK, PAD, SPECIALS, VOCABULARY, build_model, rows_of
from torch import Tensor
from torch.nn import functional

from mmpretrain.core.errors import ConfigError
from mmpretrain.core.seeding import row_key
from mmpretrain.layers.token_masking import TokenMasking
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.objectives.base import ModelFacts, TowerFacts
from mmpretrain.objectives.mlm import MaskedLanguageModelling, MLMConfig

MASKING = TokenMasking(0.15, MASK, VOCABULARY, SPECIALS, "test")
WORDS = TowerFacts(width=8, num_tokens=LENGTH, num_prefix=0, vocab_size=VOCABULARY, special_ids=SPECIALS, mask_id=MASK)


def keys(rows: int) -> Tensor:
    return torch.tensor([row_key(3, position) for position in range(rows)])


def objective_of(model: MultimodalTransformer) -> MaskedLanguageModelling:
    found = model.objectives["mlm"]
    assert isinstance(found, MaskedLanguageModelling)
    return found


def encode(model: MultimodalTransformer, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return objective_of(model).encode(model.encoder(rows))


def test_hidden_tokens_become_mask_random_or_stay_in_8_1_1_shares() -> None:
    """20,000 hidden tokens whose original, 5, a random draw hits once in 59."""
    ids = torch.full((2000, 67), 5)
    masked = MASKING(ids, torch.ones_like(ids, dtype=torch.bool), keys(2000))
    after = masked.ids.gather(1, masked.positions)[masked.weights.bool()]
    assert after.shape == (20_000,)
    stayed, hidden = (after == 5).sum().item(), (after == MASK).sum().item()
    counts = [hidden, stayed, after.numel() - hidden - stayed]
    expected = [16_000, 2_000 + 2_000 / 59, 2_000 * 58 / 59]
    assert chisquare(counts, expected).pvalue > 0.001


def test_random_replacements_are_even_over_ordinary_tokens_and_never_special() -> None:
    ids = torch.full((4000, 67), 5)
    masked = MASKING(ids, torch.ones_like(ids, dtype=torch.bool), keys(4000))
    after = masked.ids.gather(1, masked.positions)
    others = torch.bincount(after[(after != MASK) & (after != 5)], minlength=VOCABULARY)
    assert others[list(SPECIALS)].sum() == 0
    ordinary = [token for token in range(VOCABULARY) if token not in SPECIALS and token != 5]
    assert chisquare(others[ordinary].numpy()).pvalue > 0.001


def test_every_position_is_hidden_equally_often() -> None:
    ids = torch.full((4000, 20), 5)
    masked = MASKING(ids, torch.ones_like(ids, dtype=torch.bool), keys(4000))
    assert chisquare(torch.bincount(masked.positions.flatten(), minlength=20).numpy()).pvalue > 0.001


@pytest.mark.parametrize(("ordinary", "hidden"), [(0, 0), (1, 1), (3, 1), (9, 1), (10, 2), (13, 2)])
def test_a_row_hides_its_share_rounded_and_at_least_one(ordinary: int, hidden: int) -> None:
    ids = torch.full((1, LENGTH), 5)
    eligible = torch.arange(LENGTH)[None] < ordinary
    masked = MASKING(ids, eligible, keys(1))
    assert MASKING.num_hidden(eligible).tolist() == [hidden]
    assert masked.weights.sum().item() == hidden
    assert eligible.gather(1, masked.positions)[masked.weights.bool()].all()


def test_special_tokens_and_padding_are_never_hidden() -> None:
    ids = torch.tensor([[BOS, 10, 11, 62, 12, EOS, PAD, PAD]]).repeat(500, 1)
    eligible = MASKING.eligible(ids, (ids != PAD))
    assert eligible[0].tolist() == [False, True, True, False, True, False, False, False]
    masked = MASKING(ids, eligible, keys(500))
    changed = masked.ids != ids
    assert changed[:, [1, 2, 4]].any(0).all()
    assert not changed[:, [0, 3, 5, 6, 7]].any()


def test_masking_follows_from_the_row_key_alone() -> None:
    ids, draw = rows_of([12, 9, 13, 5])["text"], keys(4)
    eligible = MASKING.eligible(ids, ids != PAD)
    whole = MASKING(ids, eligible, draw)
    for row in range(4):
        alone = MASKING(ids[row : row + 1], eligible[row : row + 1], draw[row : row + 1])
        assert torch.equal(alone.ids[0], whole.ids[row])
    assert not torch.equal(MASKING(ids, eligible, draw + 1).ids, whole.ids)


def test_conditioned_and_plain_objectives_hide_different_tokens() -> None:
    ids = torch.full((64, LENGTH), 5)
    plain, conditioned = (MLMConfig(condition_on=on).masking(WORDS) for on in ((), ("image",)))
    chosen = [masking(ids, ids == 5, keys(64)).positions for masking in (plain, conditioned)]
    assert not torch.equal(*chosen)


def test_sum_equals_cross_entropy_of_the_full_vocabulary_logits_at_the_hidden_positions() -> None:
    model, rows = build_model({"mlm": MLMConfig(probability=0.4)}), rows_of([14, 9, 4])
    objective = objective_of(model)
    masked = objective.masking(rows["text"], rows["text.mask"], rows["draw"])
    tokens = model.encoder(rows).tower("text", ids=masked.ids)["tokens"]
    embedding = model.get_parameter("towers.text.stem.words.weight")
    logits = objective.head(tokens) @ embedding.T + objective.bias.weight
    labels = torch.full_like(rows["text"], -100)
    for row in range(3):
        used = masked.positions[row][masked.weights[row].bool()]
        labels[row, used] = rows["text"][row, used]
    expected = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
    parts = objective.encode(model.encoder(rows))
    torch.testing.assert_close(parts["sum"].sum(), expected)
    right = (logits.argmax(-1) == labels).sum().item()
    assert parts["correct"].item() == right
    assert parts["count"].item() == objective.count(rows).item() == 6 + 4 + 2
    assert objective.metrics(parts)["mlm_acc"].item() == pytest.approx(right / 12)


def test_loss_starts_near_the_logarithm_of_the_vocabulary() -> None:
    model, rows = build_model({"mlm": MLMConfig()}), rows_of([14] * 32)
    loss = encode(model, rows)["sum"].item() / objective_of(model).count(rows).item()
    assert loss == pytest.approx(math.log(VOCABULARY), abs=0.2)


def test_tokens_that_are_not_hidden_give_the_vocabulary_no_gradient() -> None:
    """Each target's own bias is pulled up by its occurrences only: softmax - one-hot, summed over hidden tokens."""
    model, rows = build_model({"mlm": MLMConfig(probability=0.3)}), rows_of([14, 10])
    objective = objective_of(model)
    masked = objective.masking(rows["text"], rows["text.mask"], rows["draw"])
    encode(model, rows)["sum"].sum().backward()
    hidden = set(masked.targets[masked.weights.bool()].tolist())
    pulled = {token for token in range(VOCABULARY) if objective.bias.weight.grad[token] < 0}
    assert pulled == hidden
    seen = set(rows["text"][rows["text.mask"]].tolist())
    assert seen > hidden


def test_rows_without_text_or_without_the_condition_count_nothing_and_change_nothing() -> None:
    config = MLMConfig(condition_on=("image",), probability=0.3)
    model, rows = build_model({"mlm": config}), rows_of([14, 10, 10, 7])
    rows["text.present"][1] = False
    rows["image.present"][2] = False
    kept = {name: tensor[[0, 3]] for name, tensor in rows.items()}
    assert objective_of(model).count(rows).item() == objective_of(model).count(kept).item() == 4 + 2
    torch.testing.assert_close(encode(model, rows)["sum"], encode(model, kept)["sum"])


def test_rows_without_any_eligible_token_give_zero_and_not_nan() -> None:
    model, rows = build_model({"mlm": MLMConfig()}), rows_of([0, 0])
    parts = encode(model, rows)
    parts["sum"].sum().backward()
    assert objective_of(model).count(rows).item() == 0
    assert parts["sum"].item() == 0
    assert objective_of(model).metrics(parts)["mlm_acc"].item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_the_image_reaches_the_conditioned_prediction_and_only_that() -> None:
    for condition, reached in (((), False), (("image",), True)):
        model, rows = build_model({"mlm": MLMConfig(condition_on=condition)}), rows_of([14, 12])
        other = rows | {"image": 255 - rows["image"]}
        assert torch.equal(encode(model, rows)["sum"], encode(model, other)["sum"]) is not reached


def test_no_logits_are_made_for_tokens_that_are_not_hidden() -> None:
    model, rows = build_model({"mlm": MLMConfig()}), rows_of([14] * 8)
    shapes: list[torch.Size] = []
    objective_of(model).bias.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    encode(model, rows)
    assert shapes == [torch.Size([8 * 2, VOCABULARY])]


def facts(tower: TowerFacts, fusion_width: int | None = None) -> ModelFacts:
    return ModelFacts(embed_dim=8, towers={"text": tower}, fusion_width=fusion_width)


def test_a_tower_without_words_is_refused() -> None:
    with pytest.raises(ConfigError, match="tower 'text' has no vocabulary"):
        MLMConfig().build(facts(TowerFacts(8, 16, 0)))


def test_a_tokenizer_without_a_mask_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="mlm needs a mask token"):
        MLMConfig().build(facts(TowerFacts(8, 16, 0, vocab_size=64)))


def test_conditioning_without_fusion_is_refused() -> None:
    assert MLMConfig(condition_on=("image",)).needs_fusion
    assert not MLMConfig().needs_fusion
    with pytest.raises(ConfigError, match=r"set model\.fusion\.kind to joint or cross"):
        MLMConfig(condition_on=("image",)).build(facts(WORDS))


def test_conditioning_on_itself_is_refused() -> None:
    with pytest.raises(ValidationError, match="names a modality twice or 'text' itself"):
        MLMConfig(condition_on=("text",))
