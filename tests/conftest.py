"""Fixtures: analytic experts whose denoisers are exact, so that what a sampler should produce is known."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_sampler import Expert
from moe_sampler.sampling.paths import Level

sys.path.insert(0, str(Path(__file__).parent))

# Models are tiny, so threads would only wait for each other; processes that tests start follow the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# To find out what the CPU and the compiler have in common takes torch.compile half a minute in every process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


HERE = Path(__file__).parent
LONG = (
    "training/test_trainer.py",
    "kernels/test_interpreter.py",
    "docs/test_pages.py",
    "bench/test_device.py",
    "tinyflux/training/test_training.py",
    "tinyflux/features/test_caches.py",
    "demo/test_training.py",
    "cli/test_generate_rows.py",
    "docs/test_recipes.py",
)
"""Files that take the longest go first: at the end one of them would run beside an idle process."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist's own order, by the number of tests in a file
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    """What all the imports made stays: no collection of garbage has to look through it again."""
    gc.collect()
    gc.freeze()


@dataclasses.dataclass(frozen=True)
class GaussianMixture:
    """Independent one-dimensional mixtures per element, with the exact posterior mean E[x0 | x].

    Written from Bayes' rule in float64; knows nothing of the package's coefficients.
    """

    means: tuple[float, ...] = (-1.0, 0.3, 1.2)
    stds: tuple[float, ...] = (0.15, 0.1, 0.2)
    shares: tuple[float, ...] = (0.3, 0.5, 0.2)

    def x0(self, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        x = x.double()
        logs, posterior_means = [], []
        for mean, std, share in zip(self.means, self.stds, self.shares, strict=True):
            variance = alpha**2 * std**2 + sigma**2
            logs.append(math.log(share) - 0.5 * math.log(variance) - 0.5 * (x - alpha * mean) ** 2 / variance)
            posterior_means.append((std**2 * alpha * x + sigma**2 * mean) / variance)
        weights = torch.softmax(torch.stack(logs), dim=0)
        return (weights * torch.stack(posterior_means)).sum(0)

    def predict(self, prediction: str, x: torch.Tensor, level: Level) -> torch.Tensor:
        alpha, sigma = level.alpha, level.sigma
        x0 = self.x0(x, alpha, sigma)
        epsilon = (x.double() - alpha * x0) / sigma
        return {
            "sample": x0,
            "epsilon": epsilon,
            "v_prediction": alpha * epsilon - sigma * x0,
            "flow_prediction": epsilon - x0,
            "reversed_flow_prediction": x0 - epsilon,
        }[prediction].to(x.dtype)

    def quantile(self, q: torch.Tensor) -> torch.Tensor:
        """Inverse of the data's distribution function, by bisection."""
        low, high = torch.full_like(q, -6.0), torch.full_like(q, 6.0)
        for _ in range(60):
            middle = 0.5 * (low + high)
            cdf = sum(
                share * 0.5 * (1 + torch.erf((middle - mean) / (std * math.sqrt(2))))
                for mean, std, share in zip(self.means, self.stds, self.shares, strict=True)
            )
            low, high = torch.where(cdf < q, middle, low), torch.where(cdf < q, high, middle)
        return 0.5 * (low + high)

    def give_model(self, expert: Expert) -> Expert:
        """The expert with its exact model, which finds its level from the timestep it is told."""

        def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.predict(expert.prediction, x, expert.path.level(timestep.item()))

        return dataclasses.replace(expert, model=model)


@pytest.fixture(scope="session")
def mixture() -> GaussianMixture:
    return GaussianMixture()


@pytest.fixture(scope="session")
def gentle_mixture() -> GaussianMixture:
    """Overlapping modes: no point where a rounding error decides which mode a sample falls to."""
    return GaussianMixture(means=(-0.4, 0.1, 0.5), stds=(0.3, 0.25, 0.3))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def demo_pipeline():
    """The pipeline with the demo experts that ship with the package, without its progress bar."""
    from moe_sampler import HybridPipeline
    from moe_sampler.demo import experts_path

    pipe = HybridPipeline.from_pretrained(experts_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What is kept of data sets' digests stays away from the user's own, and from other tests'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def _turn(item: pytest.Item) -> int:
    file = item.path.relative_to(HERE).as_posix() if item.path.is_relative_to(HERE) else ""
    return LONG.index(file) if file in LONG else len(LONG)


def pytest_collection_modifyitems(items):
    items.sort(key=_turn)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class _Record(TorchDispatchMode):
    """Every operator torch is asked for; what happens inside one is its own business."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def recorded() -> type[_Record]:
    """`with recorded() as record:` keeps the names of all operators in `record.names`."""
    return _Record


class Waits(TorchDispatchMode):
    """Copies between the host and the silent device that the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = [a.device.type for a in args if isinstance(a, torch.Tensor)]
        target = torch.device(kwargs.get("device") or source[0] if source else "cpu").type
        if func is torch.ops.aten._to_copy.default and source != [target]:
            waits = target == "cpu" or not kwargs.get("non_blocking")
        else:
            waits = func is torch.ops.aten.copy_.default and source[0] != source[1]
        if waits:
            self.found.append(f"{func} of {source} to {target}")
        return func(*args, **kwargs)


@pytest.fixture
def silent_device(monkeypatch) -> type[Waits]:
    """Trainers work on torch's "meta" device, which has shapes and no numbers: whoever reads one fails there,
    and would wait on a GPU. `with silent_device() as waits:` also notes the copies that wait."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    optimizer = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no "meta"
    return Waits


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """diffusers copies a folder's code to a cache before it runs it."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@pytest.fixture
def hub(tmp_path, monkeypatch, own_modules):
    """The Hugging Face hub, empty and on this machine, with a login; its `Repositories`."""
    import hub_server
    from diffusers.loaders import lora_base
    from huggingface_hub import constants, hf_api

    with hub_server.serving() as (address, repositories):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for module in (constants, lora_base):  # which has a copy
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        yield repositories
