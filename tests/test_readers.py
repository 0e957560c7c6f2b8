"""Whatever a file holds: the right value, or one error of one line that names it."""

import copy
import io
import json
import os
import uuid

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as trying
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moe_sampler import Boundary, Expert, SamplingPlan, plan
from moe_sampler._readers import parse_json, read_json, read_regular, read_toml
from moe_sampler.data import digests
from moe_sampler.data.metadata import read_metadata
from moe_sampler.demo.data import SceneSet
from moe_sampler.demo.record import RunRecord
from moe_sampler.demo.words import Words, read_words, write_words
from moe_sampler.errors import CheckpointError
from moe_sampler.loading.folders import check_sizes, read_config, read_model_index
from moe_sampler.loading.state_dicts import read_tensors
from moe_sampler.tinyflux.features.cache_format import CacheError, Manifest, ShardRecord, read_manifest
from moe_sampler.tinyflux.features.exchange import import_upstream
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


# What users and other programs put beside the package's own files.


def one_error(problem: Exception, path) -> None:
    assert str(path) in str(problem), problem
    assert len(str(problem).splitlines()) == 1, problem


def spoiled(data: bytes) -> st.SearchStrategy[bytes]:
    """A file with bytes changed, cut off, or put in; or any bytes."""
    places = st.integers(0, len(data) - 1)
    return (
        st.binary(max_size=40)
        | places.map(lambda at: data[:at])
        | st.tuples(places, st.binary(min_size=1, max_size=4)).map(
            lambda change: data[: change[0]] + change[1] + data[change[0] + len(change[1]) :]
        )
        | st.tuples(places, st.binary(min_size=1, max_size=4)).map(
            lambda change: data[: change[0]] + change[1] + data[change[0] :]
        )
    )


UPSTREAM = {
    "encodings.pt": {
        "latents": torch.zeros(2, 4, 2, 2, dtype=torch.float16),
        "t5_embeds": torch.zeros(2, 3, 5),
        "clip_pooled": torch.zeros(2, 5),
        "prompts": ["a", "b"],
        "dtype": torch.float16,
    },
    "lune.pt": {"features": torch.zeros(2, 3, 8), "t_buckets": torch.tensor([0.1, 0.5, 0.9])},
    "sol.pt": {
        "stats": torch.zeros(2, 3, 3),
        "spatial": torch.zeros(2, 3, 8, 8),
        "t_buckets": [0.1, 0.5, 0.9],
    },
    "meta.pt": {"name": "castles"},
}
_tensors = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 4, 2, 2, dtype=torch.complex64),
        torch.full((2, 5), float("nan")),
        torch.zeros(0, 3, 5),
        torch.zeros(1).expand(10**9, 4, 64, 64),
        torch.zeros(2, 3, 5).to_sparse(),
        torch.zeros(2, 4, 2, 2, device="meta"),
        torch.zeros(2, 5, dtype=torch.float8_e4m3fn),
        torch.tensor([0.9, 0.5, 0.1]),
    ]
)


def upstream(folder, files) -> str:
    folder.mkdir()
    for name, values in files.items():
        torch.save(values, folder / name)
    return str(folder)


@seed(5)
@fuzzed
@given(data=st.data())
def test_upstreams_files(tmp_path, data):
    """Any value of any of the four files is any other value, or its bytes are."""
    folder = tmp_path / uuid.uuid4().hex
    files = copy.deepcopy(UPSTREAM)
    name = data.draw(st.sampled_from(sorted(files)))
    changed = data.draw(st.booleans())
    if changed:
        key = data.draw(st.sampled_from(sorted(files[name])))
        files[name][key] = data.draw(_values | _tensors | st.lists(_tensors | _scalars, max_size=3))
    upstream(folder, files)
    if not changed:
        path = folder / name
        path.write_bytes(data.draw(spoiled(path.read_bytes())))
    try:
        made = import_upstream(folder, tmp_path / uuid.uuid4().hex)
        assert made.length == 2
    except CacheError as problem:
        one_error(problem, folder)


@pytest.mark.parametrize("name", sorted(UPSTREAM))
def test_a_pipe_among_upstreams_files_is_not_waited_for(tmp_path, name):
    upstream(tmp_path / "up", UPSTREAM)
    (tmp_path / "up" / name).unlink()
    os.mkfifo(tmp_path / "up" / name)
    with pytest.raises(CacheError, match=f"{name} cannot be read: it is not a regular file"):
        import_upstream(tmp_path / "up", tmp_path / "cache")


_LINES = b'{"file_name": "a.png", "text": "a castle"}\n{"file_name": "sub/b.png", "text": "b"}\n'
_TABLE = b'file_name,text\na.png,a castle\nsub/b.png,"b, too"\n'


