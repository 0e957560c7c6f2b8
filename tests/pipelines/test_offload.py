"""Who is in memory when: stages, moves, and that none of it changes an image."""

from __future__ import annotations

import contextlib
import functools
import gc
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from moe_sampler import Boundary, Crossfade, Expert, HybridPipeline, Spans, plan
from moe_sampler.demo import experts_path
from moe_sampler.loading.weights import ExpertWeights
from moe_sampler.pipelines.offload import stages

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a castle", "a portrait", "a city street at night"]
QUICK = dict(seed=3, num_inference_steps=4, output_type="latent")


def load(**kwargs) -> HybridPipeline:
    pipe = HybridPipeline.from_pretrained(experts_path(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def resident(pipe: HybridPipeline) -> list[str]:
    """The experts with weights in memory."""
    return [
        name
        for name in pipe.expert_names
        if any(p.device.type != "meta" for p in getattr(pipe, f"unet_{name}").parameters())
    ]


class Watch:
    """Counts who takes weights in, and looks at who is in memory whenever a model is called."""

    def __init__(self, pipe: HybridPipeline, monkeypatch) -> None:
        self.moves: list[str] = []
        self.calls: list[tuple[str, list[str]]] = []
        names = {id(getattr(pipe, f"unet_{name}")): name for name in pipe.expert_names}
        take = ExpertWeights.take

        def counting(weights, device):
            if not weights.resident:
                self.moves.append(names[id(weights.model)])
            take(weights, device)

        monkeypatch.setattr(ExpertWeights, "take", counting)
        for name in pipe.expert_names:
            getattr(pipe, f"unet_{name}").register_forward_pre_hook(
                lambda *_, name=name: self.calls.append((name, resident(pipe)))
            )


SOL, LUNE, SD15 = Expert.sol(), Expert.lune(), Expert.sd15()


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        (Boundary("sol", "lune", 0.7), [{"sol"}, {"lune"}]),
        (Crossfade("sol", "lune", 0.9, 0.5), [{"sol"}, {"sol", "lune"}, {"lune"}]),
        (Spans((("sol", 0.8), ("lune", 0.4), ("sol", 0.0))), [{"sol"}, {"lune"}, {"sol"}]),
        (Spans((("sol", 0.8), ("sd15", 0.4), ("lune", 0.0))), [{"sol"}, {"sd15"}, {"lune"}]),
    ],
)
def test_stages_are_stretches_with_the_same_experts(router, expected):
    compiled = plan([SOL, LUNE, SD15], router, steps=20)
    found = stages(compiled)
    assert [stage.experts for stage in found] == expected
    ends = [stage.until for stage in found]
    assert ends == sorted(ends) and ends[-1] == len(compiled)
    for index, step in enumerate(compiled.steps):
        stage = next(stage for stage in found if index < stage.until)
        assert stage.experts == {call.name for call in step.calls}


def test_each_expert_moves_once_however_many_prompts_there_are(monkeypatch):
    pipe = load(offload="expert")
    assert pipe.offload == "expert" and resident(pipe) == []
    watch = Watch(pipe, monkeypatch)
    made = pipe(PROMPTS, num_images_per_prompt=2, batch_size=2, **QUICK)
    assert watch.moves == ["sol", "lune"]
    # Sol's steps of all three batches come first, and nobody else is in memory.
    steps = {name: sum(s.calls[0].name == name for s in made.plan.steps) for name in ("sol", "lune")}
    assert watch.calls == [("sol", ["sol"])] * 3 * steps["sol"] + [("lune", ["lune"])] * 3 * steps["lune"]
    assert resident(pipe) == [] and made.images.shape[0] == 6


def test_nobody_is_in_memory_while_images_are_decoded_and_prompts_encoded(monkeypatch):
    pipe = load(offload="expert")
    seen = []
    for name in ("vae", "text_encoder"):
        module = getattr(pipe, name)
        method = "decode" if name == "vae" else "forward"
        original = getattr(module, method)
        monkeypatch.setattr(
            module, method, lambda *a, o=original, n=name, **k: seen.append((n, resident(pipe))) or o(*a, **k)
        )
    pipe(PROMPTS, batch_size=2, seed=0, num_inference_steps=2)
    # Two batches of prompts, what guidance leads away from, two batches of images.
    assert seen == [("text_encoder", [])] * 3 + [("vae", [])] * 2


def test_a_crossfade_needs_both_and_only_there(monkeypatch):
    pipe = load(offload="expert")
    watch = Watch(pipe, monkeypatch)
    pipe(PROMPTS[0], router=Crossfade("sol", "lune", 0.95, 0.5), **{**QUICK, "num_inference_steps": 8})
    assert watch.moves == ["sol", "lune"]
    assert {tuple(who) for _, who in watch.calls} == {("sol",), ("sol", "lune"), ("lune",)}


