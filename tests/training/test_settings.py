"""Settings out of TOML and flags: nothing unknown, nothing of the wrong kind, nothing dropped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from moe_sampler.training import SettingsError, TrainingSettings
from moe_sampler.training.flags import with_settings
from moe_sampler.training.settings import from_tables, help_of, read_toml, to_tables


@dataclass(frozen=True)
class Paint:
    """A group."""

    colour: Annotated[Literal["red", "blue"], "of the wall"] = "red"
    coats: Annotated[int, "how many"] = 2
    gloss: Annotated[float | None, "none where it is left out"] = None
    rooms: Annotated[tuple[str, ...], "which"] = ("hall",)
    dry: Annotated[bool, "wait"] = True

    def __post_init__(self) -> None:
        if self.coats < 1:
            raise ValueError(f"coats must be at least 1, got {self.coats}")


@dataclass(frozen=True)
class Floor:
    where: Annotated[Path, "folder"]
    coats: Annotated[int, "how many"] = 1


@dataclass(frozen=True)
class House:
    floor: Annotated[Floor, "below"]
    paint: Annotated[Paint, "on the walls"] = field(default_factory=Paint)


def test_tables_and_back():
    tables = {"floor": {"where": "a/b"}, "paint": {"gloss": 1, "rooms": ["attic", "hall"], "dry": False}}
    house = from_tables(House, tables)
    assert house == House(Floor(Path("a/b")), Paint(gloss=1.0, rooms=("attic", "hall"), dry=False))
    assert isinstance(house.paint.gloss, float)
    assert from_tables(House, to_tables(house)) == house
    assert to_tables(House(Floor(Path("x"))))["paint"] == {
        "colour": "red",
        "coats": 2,
        "rooms": ["hall"],
        "dry": True,
    }


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"floor": {"where": "x"}, "pint": {}}, 'no setting pint; did you mean "paint"'),
        ({"floor": {"where": "x", "coat": 1}}, r'no setting floor\.coat; did you mean "coats"'),
        ({"floor": {"where": "x"}, "paint": {"xyzzy": 1}}, r"no setting paint\.xyzzy$"),
        ({}, "give floor"),
        ({"floor": {}}, r"give floor\.where"),
        ({"floor": {"where": "x"}, "paint": {"colour": "pink"}}, r"paint\.colour must be one of red, blue"),
        ({"floor": {"where": "x"}, "paint": {"coats": 2.5}}, r"paint\.coats must be a whole number"),
        ({"floor": {"where": "x"}, "paint": {"coats": True}}, r"paint\.coats must be a whole number"),
        ({"floor": {"where": "x"}, "paint": {"dry": 1}}, r"paint\.dry must be true or false"),
        ({"floor": {"where": "x"}, "paint": {"gloss": "much"}}, r"paint\.gloss must be a number"),
        ({"floor": {"where": "x"}, "paint": {"rooms": "hall"}}, r"paint\.rooms must be a list"),
        ({"floor": {"where": "x"}, "paint": {"coats": 0}}, "paint: coats must be at least 1, got 0"),
        ({"floor": 3}, "floor is a table of settings"),
    ],
)
def test_wrong_settings_are_named(tables, message):
    with pytest.raises(SettingsError, match=message):
        from_tables(House, tables)


def test_toml_files(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[floor]\nwhere = 'x'\n")
    assert read_toml(path) == {"floor": {"where": "x"}}
    path.write_text("[floor\n")
    with pytest.raises(SettingsError, match="is not TOML"):
        read_toml(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_toml(tmp_path / "b.toml")


@pytest.fixture
def app():
    app, seen = typer.Typer(), []

    def build(name: Annotated[str, typer.Argument(help="of it")], settings: House) -> None:
        """Build a house."""
        seen.append((name, settings))

    app.command()(with_settings(House, build))
    app.command()(lambda: None)
    app.seen = seen
    return app


def test_flags_go_before_the_file(app, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[floor]\nwhere = 'x'\ncoats = 3\n[paint]\ncolour = 'blue'\ncoats = 4\n")
    flags = ["--floor-coats", "5", "--no-dry", "--rooms", "attic", "--rooms", "hall", "--gloss", "0.5"]
    result = CliRunner().invoke(app, ["build", "mill", str(path), *flags])
    assert result.exit_code == 0, result.output
    expected = House(Floor(Path("x"), 5), Paint("blue", 4, 0.5, ("attic", "hall"), False))
    assert app.seen == [("mill", expected)]
    assert CliRunner().invoke(app, ["build", "mill", "--where", "y"]).exit_code == 0
    assert app.seen[1] == ("mill", House(Floor(Path("y"))))


def test_every_flag_is_explained(app):
    text = " ".join(CliRunner().invoke(app, ["build", "--help"], env={"COLUMNS": "200"}).output.split())
    for shown in (
        "Build a house.",
        "--paint-coats",
        "How many. Default: 2.",
        "red|blue",
        "--dry",
        "--no-dry",
    ):
        assert shown in text
    result = CliRunner().invoke(app, ["build", "mill", "--glos", "1"])
    assert result.exit_code == 2 and "--gloss" in result.output


@pytest.mark.parametrize("cls", [TrainingSettings])
def test_every_field_says_what_it_does(cls):
    for name, (_, text) in help_of(cls).items():
        assert len(text) > 10, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps must be at least 1"),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps must not be negative"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ({"max_train_steps": 10, "lr_warmup_steps": 20}, r"more than max_train_steps \(10\)"),
        ({"lr_decay_steps": 5}, "warmup_stable_decay alone"),
        ({"lr_floor": 2.0}, "lr_floor must lie between"),
    ],
)
def test_training_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(output_dir=Path("x"), **changes)


WHOLE = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "noise_bins", "logging_steps")
WHOLE += ("checkpointing_steps", "checkpoints_total_limit", "max_skipped", "lr_num_cycles")
NOT_NEGATIVE = ("lr_warmup_steps", "lr_decay_steps", "dataloader_num_workers", "validation_steps", "seed")
NOT_NEGATIVE += ("sample_steps", "max_grad_norm", "adam_weight_decay")
POSITIVE, SHARES = ("learning_rate", "adam_epsilon", "lr_power"), ("adam_beta1", "adam_beta2", "ema_decay")
QUICK = {"output_dir": Path("x"), "max_train_steps": 10, "lr_warmup_steps": 0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in WHOLE for value in (0, -1)),
        *((name, value) for name in NOT_NEGATIVE for value in (-1, float("inf"), float("nan"))),
        *((name, value) for name in POSITIVE for value in (0.0, -1e-9, float("inf"), float("nan"))),
        *((name, value) for name in SHARES for value in (-0.01, 1.0, float("nan"))),
        *(("lr_floor", value) for value in (-0.01, 1.01, float("nan"))),
    ],
)
def test_every_number_has_its_range(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must .*, got {value}$"):
        TrainingSettings(**{**QUICK, name: value})


def test_what_lies_at_the_end_of_a_range_is_in_it():
    TrainingSettings(**QUICK | dict.fromkeys(WHOLE, 1))
    TrainingSettings(**QUICK | dict.fromkeys((*NOT_NEGATIVE, *SHARES, "lr_floor"), 0))
    TrainingSettings(**QUICK | dict.fromkeys(POSITIVE, 1e-30) | dict.fromkeys(SHARES, 0.9999))
    TrainingSettings(**QUICK | {"lr_floor": 1})
    both = {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 4, "lr_decay_steps": 6}
    assert TrainingSettings(**QUICK | both).lr_decay_steps == 6
    for more in ("lr_warmup_steps", "lr_decay_steps"):
        with pytest.raises(ValueError, match=r"are more than max_train_steps \(10\): lower them"):
            TrainingSettings(**QUICK | both | {more: both[more] + 1})
