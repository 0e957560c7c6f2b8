"""What a trace shows of a run: decoded previews, the contact sheet, the animation read back from its file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from moe_sampler import Crossfade
from moe_sampler.viewing.images import check_writable, save_webp, zoom
from moe_sampler.viewing.plan_figure import expert_colors
from moe_sampler.viewing.trace import Animation, Trace


@pytest.fixture(scope="module")
def traced(demo_pipeline):
    trace = Trace()
    output = demo_pipeline(
        ["a castle with two towers, at dusk", "a portrait"],
        seed=3,
        num_inference_steps=10,
        router=Crossfade("sol", "lune", 0.95, 0.7),
        callback_on_step_end=trace,
        callback_on_step_end_tensor_inputs=trace.tensor_inputs,
    )
    return trace, output


def difference(a: Image.Image, b: Image.Image) -> float:
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def test_previews_are_decoded_in_batches_and_end_with_the_image(demo_pipeline, traced, monkeypatch):
    trace, output = traced
    sizes, decode = [], demo_pipeline.decode_latents
    monkeypatch.setattr(
        demo_pipeline, "decode_latents", lambda latents: sizes.append(len(latents)) or decode(latents)
    )
    for index in (0, 1, -1):
        images = trace.images(demo_pipeline, index, batch_size=4)
        assert len(images) == 10
        assert difference(images[-1], output.images[index]) < 1.0
        assert difference(images[0], output.images[index]) > 5.0
    assert sizes == [4, 4, 2] * 3
    one_by_one = trace.images(demo_pipeline, 1, batch_size=1)
    assert max(difference(a, b) for a, b in zip(images, one_by_one, strict=True)) < 1.0


def test_the_animation_read_back(demo_pipeline, traced, tmp_path):
    trace, output = traced
    animation = trace.animation(demo_pipeline, output.plan, title="a castle")
    animation.save(tmp_path / "trace.webp")
    frames, durations = [], []
    with Image.open(tmp_path / "trace.webp") as file:
        assert file.format == "WEBP" and file.n_frames == 10 and file.info["loop"] == 0
        for i in range(file.n_frames):
            file.seek(i)
            file.load()
            frames.append(file.convert("RGB"))
            durations.append(file.info["duration"])
    assert tuple(durations) == animation.durations
    assert len(set(durations[:-1])) == 1 and durations[-1] > 5 * durations[0]
    for read, made in zip(frames, animation.frames, strict=True):
        assert read.size == made.size and difference(read, made) < 4.0
    assert [path.name for path in tmp_path.iterdir()] == ["trace.webp"]


def test_frames_show_the_enlarged_image_and_how_far_the_run_is(demo_pipeline, traced):
    trace, output = traced
    animation = trace.animation(demo_pipeline, output.plan, 1, size=256)
    last = np.asarray(animation.frames[-1])
    picture = zoom(trace.images(demo_pipeline, 1)[-1], 4)
    pad = (last.shape[1] - 256) // 2
    assert np.array_equal(last[pad : pad + 256, pad : pad + 256], np.asarray(picture))
    assert (last[-1] == last[0, 0]).all()
    # The bar at the bottom: done in full colour, so ever less of it is pale; it begins Sol's and ends Lune's.
    colors = expert_colors(output.plan)
    bars = [np.asarray(frame)[-pad - 2, pad:-pad].astype(int) for frame in animation.frames]
    saturation = [np.ptp(bar, axis=1).mean() for bar in bars]
    assert (np.diff(saturation) > 0).all()
    assert tuple(bars[-1][0]) == colors["sol"] and tuple(bars[-1][-1]) == colors["lune"]
    titled = trace.animation(demo_pipeline, output.plan, 1, size=256, title="a portrait " * 20)
    assert titled.frames[0].width == last.shape[1] and titled.frames[0].height > last.shape[0]
    small = trace.animation(demo_pipeline, output.plan, 1, size=1)
    assert small.frames[0].width < 100  # never reduced: the image's own 64 pixels


class Grey:
    """Decodes everything to one grey."""

    def decode_latents(self, latents):
        return [Image.new("RGB", (16, 16), "grey")] * len(latents)


def test_the_length_of_an_animation(traced):
    """Few steps are shown slowly, many quickly."""
    trace, output = traced
    short, long = Trace(), Trace()
    short.predictions, long.predictions = trace.predictions[:2], trace.predictions * 20
    make = output.plan.__class__
    animations = [
        each.animation(Grey(), make(steps, output.plan.initial_scale), size=16)
        for each, steps in ((short, output.plan.steps[:2]), (long, output.plan.steps * 20))
    ]
    assert animations[0].durations == (400, 2500)
    assert len(animations[1].durations) == 200 and set(animations[1].durations[:-1]) == {60}


def test_the_contact_sheet(demo_pipeline, traced):
    trace, output = traced
    sheet = trace.sheet(demo_pipeline, output.plan, columns=5, title="a castle")
    assert sheet.width > 5 * 192 and 2 * 192 < sheet.height < 3 * 192
    assert (
        sheet.tobytes() != trace.sheet(demo_pipeline, output.plan, 1, columns=5, title="a castle").tobytes()
    )


def test_clear_errors(demo_pipeline, traced, tmp_path):
    trace, output = traced
    with pytest.raises(ValueError, match="trace is empty"):
        Trace().images(demo_pipeline)
    with pytest.raises(ValueError, match="2 samples"):
        trace.images(demo_pipeline, 2)
    twice = Trace()
    twice.predictions = trace.predictions * 2
    for show in (twice.sheet, twice.animation):
        with pytest.raises(ValueError, match="20 steps and the plan has 10"):
            show(demo_pipeline, output.plan)
    animation = Animation((Image.new("RGB", (8, 8)),), (100,))
    with pytest.raises(ValueError, match=r"animations are written as WebP.*\.webp"):
        animation.save(tmp_path / "trace.gif")
    with pytest.raises(ValueError, match="create it first"):
        animation.save(tmp_path / "nowhere" / "trace.webp")
    with pytest.raises(ValueError, match="as many durations as frames"):
        save_webp([], [], tmp_path / "trace.webp")
    with pytest.raises(ValueError, match=r"\.png"):
        check_writable(tmp_path / "trace.webp")


def test_a_failed_write_leaves_nothing_new(tmp_path):
    path = tmp_path / "trace.webp"
    Animation((Image.new("RGB", (8, 8)),), (100,)).save(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"."):
        Animation((Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9))), (100, 100)).save(path)
    assert path.read_bytes() == before and [left.name for left in tmp_path.iterdir()] == ["trace.webp"]


def test_a_trace_of_a_queue_has_all_its_images(demo_pipeline):
    whole, queued = Trace(), Trace()
    settings = {"num_inference_steps": 3, "num_images_per_prompt": 3, "seed": 5}
    for trace, batch_size in ((whole, None), (queued, 2)):
        demo_pipeline(
            "a castle",
            batch_size=batch_size,
            callback_on_step_end=trace,
            callback_on_step_end_tensor_inputs=trace.tensor_inputs,
            output_type="latent",
            **settings,
        )
    assert len(queued.predictions) == len(whole.predictions) == 3
    for mine, theirs in zip(queued.predictions, whole.predictions, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)