@pytest.mark.parametrize(
    "settings", [{}, {"router": Crossfade("sol", "lune", 0.95, 0.5)}, {"solver": "dpmpp_2m"}]
)
def test_an_image_is_the_same_in_any_batch_and_mode(demo_pipeline, settings):
    seeds = [11, 5, 8]
    wanted = demo_pipeline(PROMPTS, **{**QUICK, "seed": seeds}, **settings).images
    expert = load(offload="expert")
    one_batch = expert(PROMPTS, **{**QUICK, "seed": seeds}, **settings).images
    assert torch.equal(one_batch, wanted)
    for pipe in (demo_pipeline, expert):
        by_two = pipe(PROMPTS, batch_size=2, **{**QUICK, "seed": seeds}, **settings).images
        by_one = pipe(PROMPTS, batch_size=1, **{**QUICK, "seed": seeds}, **settings).images
        torch.testing.assert_close(by_two, wanted, atol=2e-4, rtol=0)
        for i, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
            alone = demo_pipeline(prompt, **{**QUICK, "seed": [seed]}, **settings).images
            assert torch.equal(by_one[i : i + 1], alone)


def test_modes_may_be_changed(demo_pipeline):
    pipe = load()
    wanted = demo_pipeline(PROMPTS[0], **QUICK).images
    for offload in ("expert", "none", "expert", "expert", "none"):
        pipe.set_offload(offload)
        assert pipe.offload == offload
        assert resident(pipe) == ([] if offload == "expert" else ["sol", "lune"])
        assert torch.equal(pipe(PROMPTS[0], **QUICK).images, wanted)
    pipe.set_offload("expert")
    assert pipe.to("cpu") is pipe and resident(pipe) == []
    pipe.to(torch.bfloat16)
    assert pipe.unet_sol.dtype == pipe.vae.dtype == torch.bfloat16
    bfloat = load(dtype=torch.bfloat16)(PROMPTS[0], **QUICK).images
    torch.testing.assert_close(pipe(PROMPTS[0], **QUICK).images, bfloat, atol=0.1, rtol=0)


def test_changed_weights_are_kept(demo_pipeline):
    """Nothing that was done to an expert is undone by its files."""
    pipe = load(offload="expert")
    plain = pipe(PROMPTS[0], **QUICK).images
    changed = load()
    for own in (pipe, changed):
        with own._with_expert("sol"), torch.no_grad():
            own.unet_sol.conv_in.weight.mul_(0.5)
            own.unet_sol.conv_out.bias = torch.nn.Parameter(own.unet_sol.conv_out.bias + 0.1)
    wanted = changed(PROMPTS[0], **QUICK).images
    assert not torch.equal(wanted, plain)
    for _ in range(2):
        assert torch.equal(pipe(PROMPTS[0], **QUICK).images, wanted)
    for offload in ("none", "expert"):
        pipe.set_offload(offload)
        assert torch.equal(pipe(PROMPTS[0], **QUICK).images, wanted)


def test_saving_takes_one_expert_at_a_time(tmp_path, monkeypatch):
    pipe, seen = load(offload="expert"), []
    save = UNet2DConditionModel.save_pretrained

    @functools.wraps(save)
    def watching(unet, *args, **kwargs):
        seen.append(resident(pipe))
        save(unet, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", watching)
    folders = [tmp_path / name / "experts" for name in ("one", "both")]
    pipe.save_pretrained(folders[0], variant="fp16", max_shard_size="4MB")
    assert sorted(seen) == [["lune"], ["sol"]] and resident(pipe) == []
    load().save_pretrained(folders[1], variant="fp16", max_shard_size="4MB")
    for folder in folders:
        (folder / "README.md").unlink()  # says where it is
    one, both = (
        {str(f.relative_to(d)): f.read_bytes() for f in d.rglob("*") if f.is_file()} for d in folders
    )
    assert one == both and any("fp16-00001-of" in name for name in one)
    again = HybridPipeline.from_pretrained(folders[0], variant="fp16")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(PROMPTS[0], **QUICK).images, pipe(PROMPTS[0], **QUICK).images)
    with pytest.raises(ValueError, match="safetensors only"):
        pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)


def test_files_that_changed_underneath_are_noticed(tmp_path):

    folder = shutil.copytree(experts_path(), tmp_path / "model")
    pipe = HybridPipeline.from_pretrained(folder, offload="expert")
    file = folder / "unet_lune" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.bias"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing: conv_in\.bias"):
        pipe(PROMPTS[0], expert="lune", **QUICK)


