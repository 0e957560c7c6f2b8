"""Threads that share a pipeline take turns."""

import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from moe_sampler.demo import experts_path
from moe_sampler.pipelines import queue
from moe_sampler.pipelines.hybrid import HybridPipeline


def test_four_threads_and_one_pipeline_whose_experts_take_turns_in_memory():
    torch.set_num_threads(1)
    pipe = HybridPipeline.from_pretrained(experts_path(), offload="expert", device="cpu")
    pipe.set_progress_bar_config(disable=True)

    def make(seed: int) -> np.ndarray:
        return pipe("a castle", num_inference_steps=4, seed=seed, output_type="np").images[0]

    alone = [make(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(make, range(4)))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


class _Owner:
    pass


def test_the_turns_of_what_is_gone_are_forgotten():
    owner = _Owner()
    turn = queue._turn_of(owner)
    assert queue._turn_of(owner) is turn and queue._turn_of(_Owner()) is not turn
    pickle.dumps(owner)
    before = len(queue._TURNS)
    del owner, turn
    gc.collect()
    assert len(queue._TURNS) < before
