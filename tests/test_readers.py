"""Whatever a file holds: the right value, or one error of one line that names it."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as trying
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moe_sampler import Boundary, Expert, SamplingPlan, plan
from moe_sampler._readers import parse_json, read_json, read_regular, read_toml
from moe_sampler.demo.record import RunRecord
from moe_sampler.errors import CheckpointError
from moe_sampler.loading.folders import check_sizes, read_config, read_model_index
from moe_sampler.tinyflux.features.cache_format import Manifest, ShardRecord, read_manifest
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.training.checkpoints import read_state
from moe_sampler.training.settings import SettingsError, from_tables
from moe_sampler.training.training_settings import TrainingSettings
from moe_sampler.viewing.images import read_settings

_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, -1, 0, 1, "sol", "lune", 1e308])
)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fuzzed = trying(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


def changed(draw, whole):
    """A JSON value with one place replaced, removed, or one more key; or its text with bytes changed."""
    value = json.loads(json.dumps(whole))
    place = value
    while isinstance(place, (dict, list)) and place:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 4)) == 0:
            match draw(st.sampled_from(["replace", "remove", "add"])):
                case "replace":
                    place[key] = draw(_values)
                case "remove":
                    del place[key]
                case _ if isinstance(place, dict):
                    place[draw(st.text(max_size=5))] = draw(_values)
            break
        place = inner
    data = bytearray(json.dumps(value).encode())
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(data)))
        data[start : start + draw(st.integers(0, 9))] = draw(st.binary(max_size=4))
    return bytes(data)


def one_line(error, *names):
    text = str(error)
    assert text and "\n" not in text and all(str(name) in text for name in names), text


PLAN = json.loads(plan((Expert.sol(), Expert.lune()), Boundary("sol", "lune", 0.6), steps=3).to_json())
PLAN["format"] = 3
del PLAN["digest"]


@seed(1)
@fuzzed
@given(st.data())
def test_plans(data):
    text = changed(data.draw, PLAN).decode("utf-8", "replace")
    try:
        made = SamplingPlan.from_json(text)
    except ValueError as error:
        one_line(error)
    else:
        made.check()
        made.table()
        assert str(made) and SamplingPlan.from_json(made.to_json()) == made


RECORD = ShardRecord("shard-00000.safetensors", 0, 2, 99, "ab", {"latents": ["float16", 4, 8, 8]})
MANIFEST = Manifest({"t_buckets": [0.2, 0.5], "shard_size": 2, "seed": 0}, None, None, 2, (RECORD,), "1")


@seed(2)
@fuzzed
@given(st.data())
def test_manifests(tmp_path, data):
    (tmp_path / "manifest.json").write_bytes(changed(data.draw, json.loads(MANIFEST.to_json())))
    try:
        made = read_manifest(tmp_path)
    except ValueError as error:
        one_line(error, tmp_path)
    else:
        assert isinstance(made.length, int) and all(isinstance(t, (int, float)) for t in made.t_buckets)
        assert Manifest.from_json(made.to_json()) == made


@seed(3)
@fuzzed
@given(st.data())
def test_settings_in_pictures(tmp_path, data):
    info = PngInfo()
    text = changed(data.draw, {"prompt": "a castle", "seed": 3, "plan": PLAN}).decode("utf-8", "replace")
    info.add_itxt("moe-sampler", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    raw = bytearray((tmp_path / "a.png").read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "a.png").write_bytes(raw)
    try:
        assert isinstance(read_settings(tmp_path / "a.png"), dict)
    except ValueError as error:
        one_line(error, "a.png")


CONFIG = {"layers_per_block": 2, "block_out_channels": [32, 64], "act_fn": "silu", "sub": {"n_layers": 3}}
INDEX = {"_class_name": "HybridPipeline", "unet_sol": ["diffusers", "UNet"], "experts": ["sol"]}


@seed(4)
@fuzzed
@given(st.data())
def test_configs_and_indices(tmp_path, data):
    for name, whole, read in (
        ("config.json", CONFIG, lambda: read_config(tmp_path / "config.json")),
        ("model_index.json", INDEX, lambda: read_model_index(tmp_path, ["unet_sol"])),
    ):
        (tmp_path / name).write_bytes(changed(data.draw, whole))
        (tmp_path / "unet_sol").mkdir(exist_ok=True)
        (tmp_path / "unet_sol" / "config.json").touch()
        try:
            assert isinstance(read(), dict)
        except CheckpointError as error:
            one_line(error, tmp_path)


@seed(5)
@fuzzed
@given(st.data())
def test_student_configs(data):
    text = changed(data.draw, TinyFluxConfig.demo().to_dict()).decode("utf-8", "replace")
    try:
        TinyFluxConfig.from_json(text)
    except ValueError as error:
        one_line(error)


@seed(6)
@fuzzed
@given(st.data())
def test_states_and_records(tmp_path, data):
    (tmp_path / "state.json").write_bytes(changed(data.draw, {"step": 3, "files": {}, "sha256": "ab"}))
    with pytest.raises(CheckpointError) as caught:
        read_state(tmp_path)
    one_line(caught.value, "state.json")
    (tmp_path / "run.json").write_bytes(changed(data.draw, {"seed": 3, "timed": False, "spent": 0.5}))
    try:
        assert isinstance(RunRecord.read(tmp_path).seed, int)
    except CheckpointError as error:
        one_line(error, "run.json")


@seed(7)
@fuzzed
@given(st.binary(max_size=40), _values)
def test_toml(tmp_path, noise, value):
    path = tmp_path / "run.toml"
    path.write_bytes(b'output_dir = "runs/a"\nmax_train_steps = 300\n' + noise)
    try:
        tables = read_toml(path, SettingsError)
    except SettingsError as error:
        one_line(error, path)
        return
    try:
        from_tables(TrainingSettings, tables | {"lr_warmup_steps": value})
    except ValueError as error:
        one_line(error)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", tmp_path, "/dev/zero"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            read_json(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_json(tmp_path / "absent.json")


def test_absurd_sizes_are_refused_before_anything_is_made_of_them(tmp_path):
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="are more than"):
        read_regular(tmp_path / "large.json")
    for depth in (70, 100_000):
        with pytest.raises(CheckpointError, match="nested more than 64 deep"):
            parse_json("[" * depth + "]" * depth, "a.json")
    for config in ({"layers_per_block": 10**9}, {"a": {"num_layers": [2, 10**9]}}, {"in_channels": 10**12}):
        with pytest.raises(CheckpointError, match="which is refused"):
            check_sizes(config, "config.json")
    check_sizes({"layers_per_block": 2, "vocab_size": 250_000, "layer_norm_eps": 1e-5}, "config.json")
