"""The config loader on small config classes: sources, precedence, strictness and the text of every fault."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt, ValidationError

from mmpretrain.core.config import Config, Rule, config_hash, dump_yaml, load_config, parse_config
from mmpretrain.core.errors import ConfigError


class Constant(Config):
    kind: Literal["constant"] = "constant"
    warmup: int = 0


class Cosine(Config):
    kind: Literal["cosine"] = "cosine"
    warmup: int = 0
    final_fraction: float = 0.0


class Optimizer(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    fused: bool = True


class Run(Config):
    output: Path
    steps: PositiveInt
    batch: int = 8
    micro: int = 4
    precision: Literal["fp32", "bf16"] = "bf16"
    note: str | None = None
    shards: list[str] = []
    optimizer: Optimizer = Optimizer()
    schedule: Annotated[Constant | Cosine, Field(discriminator="kind")] = Cosine()
    losses: dict[str, Annotated[Constant | Cosine, Field(discriminator="kind")]] = {}
    size: int | list[int] = 1

    def broken_rules(self) -> Iterable[Rule]:
        if self.batch % self.micro:
            yield ("batch",), f"{self.batch} is not a multiple of micro {self.micro}; use {2 * self.micro}"
        if self.schedule.warmup > self.steps:
            yield ("schedule", "warmup"), f"{self.schedule.warmup} is more than the {self.steps} steps"


def write(folder: Path, **files: str) -> Path:
    """Files by name, `__` for a slash; the last one is the run file."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


def load(folder: Path, text: str, *overrides: str) -> Run:
    return load_config(Run, write(folder, run=text), overrides)


