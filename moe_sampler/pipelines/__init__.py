"""diffusers' interface around the sampler: prompts, images, adapters, offloading, queues."""