def held() -> int:
    """Bytes on the CPU that some tensor still holds."""
    gc.collect()
    sizes: dict[int, int] = {}
    for each in gc.get_objects():
        # What other tests leave may be sparse, fake or elsewhere, without memory that could be asked for.
        if issubclass(type(each), torch.Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):
                if each.device.type == "cpu":
                    sizes[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(sizes.values())


@pytest.mark.parametrize("failing", [False, True])
def test_what_is_given_up_is_held_by_nobody(failing):
    """After a run, or one that broke off, no tensor anywhere keeps an expert's weights in memory."""
    pipe = load(offload="expert")
    weights = pipe._expert_weights()
    before = held()
    with pipe._with_expert("sol"):
        assert held() - before > 0.9 * weights["sol"].nbytes  # it is seen

    def fail(*_):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        pipe(PROMPTS[0], callback_on_step_end=fail if failing else None, **QUICK)
    assert held() - before < 0.05 * weights["sol"].nbytes
    pipe.set_offload("none")  # and with everything in memory there is one copy of it
    both = weights["sol"].nbytes + weights["lune"].nbytes
    assert 0.9 * both < held() - before < 1.05 * both


def test_changed_weights_are_held_once():
    """Without a file to read them from again they are kept on the host, and for good in the model alone."""
    pipe, before = load(offload="expert"), held()
    weights = pipe._expert_weights()
    size = weights["sol"].nbytes
    with pipe._with_expert("sol"), torch.no_grad():
        for parameter in pipe.unet_sol.parameters():
            parameter.mul_(0.99)
    assert 0.9 * size < held() - before < 1.05 * size
    for _ in range(2):
        pipe(PROMPTS[0], **QUICK)
        assert 0.9 * size < held() - before < 1.05 * size
    both = size + weights["lune"].nbytes
    pipe.set_offload("none")
    assert held() - before < 1.05 * both
    pipe.to(torch.bfloat16)  # and nobody keeps what was there before
    assert held() - before < 0.55 * both


def test_what_is_trained_and_what_is_not_stays_so():
    pipe = load(offload="expert")
    pipe.unet_sol.requires_grad_(False)
    pipe.unet_sol.conv_in.requires_grad_(True)
    pipe(PROMPTS[0], **QUICK)
    with pipe._with_expert("sol"):
        trained = [name for name, p in pipe.unet_sol.named_parameters() if p.requires_grad]
        assert trained == ["conv_in.weight", "conv_in.bias"] and not pipe.unet_sol.training


def test_an_error_leaves_no_expert_behind():
    pipe = load(offload="expert")

    def fail(*_):
        raise RuntimeError("out of patience")

    with pytest.raises(RuntimeError, match="patience"):
        pipe(PROMPTS[0], callback_on_step_end=fail, **QUICK)
    assert resident(pipe) == []


def test_what_cannot_be_is_refused(demo_pipeline):
    with pytest.raises(ValueError, match='unknown offload "disk": use none, expert or model'):
        demo_pipeline.set_offload("disk")
    built = HybridPipeline(**demo_pipeline.components, **demo_pipeline.parameters)
    with pytest.raises(ValueError, match="sol, lune came without files: load with from_pretrained"):
        built.set_offload("expert", "cpu")
    assert built.offload == "none" and resident(built) == ["sol", "lune"]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="an accelerator, and there is none"):
            demo_pipeline.set_offload("model")
        with pytest.raises(ValueError, match="CUDA is not available"):
            demo_pipeline.set_offload("expert", "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["expert", "model"])
def test_on_a_gpu(offload):
    pipe, free = load(dtype=torch.float16), load(dtype=torch.float16)
    wanted = free.to("cuda")(PROMPTS, **QUICK).images
    pipe.set_offload(offload, "cuda")
    for _ in range(2):
        made = pipe(PROMPTS, batch_size=2, **QUICK).images
        torch.testing.assert_close(made, wanted, atol=0.05, rtol=0)
    where = {p.device.type for p in pipe.unet_sol.parameters()}
    assert where == {"meta" if offload == "expert" else "cpu"}
    assert pipe.vae.device.type == "cpu"
    pipe.set_offload("none", "cuda")
    torch.testing.assert_close(pipe(PROMPTS, **QUICK).images, wanted, atol=0.05, rtol=0)


def test_an_expert_without_files_works_from_host_memory(demo_pipeline):
    """As on CUDA: what no file holds is kept, given up and taken in again."""
    unet = HybridPipeline.from_pretrained(experts_path()).unet_lune
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    weights = ExpertWeights(unet)
    for _ in range(2):
        weights.release()
        assert not weights.resident
        weights.take("cpu")
        assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_a_prefetched_expert_is_used_only_after_its_copy_arrived(monkeypatch):
    """CUDA's part stood in for: what is asked of streams and events, in which order."""
    log = []

    class Stream:
        def record_event(self):
            log.append("copied")
            return "event"

        def wait_event(self, event):
            log.append(f"waited for the {event}")

    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("recorded"))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: getattr(tensor, "pinned", False))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (log.append("pinned"), tensor.clone())[1])
    room = [0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room[0], 0))
    weights = load(offload="expert")._expert_weights()["sol"]
    count, cpu = len(list(weights.model.parameters())), torch.device("cpu")
    weights.prefetch(cpu, Stream())
    room[0] = int(1.05 * weights.nbytes)
    weights.prefetch(cpu, Stream())
    assert log == []  # no room
    room[0] = 2 * weights.nbytes
    weights.prefetch(cpu, Stream())
    weights.prefetch(cpu, Stream())  # again: it is on its way
    assert log == ["pinned"] * count + ["copied"] and not weights.resident
    weights.take(cpu)
    assert log[count:] == ["copied", "waited for the event", *["recorded"] * count] and weights.resident
    assert torch.equal(weights.model.conv_in.weight, load().unet_sol.conv_in.weight)
    weights.prefetch(cpu, Stream())
    assert log.count("copied") == 1  # it is there
