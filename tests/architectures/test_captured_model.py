"""Recorded calls of an expert's model, where a tape of torch's operators stands in for a CUDA graph."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from tape import captured
from torch import nn
from unets import inputs, unet

from moe_sampler import Boundary, Expert, plan, sample
from moe_sampler.architectures import captured_model
from moe_sampler.architectures.captured_model import MOST, CapturedModel, Recordings
from moe_sampler.architectures.expert_model import ExpertModel
from moe_sampler.pipelines.projections import join_projections

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_a_replay_is_a_call_with_its_own_inputs_in_memory_of_its_own():
    model = unet()
    fast, recorder = captured(model)
    made = [fast(*inputs(seed)) for seed in (1, 2, 3)]
    assert recorder.count == 1
    for seed, output in zip((1, 2, 3), made, strict=True):  # no replay has written over another's output
        assert torch.equal(output, ExpertModel(model)(*inputs(seed)))
    assert torch.equal(fast(*inputs(4, batch=2)), ExpertModel(model)(*inputs(4, batch=2)))
    assert recorder.count == 2
    assert torch.equal(fast(*inputs(5)), ExpertModel(model)(*inputs(5)))
    assert recorder.count == 2


@pytest.mark.parametrize(
    "settings", [{}, {"reuse": 2}, {"solver": "heun"}, {"guidance_window": (1.0, 0.5), "reuse": 2}]
)
def test_a_run_is_the_same_to_the_last_bit(settings):
    models = {"sol": unet(1), "lune": unet(2)}
    told = {"prompt_embeds": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))}
    nothing = {"prompt_embeds": torch.zeros(2, 5, 12)}

    def run(wrap):
        make = {"sol": Expert.sol, "lune": Expert.lune}
        experts = [make[name](wrap(models[name]), guidance_scale=3.0, **settings) for name in models]
        return sample(
            plan(experts, Boundary("sol", "lune", 0.7), steps=6),
            experts,
            shape=(2, 4, 8, 8),
            seeds=[1, 2],
            cond=told,
            uncond=nothing,
        )

    recorders = {}

    def wrap(model):
        fast, recorders[model] = captured(model)
        return fast

    assert torch.equal(run(wrap), run(ExpertModel))
    kinds = 3 if "guidance_window" in settings else 2 if "reuse" in settings else 1
    assert all(1 <= recorder.count <= kinds + 2 for recorder in recorders.values())


def moved(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def lora(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")


CHANGES = {
    "weights elsewhere": moved,
    "another processor": lambda model: model.set_attn_processor(AttnProcessor()),
    "a hook": lambda model: model.conv_in.register_forward_hook(lambda module, args, output: output * 2),
    "a module": lambda model: setattr(model, "conv_out", nn.Conv2d(8, 4, 1)),
    "a setting": lambda model: model.enable_freeu(0.5, 0.5, 1.2, 1.2),
    "a weight": lambda model: setattr(model.conv_in, "bias", nn.Parameter(torch.ones(8))),
    "an adapter": lora,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_changed_model_is_recorded_anew(change):
    model = unet()
    fast, recorder = captured(model)
    fast(*inputs())
    change(model)
    assert torch.equal(fast(*inputs(2)), ExpertModel(model)(*inputs(2)))
    assert recorder.count == 2
    fast(*inputs(3))
    assert recorder.count == 2


@torch.no_grad()
def test_an_adapters_scale_counts_from_the_next_call_on():
    model = unet()
    lora(model)
    fast, recorder = captured(model)
    outputs = []
    for scale in (1.0, 0.25, 1.0):
        model.set_adapters("style", scale)
        outputs.append(fast(*inputs()))
        assert torch.equal(outputs[-1], ExpertModel(model)(*inputs()))
    assert not torch.equal(outputs[0], outputs[1]) and recorder.count == 3


@torch.no_grad()
def test_weights_changed_in_place_need_no_recording():
    model = unet()
    fast, recorder = captured(model)
    fast(*inputs())
    model.conv_in.weight.mul_(2)
    assert torch.equal(fast(*inputs()), ExpertModel(model)(*inputs())) and recorder.count == 1


@torch.no_grad()
def test_the_oldest_calls_are_forgotten():
    fast, recorder = captured(unet())
    for batch in range(1, MOST + 2):
        fast(*inputs(batch=batch))
    fast(*inputs(batch=MOST + 1))
    assert recorder.count == MOST + 1
    fast(*inputs(batch=1))
    assert recorder.count == MOST + 2


def test_gradients_and_autocast_go_the_usual_way():
    model = unet()
    fast, recorder = captured(model)
    fast(*inputs()).sum().backward()
    assert model.conv_in.weight.grad is not None and recorder.count == 0


@torch.no_grad()
def test_what_cannot_be_recorded_says_what_to_do():
    def fails(work):
        raise RuntimeError("operation not permitted when stream is capturing\nsomething else")

    fast = CapturedModel(Recordings(unet(), fails))
    with pytest.raises(ValueError, match=r'can\'t be recorded .*capturing\): use speed="fast"'):
        fast(*inputs())


def test_what_was_recorded_in_inference_mode_serves_outside_of_it():
    model = unet()
    fast, recorder = captured(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(fast(*inputs(2)), ExpertModel(model)(*inputs(2)))
    assert recorder.count == 1


@torch.no_grad()
def test_weights_that_the_first_call_lays_side_by_side_are_recorded_once():
    model = unet()
    join_projections([model], joined=True)
    fast, recorder = captured(model)
    for seed in (1, 2):
        assert torch.equal(fast(*inputs(seed)), ExpertModel(model)(*inputs(seed)))
    assert recorder.count == 1


class Graph:
    """As much of a CUDA graph as says whose memory it shares."""

    def __init__(self, pool):
        self._pool = pool or object()

    def pool(self):
        return self._pool

    def replay(self):
        pass


def test_a_graph_shares_the_memory_of_one_that_lives_and_of_none_that_failed(monkeypatch):
    """torch's allocator refuses a pool whose graphs are all gone, or in which a recording has failed."""
    asked = []

    def record(work, stream, pool):
        asked.append(pool)
        return Graph(pool), work()

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured_model, "record", record)
    monkeypatch.setattr(captured_model, "warm_up", lambda work, stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    model = nn.Linear(1, 1)
    recorder = captured_model._CUDARecorder(model)
    first, _ = recorder(int)
    second, _ = recorder(int)
    pool = first.__self__.pool()
    assert asked == [None, pool] and second.__self__.pool() is pool
    with pytest.raises(RuntimeError, match="capturing"):
        recorder(fails)
    assert asked[2:] == [pool]
    third, _ = recorder(int)
    del third
    recorder(int)
    assert asked[3:] == [None, None]
    kept, _ = recorder(int)
    model.to("meta")
    recorder(int)
    assert asked[5:] == [None, None] and recorder._stream.device.type == "meta"
    del kept
