"""ComfyUI nodes for tests: conditioning out of a file, not from text encoders; sigmas as written."""

import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file


def schema(name: str, given, made):
    return io.Schema(node_id=name, category="tests", inputs=[given], outputs=[made])


class ConditioningFromFile(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema("ConditioningFromFile", io.String.Input("file"), io.Conditioning.Output())

    @classmethod
    def execute(cls, file):
        tensors = load_file(f"{folder_paths.get_input_directory()}/{file}")
        cross = tensors.pop("cross")
        return io.NodeOutput([[cross, {**tensors, "width": 64, "height": 64}]])


class WrittenSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema("WrittenSigmas", io.String.Input("sigmas"), io.Sigmas.Output())

    @classmethod
    def execute(cls, sigmas):
        return io.NodeOutput(torch.tensor([float(sigma) for sigma in sigmas.split()]))


class Nodes(ComfyExtension):
    async def get_node_list(self):
        return [ConditioningFromFile, WrittenSigmas]


async def comfy_entrypoint():
    return Nodes()
