"""From any source to a model: folders, files and the hub, strictly, and never executing what they hold.

presets         what is known by name: the published experts, how each kind was trained
hub             where a source is: on this machine, or downloaded
folders         a pipeline's folder, its index and configs; diffusers' and transformers' components, strictly
expert_files    which files an expert is made of, and what it was trained on
marks           what a file says of itself
lora_files      LoRA files: what kind they are, and whether they fit
state_dicts     the tensors of a file, and whether they are a model's
weights         an expert's model without its weights, which takes them in and gives them up again
parts           all of it together: what a pipeline is made of, checked before any weights are read
fingerprint     what tells two models apart
"""