@seed(5)
@fuzzed
@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".csv"]))
def test_lists_of_captions(tmp_path, data, suffix):
    path = tmp_path / f"metadata{suffix}"
    plain = _LINES if suffix == ".jsonl" else _TABLE
    row = _values.map(lambda value: json.dumps({"file_name": value, "text": value}).encode())
    path.write_bytes(data.draw(spoiled(plain) | _values.map(json.dumps).map(str.encode) | row))
    try:
        for name, captions in read_metadata(path, "."):
            assert isinstance(name, str) and len(captions) == 1
            captions[0].encode()
    except ValueError as problem:
        one_error(problem, path)


def test_a_pipe_is_no_list_of_captions_and_no_index(tmp_path, monkeypatch):
    for suffix in (".jsonl", ".csv"):
        os.mkfifo(tmp_path / f"metadata{suffix}")
        with pytest.raises(ValueError, match="it is not a regular file"):
            read_metadata(tmp_path / f"metadata{suffix}", ".")
    (tmp_path / "deep.jsonl").write_text('{"file_name": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.jsonl:1 must be like .*"):
        read_metadata(tmp_path / "deep.jsonl", ".")


@seed(5)
@fuzzed
@given(data=st.data())
def test_an_index_of_digests_only_saves_time(tmp_path, data):
    """Whatever it holds, a file's digest is the file's."""
    file = tmp_path / "a.txt"
    file.write_text("content")
    os.utime(file, (1e9, 1e9))
    own = [[*(file.stat().st_size, file.stat().st_ino), file.stat().st_mtime_ns, file.stat().st_ctime_ns]]
    entry = (
        _values | _scalars.map(lambda value: [own[0], value]) | _values.map(lambda value: [value, "0" * 64])
    )
    content = entry.map(lambda value: json.dumps({"a": value}).encode()) | st.binary(max_size=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        digests.remembered("set", {"a": file}, lambda name: "f" * 64)
        (tmp_path / "home/moe-sampler/digests").mkdir(parents=True, exist_ok=True)
        index = tmp_path / "home/moe-sampler/digests" / f"{digests.fingerprint(['set'])[:32]}.json"
        index.write_bytes(data.draw(content))
        assert digests.remembered("set", {"a": file}, lambda name: digests.content(file)) == {
            "a": digests.content(file)
        }


def the_words() -> Words:
    shape = (2, 4, 3)
    tokens = np.arange(24, dtype=np.int16).reshape(shape)
    labels, said = np.zeros((2, 5), np.int8), np.ones((2, 4, 5), np.int8)
    return Words([["a", "b", "c", "d"], ["e", "f", "g", "h"]], tokens, tokens + 1, labels, said)


def same_words(one: Words, other: Words) -> bool:
    return one.texts == other.texts and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True)
    )


@seed(5)
@fuzzed
@given(data=st.data())
def test_the_demos_words(tmp_path, data):
    path = tmp_path / "words.npz"
    write_words(path, the_words())
    assert same_words(read_words([path]), the_words())
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(spoiled(path.read_bytes())))
    else:
        with np.load(path) as file:
            arrays = dict(file)
        name = data.draw(st.sampled_from(sorted(arrays)))
        texts = np.frombuffer(json.dumps(data.draw(_values)).encode(), np.uint8)
        others = [None, np.zeros(3), np.zeros((2, 4, 3), np.int8), np.zeros((2, 3, 3), np.int16), texts]
        arrays[name] = data.draw(st.sampled_from(others))
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    try:
        read = read_words([path])
        assert [len(own) for own in read.texts] == [4, 4] and read.tokens.shape == (2, 4, 3)
    except CheckpointError as problem:
        one_error(problem, path)
        assert "delete it" in str(problem) or "no JSON" in str(problem) or "nested" in str(problem)


@seed(5)
@fuzzed
@given(data=st.data())
def test_the_demos_pictures(tmp_path, data):
    scenes = SceneSet(tmp_path / "scenes", 2)
    path = tmp_path / "scenes" / "scenes-00000000-2.npy"
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 2, 64, 64, 3), np.uint8))
    huge = b"\x93NUMPY\x01\x00v\x00" + (
        "{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 2, 64, 64, 3), }".ljust(117) + "\n"
    ).encode("latin1")
    path.write_bytes(data.draw(spoiled(buffer.getvalue()) | st.just(huge)))
    try:
        assert scenes.pictures.shape == (2, 2, 64, 64, 3)
    except CheckpointError as problem:
        one_error(problem, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_a_pipe_is_no_checkpoint(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="cannot be read: it is not a regular file"):
        read_tensors([path])
