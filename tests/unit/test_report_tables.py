"""The tables of an evaluation: which figures stand side by side, under which names, and what guessing scores."""

from itertools import permutations

import pytest

from mmpretrain.core.figure_names import modalities_of, way_of
from mmpretrain.tracking.report_curves import RECALL, chance_name
from mmpretrain.tracking.report_tables import tables_of

NAMES = ("image", "text", "audio", "video", "depth", "infrared")


def test_a_direction_has_one_name_and_is_read_back_from_it() -> None:
    ways = {way_of(*pair): pair for pair in permutations(NAMES, 2)}
    assert len(ways) == len(NAMES) * (len(NAMES) - 1)
    assert {way: modalities_of(way) for way in ways} == ways
    assert way_of("image", "text") == "i2t"
    assert way_of("depth", "audio") == "depth2a"
    assert all(match and match["direction"] == way for way in ways for match in [RECALL.fullmatch(f"val/{way}_r@10")])


def test_every_direction_is_a_row_and_every_measure_a_column() -> None:
    measures = {"chance_r@1": 0.1, "r@1": 0.5, "r@5": 0.7, "median_rank": 2.0, "mean_rank": 3.5, "chance_r@5": 0.5}
    figures = {f"val/{way}_{name}": value for way in ("i2t", "depth2a") for name, value in measures.items()}
    (table,) = tables_of(figures)
    assert table.title == "Retrieval"
    assert list(table.rows) == ["image → text", "depth → audio"]
    assert table.columns == ["R@1", "R@5", "median rank", "mean rank", "chance R@1"]
    assert table.rows["depth → audio"] == {
        "R@1": 0.5, "R@5": 0.7, "median rank": 2.0, "mean rank": 3.5, "chance R@1": 0.1,
    }  # fmt: skip


def test_an_objective_stands_beside_itself_without_each_modality() -> None:
    figures = {"val/words_acc": 0.8, "val/words_acc_no_image": 0.5, "val/words_acc_shuffled": 0.4}
    figures |= {"val/words_acc_shuffled_image": 0.45, "val/words_acc_guess": 0.1}
    figures |= {"val/loss_words": 1.0, "val/loss_words_no_image": 1.5}
    (table,) = tables_of(figures)
    assert table.rows == {
        "words acc": {"whole": 0.8, "without image": 0.5, "shuffled": 0.4, "shuffled image": 0.45, "guess": 0.1},
        "loss words": {"whole": 1.0, "without image": 1.5},
    }


def test_tables_stand_by_family_then_by_task() -> None:
    figures = {
        "val/effective_rank_image": 9.0,
        "val/alignment_image_text": 1.1,
        "sounds/zeroshot_top1": 0.5,
        "val/zeroshot_top1": 0.6,
        "val/probe_audio_mean_class": 0.4,
        "val/i2t_r@1": 0.3,
        "val/seconds": 4.0,
        "val/logit_scale_itc": 14.0,
    }
    tables = tables_of(figures)
    titles = ["Retrieval", "Classification", "Classification: sounds", "Embeddings", "Pairs of embeddings"]
    assert [table.title for table in tables] == titles
    assert tables[1].rows == {"zeroshot": {"top1": 0.6}, "probe audio": {"mean class": 0.4}}
    assert tables[3].rows == {"image": {"effective rank": 9.0}}
    assert tables[4].rows == {"image · text": {"alignment": 1.1}}


@pytest.mark.parametrize(
    ("name", "chance"),
    [
        ("val/i2t_r@5", "val/i2t_chance_r@5"),
        ("val/depth2a_r@1", "val/depth2a_chance_r@1"),
        ("val/words_acc", "val/words_acc_guess"),
        ("val/words_acc_shuffled_image", "val/words_acc_guess"),
        ("val/words_acc_no_audio", "val/words_acc_guess"),
        ("val/zeroshot_top5", "val/zeroshot_chance"),
        ("a/probe_image_mean_class", "a/probe_image_chance"),
        ("val/knn_audio_top1", "val/knn_audio_chance"),
        ("val/i2t_chance_r@5", "val/i2t_chance_r@5"),
        ("val/loss_words_no_image", ""),
        ("val/i2t_mean_rank", ""),
    ],
)
def test_what_guessing_scores_is_found_by_name(name: str, chance: str) -> None:
    assert chance_name(name) == chance
