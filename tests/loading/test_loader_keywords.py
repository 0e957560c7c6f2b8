"""Every keyword of diffusers' loaders: what is so anyway passes, anything else is refused by name."""

from __future__ import annotations

import pytest

from moe_sampler.loading.loader_keywords import device_of_map, without_loader_keywords

NONE_ONLY = ("safety_checker", "feature_extractor", "image_encoder", "custom_pipeline", "custom_revision")
NONE_ONLY += ("device_map", "max_memory", "offload_folder", "quantization_config")
NONE_ONLY += ("proxies", "mirror", "use_auth_token")
NOT_TRUE = ("requires_safety_checker", "add_prefix_space", "use_onnx", "use_flashpack", "disable_mmap")
NOT_TRUE += ("load_connected_pipeline", "output_loading_info", "offload_state_dict")
ANY_TRUTH = ("low_cpu_mem_usage", "trust_remote_code", "resume_download")
NEVER = ("scheduler", "unet")


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        *((name, (None,)) for name in NONE_ONLY),
        *((name, (None, False)) for name in NOT_TRUE),
        *((name, (None, True, False)) for name in ANY_TRUTH),
        *((name, ()) for name in NEVER),
        ("use_safetensors", (None, True)),
    ],
)
def test_what_is_so_anyway_passes_and_the_rest_is_refused(name, fine):
    for value in (None, True, False, "", "something", 0, 1):
        if any(value is one for one in fine):
            assert without_loader_keywords({name: value, "variant": "fp16"}) == {"variant": "fp16"}
            continue
        with pytest.raises(ValueError) as error:
            without_loader_keywords({name: value})
        assert str(error.value).startswith(f"{name}={value!r} is not supported: ")


def test_other_keywords_are_none_of_its_business():
    given = {"variant": None, "revision": "main", "sol": "a.safetensors"}
    assert without_loader_keywords(given) == given and without_loader_keywords({}) == {}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (("cuda", None), (None, "cuda")),
        (("cuda:1", None), (None, "cuda:1")),
        (("cpu", None), (None, "cpu")),
        (("mps", None), (None, "mps")),
        (("cuda", "cpu"), ("cuda", "cpu")),
        (("balanced", None), ("balanced", None)),
        (({"unet": 0}, None), ({"unet": 0}, None)),
        ((None, "cuda"), (None, "cuda")),
    ],
)
def test_a_map_of_one_device_is_that_device(given, found):
    assert device_of_map(*given) == found