def faults(folder: Path, text: str, *overrides: str) -> list[str]:
    """The fault lines, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


MINIMAL = "output: out\nsteps: 10\n"


def test_fields_left_out_take_their_defaults(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL)
    assert (run.output, run.steps, run.batch, run.optimizer.betas) == (Path("out"), 10, 8, (0.9, 0.98))


def test_precedence_is_defaults_then_run_file_then_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        base="steps: 1\nbatch: 4\nmicro: 1\noptimizer: {lr: 1, betas: [0.1, 0.2]}\n",
        run="defaults: [base]\noutput: o\nbatch: 16\noptimizer: {lr: 2}\n",
    )
    run = load_config(Run, path, ["optimizer.lr=3", "micro=2"])
    assert (run.steps, run.batch, run.micro) == (1, 16, 2)
    assert run.optimizer == Optimizer(lr=3, betas=(0.1, 0.2))


def test_later_defaults_win_and_may_have_defaults_of_their_own(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        model__root="steps: 1\nbatch: 4\nmicro: 1\n",
        model__a="defaults: [root]\nbatch: 5\n",
        b="micro: 5\n",
        run="defaults: [model/a, b.yaml]\noutput: o\n",
    )
    run = load_config(Run, path)
    assert (run.steps, run.batch, run.micro) == (1, 5, 5)


def test_defaults_are_also_found_in_the_given_folders(tmp_path: Path) -> None:
    write(tmp_path, configs__model__tiny="steps: 7\n")
    path = write(tmp_path, mine__run="defaults: [model/tiny]\noutput: o\n")
    assert load_config(Run, path, folders=[tmp_path / "configs"]).steps == 7


def test_a_list_replaces_and_a_map_whose_kind_changes_replaces_wholly(tmp_path: Path) -> None:
    base = "shards: [a, b]\nschedule: {kind: cosine, warmup: 5, final_fraction: 0.1}\n"
    path = write(tmp_path, base=base, run=f"defaults: [base]\n{MINIMAL}shards: [c]\nschedule: {{warmup: 6}}\n")
    run = load_config(Run, path)
    assert (run.shards, run.schedule) == (["c"], Cosine(warmup=6, final_fraction=0.1))
    assert load_config(Run, path, ["schedule.kind=constant"]).schedule == Constant(warmup=0)


def test_null_takes_an_inherited_map_out(tmp_path: Path) -> None:
    text = MINIMAL + "losses: {a: {kind: constant}, b: {kind: constant}}\noptimizer: {lr: 5}\n"
    run = load(tmp_path, text, "losses.a=null", "optimizer=")
    assert (run.losses, run.optimizer) == ({"b": Constant()}, Optimizer())


def test_overrides_join_before_they_meet_the_files(tmp_path: Path) -> None:
    run = load(
        tmp_path, MINIMAL + "schedule: {kind: cosine, warmup: 1}\n", "schedule.warmup=3", "schedule.kind=constant"
    )
    assert run.schedule == Constant(warmup=3)


def test_of_two_overrides_of_one_key_the_later_counts(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL, "steps=3", "steps=4").steps == 4


def test_override_values_are_yaml(tmp_path: Path) -> None:
    run = load(
        tmp_path, MINIMAL, "shards=[x, y]", "note=", "optimizer={lr: 1e-4, fused: false}", "losses.a.kind=constant"
    )
    assert (run.shards, run.note, run.optimizer.lr, run.optimizer.fused) == (["x", "y"], None, 1e-4, False)
    assert run.losses == {"a": Constant()}


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("1E+2", 100.0), ("-.5", -0.5), ("3", 3.0), ("1_000", 1000.0), ("2.", 2.0), ("+1.5e3", 1500.0)],
)
def test_numbers_read_as_people_write_them(tmp_path: Path, text: str, number: float) -> None:
    assert load(tmp_path, MINIMAL + f"optimizer: {{lr: {text}}}\n").optimizer.lr == number


@pytest.mark.parametrize("word", ["yes", "no", "on", "12:30", "2026-01-01", "0x1f", "1.2.3", "e5", "'1e-4'"])
def test_words_stay_text(tmp_path: Path, word: str) -> None:
    assert load(tmp_path, MINIMAL + f"note: {word}\n").note == word.strip("'")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch: true", "batch: saw True (boolean), expected an integer"),
        ("batch: '8'", "batch: saw '8' (text), expected an integer"),
        ("batch: 8.0", "batch: saw 8.0 (number), expected an integer"),
        ("batch:", "batch: saw None (null), expected an integer"),
        ("optimizer: {lr: fast}", "optimizer.lr: saw 'fast' (text), expected a number"),
        ("optimizer: {lr: true}", "optimizer.lr: saw True (boolean), expected a number"),
        ("optimizer: {lr: .nan}", "optimizer.lr: saw nan (number), expected a finite number"),
        ("optimizer: {fused: 1}", "optimizer.fused: saw 1 (number), expected true or false"),
        ("optimizer: {fused: 'true'}", "optimizer.fused: saw 'true' (text), expected true or false"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas.1: the list ends too early; add a number"),
        ("optimizer: {betas: [0.9, 0.9, 1]}", "optimizer.betas: saw a list, expected at most 2 of them, not 3"),
        ("optimizer: 3", "optimizer: saw 3 (number), expected a map of keys"),
        ("note: 5", "note: saw 5 (number), expected text (in quotes where it looks like a number)"),
        ("shards: a", "shards: saw 'a' (text), expected a list"),
        ("shards: {a: 1}", "shards: saw a map, expected a list"),
        ("shards: [a, 1]", "shards.1: saw 1 (number), expected text (in quotes where it looks like a number)"),
        ("size: x", "size: saw 'x' (text), expected an integer or a list"),
        ("precision: pf32", "precision: saw 'pf32' (text), expected 'fp32' or 'bf16'; did you mean fp32?"),
        ("schedule: {kind: cosin}", "schedule: saw kind 'cosin', expected constant or cosine; did you mean cosine?"),
        ("schedule: {warmup: 1}", "schedule: has no `kind`; expected one of constant, cosine"),
        ("schedule: {kind: cosine, warmup: x}", "schedule.warmup: saw 'x' (text), expected an integer"),
        ("losses: {a: {kind: constant, warm: 1}}", "losses.a.warm: unknown key; did you mean warmup?"),
        ("optimiser: {}", "optimiser: unknown key; did you mean optimizer?"),
        ("lr: 1", "lr: unknown key; did you mean optimizer.lr?"),
        ("optimizer: {qqq: 1}", "optimizer.qqq: unknown key; expected one of lr, betas, fused"),
        ("batch: 9", "batch: 9 is not a multiple of micro 4; use 8"),
    ],
)
def test_a_fault_names_line_key_what_was_seen_and_what_is_expected(tmp_path: Path, line: str, message: str) -> None:
    assert faults(tmp_path, f"{MINIMAL}{line}\n") == [f"run.yaml:3: {message}"]


def test_all_faults_come_at_once_with_their_own_files_and_lines(tmp_path: Path) -> None:
    path = write(tmp_path, base="batch: x\n", run="defaults: [base]\n\noutput: o\noptimizer:\n  lr: y\n  fast: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, ["precision=fp8"])
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert sorted(lines) == [
        "base.yaml:1: batch: saw 'x' (text), expected an integer",
        "command line: precision=fp8: saw 'fp8' (text), expected 'fp32' or 'bf16'",
        "run.yaml:1: steps: is missing; it has no default, add `steps: <integer>`",
        "run.yaml:5: optimizer.lr: saw 'y' (text), expected a number",
        "run.yaml:6: optimizer.fast: unknown key; expected one of lr, betas, fused",
    ]


def test_a_missing_key_is_named_at_the_map_that_lacks_it(tmp_path: Path) -> None:
    assert faults(tmp_path, "output: o\n", "batch=4") == [
        "run.yaml:1: steps: is missing; it has no default, add `steps: <integer>`"
    ]


def test_every_broken_rule_is_told_at_its_own_key(tmp_path: Path) -> None:
    text = f"{MINIMAL}schedule:\n  kind: cosine\n  warmup: 11\n"
    assert faults(tmp_path, text, "batch=6") == [
        "command line: batch=6: 6 is not a multiple of micro 4; use 8",
        "run.yaml:5: schedule.warmup: 11 is more than the 10 steps",
    ]


def test_rules_hold_for_configs_made_in_python_too() -> None:
    with pytest.raises(ValidationError, match="batch: 9 is not a multiple of micro 4; use 8"):
        Run(output=Path("o"), steps=1, batch=9)


def test_override_faults_name_the_argument(tmp_path: Path) -> None:
    assert faults(tmp_path, MINIMAL, "stepz=5", "optimizer={lrr: 1}") == [
        "command line: optimizer={lrr: 1}: optimizer.lrr: unknown key; did you mean lr?",
        "command line: stepz=5: unknown key; did you mean steps?",
    ]


def test_arguments_that_are_no_overrides_are_told_all_at_once(tmp_path: Path) -> None:
    first, second, third = faults(tmp_path, MINIMAL, "steps", "a..b=1", "shards=[x")
    assert first == "command line: steps: saw no `key=value`; write e.g. optimizer.lr=1e-3"
    assert second == "command line: a..b=1: saw no `key=value`; write e.g. optimizer.lr=1e-3"
    assert third.startswith("command line: shards=[x: value:1: is not YAML: ")


def test_duplicate_keys_are_refused_with_both_lines(tmp_path: Path) -> None:
    assert faults(tmp_path, MINIMAL + "optimizer:\n  lr: 1\n  lr: 2\nsteps: 3\n") == [
        "run.yaml:5: optimizer.lr: the key stands twice, first at run.yaml:4; keep one",
        "run.yaml:6: steps: the key stands twice, first at run.yaml:2; keep one",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"run.yaml:1: saw nothing, expected a map"),
        ("# only a comment\n", r"run.yaml:1: saw nothing, expected a map"),
        ("- a\n- b\n", r"run.yaml:1: saw a list, expected a map"),
        ("just words", r"run.yaml:1: saw a text, expected a map"),
        ("output: o\noptimizer:\n\tlr: 1\n", r"run.yaml:3: is not YAML: .*; indent with spaces, not tabs"),
        ("output: [a\nsteps: 1\n", r"run.yaml:2: is not YAML"),
        ("a: 1\n---\nb: 2\n", r"run.yaml:2: is not YAML: but found another document"),
        (
            "output: !!python/object:os.system {}\n",
            r"run.yaml:1: output: the tag .*os.system.* is not supported",
        ),
        (
            "output: !!python/name:os.system\n",
            r"run.yaml:1: output: the tag .*os.system.* is not supported",
        ),
        ("output: !!int x\n", r"run.yaml:1: output: 'x' is not a YAML int"),
        ("? [a, b]\n: 1\n", r"run.yaml:1: a key must be one word"),
        ("output: &a [*a]\n", r"run.yaml:1: output.0: an alias to a map or list that holds it has no end"),
        ("output: *nowhere\n", r"run.yaml:1: is not YAML: found undefined alias"),
        ("output: \x07\n", r"run.yaml: is not YAML: unacceptable character"),
        ("output: " + "[" * 5000, r"run.yaml: is nested too deep"),
        ("<<: {steps: 1}\noutput: o\n", r"run.yaml:1: <<: unknown key"),
        ("defaults: base\n", r"run.yaml:1: defaults: saw 'base', expected a list of file names"),
        ("defaults: [1]\n", r"run.yaml:1: defaults: saw \[1\], expected a list of file names"),
        ("\ndefaults:\n  - model/none\n", r"run.yaml:3: defaults: there is no 'model/none' \(or with .yaml\) in "),
        ("defaults: [run]\n", r"run.yaml: its defaults lead back to itself: .*run.yaml -> .*run.yaml; remove one"),
    ],
)
def test_strange_yaml_is_a_config_error_and_never_a_traceback(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_files_that_cannot_be_read_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none.yaml: there is no such file"):
        load_config(Run, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(Run, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"note: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml: is not UTF-8 text \(byte 9\)"):
        load_config(Run, tmp_path / "latin.yaml")


def test_a_longer_cycle_of_defaults_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, a="defaults: [b]\n", b="defaults: [a]\n", run="defaults: [a]\noutput: o\nsteps: 1\n")
    with pytest.raises(ConfigError, match="defaults lead back to itself"):
        load_config(Run, path)


def test_anchors_and_aliases_repeat_a_value(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL + "losses: {a: &one {kind: cosine, warmup: 4}, b: *one}\n")
    assert run.losses == {"a": Cosine(warmup=4), "b": Cosine(warmup=4)}


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    overrides = [
        "note='1e-4'",
        "optimizer.lr=1e-7",
        "losses.x={kind: constant, warmup: 1}",
        "shards=['yes', '8', '~', a: b]",
    ]
    run = load(tmp_path, MINIMAL, *overrides[:3], "shards=['yes', '8', '~', '1.', 'é']")
    text = dump_yaml(run)
    assert parse_config(Run, text, "config.yaml") == run
    assert load(tmp_path, text) == run


def test_a_dump_holds_every_default() -> None:
    assert dump_yaml(Optimizer()) == "lr: 0.001\nbetas: [0.9, 0.98]\nfused: true\n"


def test_the_hash_changes_with_every_field_but_the_excluded(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL)
    assert config_hash(run) != config_hash(load(tmp_path, MINIMAL, "output=elsewhere"))
    assert config_hash(run, exclude={"output"}) == config_hash(
        load(tmp_path, MINIMAL, "output=elsewhere"), exclude={"output"}
    )
    assert config_hash(run, exclude={"output"}) != config_hash(
        load(tmp_path, MINIMAL, "optimizer.lr=1.1e-3"), exclude={"output"}
    )


def test_a_config_is_frozen_and_refuses_infinities() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Optimizer().lr = 2.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="finite"):
        Optimizer(lr=math.inf)
