"""Blocks compiled one by one: the same numbers, one graph for all blocks of a shape, kept for the next process."""

from pathlib import Path

import pytest
import torch
from tiny_model import build_model, rows_of
from torch import Tensor
from torch._dynamo.utils import counters

from mmpretrain.config import configs_folder, load_run_config
from mmpretrain.core.errors import ClusterError, ConfigError
from mmpretrain.models.multimodal import MultimodalTransformer
from mmpretrain.training.compiling import compile_blocks

CPU = torch.device("cpu")


def step(model: MultimodalTransformer) -> list[Tensor]:
    """What the image tower says, and its gradients."""
    model.zero_grad()
    embedded = model.embed("image", rows_of([3, 4])["image"])
    (embedded * torch.linspace(-1, 1, embedded.numel()).view_as(embedded)).sum().backward()
    return [embedded.detach(), *(p.grad.clone() for p in model.towers["image"].parameters() if p.grad is not None)]


@pytest.fixture
def clean_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    torch._dynamo.reset()
    counters.clear()


def test_compiled_blocks_compute_the_same_and_are_kept_for_later(
    clean_compiler: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, model = build_model({}), build_model({})
    assert compile_blocks(model, tmp_path, CPU) == 2 + 2 + 1
    model.set_activation_checkpointing("block")
    expected, found = step(plain), step(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1, "both blocks of the tower share it"
    assert any(tmp_path.rglob("*.so"))
    torch._dynamo.reset()
    counters.clear()
    torch.testing.assert_close(step(model), found)
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"] > 0
    assert counters["inductor"]["fxgraph_cache_miss"] == 0, "nothing was compiled again"


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ClusterError, match="no no-such-compiler; install one, name another in the environment"):
        compile_blocks(build_model({}), None, CPU)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.compile=true", "zero_stage=3"], "breaks compiled graphs apart.*set zero_stage to 2 or less"),
        (["engine.compile=true", "engine.activation_checkpointing=selective"], "use none or block, or set compile"),
        (["engine.compile_cache=/tmp/kept"], "nothing is compiled; set compile to true or remove it"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(configs_folder() / "demo.yaml", overrides)
