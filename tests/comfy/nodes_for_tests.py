"""A ComfyUI node that only tests use: conditioning out of a file, instead of text encoders of gigabytes."""

import folder_paths
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file


class ConditioningFromFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ConditioningFromFile",
            category="tests",
            inputs=[io.String.Input("file")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, file):
        tensors = load_file(f"{folder_paths.get_input_directory()}/{file}")
        cross = tensors.pop("cross")
        return io.NodeOutput([[cross, {**tensors, "width": 64, "height": 64}]])


class Nodes(ComfyExtension):
    async def get_node_list(self):
        return [ConditioningFromFile]


async def comfy_entrypoint():
    return Nodes()
